"""Towers with int8 weights: a quarter of the memory of fp32, half of bf16's, and as much less to read in a pass.

What becomes int8 are the large products: projections of Mamba and attention layers, routed and shared experts, MLPs,
the head. Embeddings (a row of which is read), routers, norms, convolutions, decay rates and the time conditioning stay
as they are: together they are small, and a rounded router or decay rate changes what a layer does.
"""

from __future__ import annotations

from typing import Literal, TypeVar
from weakref import WeakKeyDictionary

from torch import nn

from twotower.model.conditioning import TimeConditioning
from twotower.model.linear import Int8Linear, Linear
from twotower.model.moe import Experts, Int8Experts

Quantization = Literal["none", "int8"]
Model = TypeVar("Model", bound=nn.Module)


def quantize_(model: Model) -> Model:
    """Makes the weights of a model, or of a part of one, int8, in place, one matrix at a time; returns it. Layers that
    towers share stay shared."""
    wide = {part for time in model.modules() if isinstance(time, TimeConditioning) for part in time.modules()}
    parents = [part for part in model.modules() if part not in wide and not isinstance(part, Linear | Experts)]
    made: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()  # weak: the old weights go as the new ones come
    for parent in parents:
        for name, child in parent.named_children():
            if child not in made and isinstance(child, Linear | Experts):
                made[child] = Int8Linear(child) if isinstance(child, Linear) else Int8Experts(child)
            if child in made:
                setattr(parent, name, made[child])
    return model


def quantization_of(model: nn.Module) -> Quantization:
    """How a model's weights are kept."""
    return "int8" if any(isinstance(module, Int8Linear | Int8Experts) for module in model.modules()) else "none"
