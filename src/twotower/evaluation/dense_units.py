"""A dense MLP in the place of a MoE layer: the units of its experts that matter most, with refitted output weights.

A unit is one row of an expert's first matrices with one column of its last. The shared expert's units come first. The
units of all routed experts follow, ranked by E[(weight · activation)²] · ‖down column‖² over calibration inputs: the
weight is the router's, 0 where the expert is not selected. Ridge regression then fits the output weights to the MoE
layer's output.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower.model.linear import Linear
from twotower.model.moe import MLP, MoE
from twotower.ops.reference.activation import activate
from twotower.specs import MLPSpec

RIDGE = 1e-4  # the penalty of squared output weights, in units of a unit's mean squared activation


@dataclass(frozen=True)
class Units:
    """Units of experts: gate (U, H) or None, up (U, H), their biases (U,) or None, and down (H, U)."""

    gate: Tensor | None
    up: Tensor
    gate_bias: Tensor | None
    up_bias: Tensor | None
    down: Tensor

    def pick(self, places: Tensor) -> Units:
        """The units at these places, in this order."""
        parts = (self.gate, self.up, self.gate_bias, self.up_bias)
        rows = [None if part is None else part[places] for part in parts]
        assert rows[1] is not None
        return Units(rows[0], rows[1], rows[2], rows[3], self.down[:, places])


def dense_mlp(moe: MoE, spec: MLPSpec, inputs: Sequence[Tensor]) -> MLP:
    """An MLP of `spec`, made of the units of a MoE layer and fitted to its output for inputs (T, H)."""
    scores = unit_scores(moe, inputs)
    places = chosen_units(scores, 0 if moe.spec.shared is None else moe.spec.shared.width, spec.width)
    return fitted(moe, mlp_of(picked(moe, places), spec), inputs)


def chosen_units(scores: Tensor, shared: int, width: int) -> Tensor:
    """The places (width,) of the chosen units: those of the shared expert, the first, then the best of the others.

    scores: (U,), of all units. If the width is below that of the shared expert, its best units are chosen.
    """
    first, rest = scores[:shared], scores[shared:]
    if width < shared:
        return first.argsort(descending=True, stable=True)[:width]
    ranked = rest.argsort(descending=True, stable=True)[: width - shared] + shared
    return torch.cat([torch.arange(shared, device=scores.device), ranked])


def unit_scores(moe: MoE, inputs: Sequence[Tensor]) -> Tensor:
    """(U,) in float64: Σ (weight · activation)² · ‖down column‖² of all units, in the order of `all_units`."""
    routes = [moe.gate(hidden) for hidden in inputs]
    found = []
    for place, units in enumerate(all_units(moe)):
        expert = place - (moe.spec.shared is not None)
        total = torch.zeros(units.up.shape[0], dtype=torch.float64, device=units.up.device)
        for hidden, (choice, weight) in zip(inputs, routes, strict=True):
            token, rank = (choice == expert).nonzero(as_tuple=True)
            own = hidden if expert < 0 else hidden[token]
            share = _shared_weight(moe, hidden) if expert < 0 else weight[token, rank, None]
            read = activations(units, own, moe) * share.to(own.dtype)
            total += read.double().square().sum(0)
        found.append(total * units.down.double().square().sum(0))
    return torch.cat(found)


def activations(units: Units, hidden: Tensor, moe: MoE) -> Tensor:
    """hidden (T, H) → the activations (T, U) of units."""
    up = F.linear(hidden, units.up, units.up_bias)
    gate = None if units.gate is None else F.linear(hidden, units.gate, units.gate_bias)
    return activate(up, gate, moe.spec.expert.activation)


def all_units(moe: MoE) -> Iterator[Units]:
    """The units of the shared expert, if there is one, then of each routed expert, on the hidden size.

    With a latent space, its projections are multiplied into the weights. The bias of the second one is left out.
    """
    if moe.spec.shared is not None:
        shared = moe.shared_experts
        gate = None
        gate_bias = None
        if moe.spec.shared.gated:
            gate = shared.gate_proj.weight * moe.spec.shared.gate_factor
            bias = shared.gate_proj.bias
            gate_bias = None if bias is None else bias * moe.spec.shared.gate_factor
        yield Units(gate, shared.up_proj.weight, gate_bias, shared.up_proj.bias, shared.down_proj.weight)
    latent = moe.spec.latent is not None
    into = moe.fc1_latent_proj if latent else None
    for expert in range(moe.spec.experts):
        down = moe.experts.down_proj[expert]
        gate, gate_bias = _rows(moe.experts.gate_proj[expert], into) if moe.experts.gated else (None, None)
        up, up_bias = _rows(moe.experts.up_proj[expert], into)
        yield Units(gate, up, gate_bias, up_bias, moe.fc2_latent_proj.weight @ down if latent else down)


def picked(moe: MoE, places: Tensor) -> Units:
    """The units at these places of all units, in this order. Only one expert's units are made at a time."""
    found: list[tuple[Tensor, Units]] = []
    first = 0
    for units in all_units(moe):
        count = units.up.shape[0]
        at = ((places >= first) & (places < first + count)).nonzero()[:, 0]
        found.append((at, units.pick(places[at] - first)))
        first += count
    order = torch.cat([at for at, _ in found]).argsort()
    rows = [[getattr(units, name) for _, units in found] for name in ("gate", "up", "gate_bias", "up_bias")]
    gate, up, gate_bias, up_bias = (_joined(parts, [len(at) for at, _ in found], order) for parts in rows)
    assert up is not None
    return Units(gate, up, gate_bias, up_bias, torch.cat([units.down for _, units in found], 1)[:, order])


def mlp_of(units: Units, spec: MLPSpec) -> MLP:
    """An MLP whose units these are, with a bias of 0 where they have none."""
    hidden = units.up.shape[1]
    with torch.device(units.up.device):
        mlp = MLP(spec, hidden).to(units.up.dtype)
    weights: list[tuple[Linear, Tensor, Tensor | None]] = [
        (mlp.up_proj, units.up, units.up_bias),
        (mlp.down_proj, units.down, None),
    ]
    if units.gate is not None:
        weights.append((mlp.gate_proj, units.gate / spec.gate_factor, units.gate_bias))
    for module, weight, bias in weights:
        module.weight.copy_(weight)
        if module.bias is not None:
            module.bias.zero_()
            if bias is not None:
                module.bias.copy_(bias)
    return mlp


def fitted(moe: MoE, mlp: MLP, inputs: Iterable[Tensor]) -> MLP:
    """The MLP with output weights, and their bias, that ridge regression fits to the MoE layer's output, in float64."""
    width, hidden = mlp.spec.width, mlp.up_proj.weight.shape[1]
    size = width + mlp.spec.bias  # the bias is the weight of a column of ones, which has no penalty
    device = mlp.up_proj.weight.device
    moments = torch.zeros(size, size, dtype=torch.float64, device=device)
    targets = torch.zeros(size, hidden, dtype=torch.float64, device=device)
    for x in inputs:
        gate = mlp.gate_proj(x) * mlp.spec.gate_factor if mlp.spec.gated else None
        read = activate(mlp.up_proj(x), gate, mlp.spec.activation).double()
        read = torch.cat([read, torch.ones_like(read[:, :1])], 1) if mlp.spec.bias else read
        moments += read.T @ read
        targets += read.T @ moe(x).double()
    penalty = torch.full((size,), RIDGE * float(moments.diagonal()[:width].mean()), dtype=torch.float64, device=device)
    penalty[width:] = 0
    weights = torch.linalg.solve(moments + penalty.diag(), targets)
    mlp.down_proj.weight.copy_(weights[:width].T)
    if mlp.down_proj.bias is not None:
        mlp.down_proj.bias.copy_(weights[width])
    return mlp


def _rows(matrix: Tensor, into: Linear | None) -> tuple[Tensor, Tensor | None]:
    """A matrix of an expert over the hidden size, and its bias. into: the projection into the latent space."""
    if into is None:
        return matrix, None
    return matrix @ into.weight, None if into.bias is None else matrix @ into.bias


def _shared_weight(moe: MoE, hidden: Tensor) -> Tensor:
    if moe.spec.shared_gate:
        return torch.sigmoid(moe.shared_expert_gate(hidden))
    return hidden.new_ones(len(hidden), 1)


def _joined(parts: list[Tensor | None], counts: list[int], order: Tensor) -> Tensor | None:
    """Parts of some units each, in the order of the units; None if all are. A part that is None is 0."""
    like = next((part for part in parts if part is not None), None)
    if like is None:
        return None
    whole = [
        like.new_zeros(count, *like.shape[1:]) if part is None else part
        for part, count in zip(parts, counts, strict=True)
    ]
    return torch.cat(whole)[order]
