"""Quantization of the weights of towers to 8 or 4 bits.

The large matrices are quantised: projections of mixers, routed and shared experts, MLPs, the head.
Heads have at least 8 bits. Embeddings, routers, norms, convolutions, decay rates and the time conditioning keep their
dtype. They are small, or, as the embeddings, a pass reads only a few rows of them. Rounding a router or a decay rate
would change a layer's output. Activations keep their dtype, unless the plan rounds those of quantised weights to int8.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar
from weakref import WeakKeyDictionary

from torch import nn

from twotower.errors import ArgumentError
from twotower.model.adapters import MaskEmbedding
from twotower.model.conditioning import TimeConditioning
from twotower.model.linear import Int4Linear, Int8Linear, Linear, TiedHead
from twotower.model.moe import Experts, Int4Experts, Int8Experts
from twotower.model.tower import Tower
from twotower.model.towers import TwoTowerModel
from twotower.ops.reference.integer import MAX_WIDTH
from twotower.quantization import INT8_ACTIVATIONS, PARTS, Part, QuantizationPlan, Scheme, TowerName, text_of

Model = TypeVar("Model", bound=nn.Module)
Large = Linear | TiedHead | Experts
Quantized = Int8Linear | Int8Experts | Int4Linear | Int4Experts


def quantize_(model: Model, plan: QuantizationPlan | str = "int8") -> Model:
    """Quantises the large weights of a module in place, one matrix at a time; returns the module.

    plan: as `QuantizationPlan.parse` reads it. Layers that towers share stay shared.

    Raises:
        ArgumentError: quantised weights of the module have another arithmetic than the plan's, or a weight is too wide
            for it; or the plan gives a scheme of its own to a denoiser that is adapters.
    """
    schemes = QuantizationPlan.parse(plan) if isinstance(plan, str) else plan
    adapters = any(isinstance(module, MaskEmbedding) for module in model.modules())
    if adapters and not any(part_of(path).tower == "denoiser" for path, _ in large_weights(model)):
        _check_with_adapters(schemes)
    known = (module for module in model.modules() if isinstance(module, Quantized))
    if any(module.int8_activations != schemes.int8_activations for module in known):
        raise ArgumentError(
            f"quantize_: {str(schemes)!r} has other activations than weights that are quantised already; load the "
            "original weights, and quantise them with one plan"
        )
    _release_modules(model)
    made: WeakKeyDictionary[nn.Module, nn.Module] = (
        WeakKeyDictionary()
    )  # weak, so that each old weight is freed at once
    for path in [path for path, _ in large_weights(model) if path]:
        parent, _, name = path.rpartition(".")
        holder = model.get_submodule(parent)
        child = getattr(holder, name)
        if child not in made:
            new = _quantized(child, schemes.scheme(*part_of(path)), schemes.int8_activations)
            if new is None:
                continue
            made[child] = new
        setattr(holder, name, made[child])
        del child
    return model


def _release_modules(model: nn.Module) -> None:
    """Makes runners and views forget the modules of earlier passes, so that each old weight is freed at once."""
    for module in model.modules():
        if isinstance(module, TwoTowerModel):
            module.release_modules()
        elif isinstance(module, Tower):
            module.release()


def large_weights(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules, with their names, of the weights that quantization changes, quantised or not."""
    kept = {part for time in model.modules() if isinstance(time, TimeConditioning) for part in time.modules()}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Large | Quantized) and module not in kept:
            yield path, module


def part_of(path: str) -> Part:
    """The part of a large weight, by the name of its module. A module outside towers counts to the context tower."""
    names = path.split(".")
    if names[0] == "denoisers":
        names = names[2:]
    tower: TowerName = "denoiser" if names[0] == "denoiser" else "context"
    if names[-1] in ("head", "shared_expert_gate"):
        return Part(tower, "heads")
    return Part(tower, "experts" if {"experts", "shared_experts"} & set(names) else "projections")


def scheme_of(module: nn.Module) -> Scheme:
    """The scheme of a large weight."""
    if isinstance(module, Int4Linear | Int4Experts):
        return "int4"
    return "int8" if isinstance(module, Int8Linear | Int8Experts) else "none"


def schemes_of(model: nn.Module) -> dict[Part, Scheme]:
    """The schemes of the parts that a model has. A part counts as its narrowest weight."""
    found: dict[Part, Scheme] = {}
    for path, module in large_weights(model):
        part, scheme = part_of(path), scheme_of(module)
        found[part] = max(found.get(part, scheme), scheme, key=("none", "int8", "int4").index)
    return found


def quantization_of(model: nn.Module) -> str:
    """The plan of a model's weights; "none" if they are not quantised."""
    return text_of(schemes_of(model), rounds_activations(model))


def rounds_activations(model: nn.Module) -> bool:
    """Whether products of quantised weights round their activations to int8."""
    return any(isinstance(module, Quantized) and module.int8_activations for module in model.modules())


def _check_with_adapters(plan: QuantizationPlan) -> None:
    """Raises ArgumentError if a plan gives the denoiser another scheme than the context tower."""
    own = [part.kind for part in PARTS if part.tower == "denoiser" and plan.schemes[part] != "none"]
    if any(plan.scheme("denoiser", kind) != plan.scheme("context", kind) for kind in own):
        raise ArgumentError(
            f"quantization: {str(plan)!r} names the denoiser, which is adapters on the context tower here; adapters "
            "keep their dtype, so leave denoiser=… out"
        )


def _quantized(module: nn.Module, scheme: Scheme, int8_activations: bool) -> nn.Module | None:
    """The module with quantised weights; None if nothing is to do."""
    if isinstance(module, Quantized) or scheme == "none":
        return None
    weights = [module.weight] if isinstance(module, Linear | TiedHead) else list(module.parameters())
    wide = max(weight.shape[-1] for weight in weights) if int8_activations else 0
    if wide > MAX_WIDTH:
        raise ArgumentError(
            f"quantization: {INT8_ACTIVATIONS} allows {MAX_WIDTH} inputs of a weight, and one has {wide}"
        )
    if isinstance(module, Experts):
        made: type[Int8Experts | Int4Experts] = Int8Experts if scheme == "int8" else Int4Experts
        return made(module, int8_activations)
    assert isinstance(module, Linear | TiedHead)
    kind: type[Int8Linear | Int4Linear] = Int8Linear if scheme == "int8" else Int4Linear
    return kind(module, int8_activations)
