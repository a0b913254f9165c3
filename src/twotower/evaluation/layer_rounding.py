"""Rounds the weights of one layer for recorded inputs: those of its linear layers, and those of each expert."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twotower.checkpoint.calibrated_rounding import round_int4
from twotower.errors import ArgumentError
from twotower.model.linear import Linear
from twotower.model.moe import Experts
from twotower.ops.reference import int4, int8
from twotower.ops.reference.experts import expert_mlp
from twotower.quantization import Scheme

Routed = tuple[Tensor, Tensor, Tensor]  # inputs of experts: hidden (T, H), ids (T, k), weights (T, k)


class Inputs:
    """What the int4 weights of a layer have read, by the names of their modules in the layer.

    moments: Σ x·xᵀ (in, in) of linear layers, in float64. routed: the inputs of routed experts, pass by pass.
    """

    def __init__(self) -> None:
        self.moments: dict[str, Tensor] = {}
        self.routed: dict[str, list[Routed]] = defaultdict(list)

    def add(self, name: str, x: Tensor) -> None:
        self.moments[name] = self.moments.get(name, 0.0) + moments_of(x.flatten(0, -2))


@contextmanager
def recorded(layer: nn.Module, schemes: Mapping[str, Scheme]) -> Iterator[Inputs]:
    """Records the inputs of the layer's int4 weights while it runs in the `with` block."""
    inputs = Inputs()

    def linear(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, given: inputs.add(name, given[0])

    def experts(name: str) -> Callable[[nn.Module, tuple[Tensor, Tensor, Tensor]], None]:
        return lambda module, given: inputs.routed[name].append(given)

    hooks = []
    for name in (name for name, scheme in schemes.items() if scheme == "int4"):
        module = layer.get_submodule(name)
        hooks.append(module.register_forward_pre_hook((experts if isinstance(module, Experts) else linear)(name)))
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()


def round_weights(layer: nn.Module, schemes: Mapping[str, Scheme], inputs: Inputs, path: str) -> dict[str, Tensor]:
    """Replaces the weights of a layer by rounded ones → int4 data, by the name of each int4 weight in the layer.

    schemes: of the large weights. path: the name of the layer, for errors. int8 weights are rounded to nearest.

    Raises:
        ArgumentError: an input is not finite.
    """
    found = {}
    for name, scheme in schemes.items():
        module = layer.get_submodule(name)
        assert isinstance(module, Linear | Experts)
        leaves = [leaf for leaf, _ in module.named_parameters() if leaf != "bias"]
        if scheme == "int8":
            for leaf in leaves:
                weight = getattr(module, leaf)
                q, scale = int8.quantize(weight)
                weight.copy_(int8.unpack(q, scale, weight.dtype) * scale[..., None])
        if scheme != "int4":
            continue
        if isinstance(module, Linear):
            moments = _finite(inputs.moments.get(name, torch.zeros(())), f"{path}.{name}")
            found[f"{name}.weight"] = _round(module.weight, moments)
            continue
        data = {leaf: [] for leaf in leaves}  # type: dict[str, list[Tensor]]
        for expert in range(len(module.up_proj)):
            outer, inner = (_finite(m, f"{path}.{name}") for m in expert_moments(module, expert, inputs.routed[name]))
            for leaf in leaves:
                data[leaf].append(_round(getattr(module, leaf)[expert], inner if leaf == "down_proj" else outer))
        found |= {f"{name}.{leaf}": torch.stack(each) for leaf, each in data.items()}
    return found


def expert_moments(experts: Experts, expert: int, routed: list[Routed]) -> tuple[Tensor, Tensor]:
    """Σ x·xᵀ of the inputs of one expert's first matrices (H, H) and of its last (I, I), in float64.

    An input counts with the weight that the router gives the expert's output.
    """
    _, width, hidden = experts.up_proj.shape
    outer, inner = (torch.zeros(n, n, dtype=torch.float64, device=experts.up_proj.device) for n in (hidden, width))
    gate = experts.gate_proj if experts.gated else None

    def product(x: Tensor, matrices: Tensor) -> Tensor:
        return x if matrices is experts.down_proj else F.linear(x, matrices[expert])

    for x, ids, weight in routed:
        token, place = (ids == expert).nonzero(as_tuple=True)
        own, share = x[token], weight[token, place, None].to(x.dtype)
        read = expert_mlp(own, gate, experts.up_proj, experts.down_proj, experts.activation, product)
        outer += moments_of(own * share)
        inner += moments_of(read * share)
    return outer, inner


def moments_of(x: Tensor) -> Tensor:
    """x (T, n) → Σ x·xᵀ (n, n) in float64."""
    return (x.T @ x).double()


def _round(weight: Tensor, moments: Tensor) -> Tensor:
    """Rounds a weight (out, in) in place → its int4 data."""
    out, width = weight.shape
    data = torch.empty(int4.data_shape((out, width)), dtype=torch.uint8, device=weight.device)
    int4.pack_into(data, *round_int4(weight, moments.expand(width, width)))
    weight.copy_(int4.dequantize(data, out, width, weight.dtype))
    return data


def _finite(moments: Tensor, name: str) -> Tensor:
    if not bool(moments.isfinite().all()):
        raise ArgumentError(f"calibration: {name} reads values that are not finite for this text; give other text")
    return moments
