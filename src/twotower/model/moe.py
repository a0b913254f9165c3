"""Feed-forward mixers: the MLP and the mixture of experts, with or without a gate."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from twotower.model.layer_io import AttentionMetadata
from twotower.model.linear import Linear, linears
from twotower.ops.cpu.packed_weights import PackedWeight
from twotower.ops.reference import int4, int8
from twotower.ops.reference.experts import Packed
from twotower.ops.reference.routing import Routing
from twotower.ops.registry import few_pairs, select
from twotower.specs import MLPSpec, MoESpec


class MLP(nn.Module):
    """down(act(up·x)), or with a gate down(act(gate·x · gate_factor) · up·x)."""

    __call__: Callable[..., Tensor]

    def __init__(self, spec: MLPSpec, hidden: int) -> None:
        super().__init__()
        self.spec = spec
        if spec.gated:
            self.gate_proj = Linear(hidden, spec.width, bias=spec.bias)
        self.up_proj = Linear(hidden, spec.width, bias=spec.bias)
        self.down_proj = Linear(spec.width, hidden, bias=spec.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        up, *gates = linears(hidden, self.up_proj, *([self.gate_proj] if self.spec.gated else []))
        gate = gates[0] if gates else None
        if gate is not None and self.spec.gate_factor != 1.0:
            gate = gate * self.spec.gate_factor
        backend = select("activate", up.device, up.dtype)
        return self.down_proj(backend.function(up, gate, self.spec.activation))


class Router(nn.Module):
    """Selects experts by scores. A correction bias changes the selection, not the weights of the experts."""

    e_score_correction_bias: Tensor | None

    def __init__(self, spec: MoESpec, hidden: int) -> None:
        super().__init__()
        self.rule = Routing(
            spec.num_groups, spec.top_groups, spec.top_k, spec.normalise, spec.factor, scores=spec.scores
        )
        self.weight = nn.Parameter(torch.empty(spec.experts, hidden))
        self.register_buffer("e_score_correction_bias", torch.zeros(spec.experts) if spec.correction_bias else None)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """hidden (T, H) → expert ids (T, k) and expert weights (T, k); scores in at least fp32."""
        backend = select("route", hidden.device, hidden.dtype)
        choice: tuple[Tensor, Tensor] = backend.function(hidden, self.weight, self.e_score_correction_bias, self.rule)
        return choice


class Experts(nn.Module):
    """The routed experts, with stacked weights in memory. On disk each expert may have its own tensors.

    gate_proj: None for experts without a gate.
    """

    def __init__(self, spec: MoESpec, hidden: int) -> None:
        super().__init__()
        self.activation, self.gated = spec.expert.activation, spec.expert.gated
        shape = (spec.experts, spec.expert.width, hidden)
        if self.gated:
            self.gate_proj = nn.Parameter(torch.empty(shape))
            self.packed_gate = PackedWeight()
        self.up_proj = nn.Parameter(torch.empty(shape))
        self.down_proj = nn.Parameter(torch.empty(shape[0], shape[2], shape[1]))
        self.packed_up, self.packed_down = PackedWeight(), PackedWeight()  # as in `Linear`

    def forward(self, hidden: Tensor, choice: Tensor, weight: Tensor) -> Tensor:
        few = few_pairs(hidden, choice, self.up_proj.shape[1])
        backend = select("experts", hidden.device, hidden.dtype, few=few)
        weights = self.gate_proj if self.gated else None, self.up_proj, self.down_proj
        out: Tensor = backend.function(hidden, choice, weight, *weights, self.activation, self._packed())
        return out

    def _packed(self) -> Packed:
        gate = self.packed_gate.get(self.gate_proj) if self.gated else None
        return gate, self.packed_up.get(self.up_proj), self.packed_down.get(self.down_proj)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Experts:
        super()._apply(fn, recurse)
        self._packed()  # as in `Linear`
        return self


class Int8Experts(nn.Module):
    """`Experts` with int8 stacked weights and a scale (E, out) per row; see `ops.reference.int8`.

    int8_activations: as in `Int8Linear`.
    """

    gate_proj: Tensor
    gate_proj_scale: Tensor
    up_proj: Tensor
    up_proj_scale: Tensor
    down_proj: Tensor
    down_proj_scale: Tensor

    def __init__(self, experts: Experts, int8_activations: bool = False) -> None:
        super().__init__()
        self.int8_activations = int8_activations
        self.activation, self.gated = experts.activation, experts.gated
        for name in ("gate_proj", "up_proj", "down_proj")[not self.gated :]:
            weight, scale = int8.quantize(getattr(experts, name))
            self.register_buffer(name, weight)
            self.register_buffer(f"{name}_scale", scale)

    def forward(self, hidden: Tensor, choice: Tensor, weight: Tensor) -> Tensor:
        gate = (self.gate_proj, self.gate_proj_scale) if self.gated else None
        up, down = (self.up_proj, self.up_proj_scale), (self.down_proj, self.down_proj_scale)
        backend = select("experts_w8a8" if self.int8_activations else "experts_int8", hidden.device, hidden.dtype)
        out: Tensor = backend.function(hidden, choice, weight, gate, up, down, self.activation)
        return out


class Int4Experts(nn.Module):
    """`Experts` with int4 stacked weights; see `ops.reference.int4`. shapes: of the weights that they stand for.

    int8_activations: as in `Int8Linear`.
    """

    gate_proj: Tensor
    up_proj: Tensor
    down_proj: Tensor

    def __init__(self, experts: Experts, int8_activations: bool = False) -> None:
        super().__init__()
        self.int8_activations = int8_activations
        self.activation, self.gated = experts.activation, experts.gated
        names = ("gate_proj", "up_proj", "down_proj")[not self.gated :]
        self.shapes = {name: tuple(getattr(experts, name).shape) for name in names}
        for name in names:
            self.register_buffer(name, int4.quantize(getattr(experts, name)))

    def forward(self, hidden: Tensor, choice: Tensor, weight: Tensor) -> Tensor:
        backend = select("experts_w4a8" if self.int8_activations else "experts_int4", hidden.device, hidden.dtype)
        gate, width = self.gate_proj if self.gated else None, self.shapes["up_proj"][1]
        data = gate, self.up_proj, self.down_proj
        out: Tensor = backend.function(hidden, choice, weight, *data, width, self.activation)
        return out


class MoE(nn.Module):
    """Routed experts plus an optional shared expert.

    With `latent`, the routed experts read and write a narrower space, between two linear layers.
    """

    def __init__(self, spec: MoESpec, hidden: int) -> None:
        super().__init__()
        self.spec = spec
        self.gate = Router(spec, hidden)
        self.experts = Experts(spec, spec.latent or hidden)
        if spec.latent is not None:
            self.fc1_latent_proj = Linear(hidden, spec.latent, bias=spec.latent_bias)
            self.fc2_latent_proj = Linear(spec.latent, hidden, bias=spec.latent_bias)
        if spec.shared is not None:
            self.shared_experts = MLP(spec.shared, hidden)
        if spec.shared_gate:
            self.shared_expert_gate = Linear(hidden, 1, bias=False)

    def forward(self, hidden: Tensor, meta: AttentionMetadata | None = None) -> Tensor:
        """hidden (…, H) → (…, H). meta: the padding of the pass, so that padding loads no extra experts."""
        flat = hidden.flatten(0, -2)
        choice, weight = self.gate(flat)
        if meta is not None:
            choice = meta.route_padding(choice)
        latent = self.spec.latent is not None
        routed: Tensor = self.experts(self.fc1_latent_proj(flat) if latent else flat, choice, weight)
        out = (self.fc2_latent_proj(routed) if latent else routed).view_as(hidden)
        if self.spec.shared is None:
            return out
        shared = self.shared_experts(hidden)
        return out + (shared * torch.sigmoid(self.shared_expert_gate(hidden)) if self.spec.shared_gate else shared)
