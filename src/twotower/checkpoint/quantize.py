"""Weight-only int8 quantization of towers: a quarter of the memory of fp32, half of that of bf16.

The large matrices become int8: projections of mixers, routed and shared experts, MLPs, the head.
Embeddings, routers, norms, convolutions, decay rates and the time conditioning keep their dtype. They are small, or, as
the embeddings, a pass reads only a few rows of them. Rounding a router or a decay rate would change a layer's output.
"""

from __future__ import annotations

from typing import Literal, TypeVar
from weakref import WeakKeyDictionary

from torch import nn

from twotower.model.conditioning import TimeConditioning
from twotower.model.linear import Int8Linear, Linear, TiedHead
from twotower.model.moe import Experts, Int8Experts

Quantization = Literal["none", "int8"]
Model = TypeVar("Model", bound=nn.Module)


def quantize_(model: Model) -> Model:
    """Quantises the large weights of a module in place, one matrix at a time; returns the module.

    Layers that towers share stay shared.
    """
    kept = {part for time in model.modules() if isinstance(time, TimeConditioning) for part in time.modules()}
    parents = [
        part for part in model.modules() if part not in kept and not isinstance(part, Linear | Experts | TiedHead)
    ]
    made: WeakKeyDictionary[nn.Module, nn.Module] = (
        WeakKeyDictionary()
    )  # weak, so that each old weight is freed at once
    for parent in parents:
        for name, child in parent.named_children():
            if child not in made and isinstance(child, Linear | Experts | TiedHead):
                made[child] = Int8Experts(child) if isinstance(child, Experts) else Int8Linear(child)
            if child in made:
                setattr(parent, name, made[child])
    return model


def quantization_of(model: nn.Module) -> Quantization:
    """The quantization of a model's weights."""
    return "int8" if any(isinstance(module, Int8Linear | Int8Experts) for module in model.modules()) else "none"
