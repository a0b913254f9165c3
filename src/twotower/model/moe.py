"""Feed-forward mixers: the MLP and the mixture of experts, both down(relu(up·x)²)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twotower.config import BackboneConfig
from twotower.model.layer_io import AttentionMetadata
from twotower.model.linear import Linear
from twotower.ops.cpu.packed_weights import PackedWeight
from twotower.ops.reference import int8
from twotower.ops.reference.experts import PackedPair
from twotower.ops.reference.routing import Routing
from twotower.ops.registry import select


class MLP(nn.Module):
    """down(relu(up·x)²), without a gate."""

    __call__: Callable[..., Tensor]

    def __init__(self, hidden: int, intermediate: int, bias: bool) -> None:
        super().__init__()
        self.up_proj = Linear(hidden, intermediate, bias=bias)
        self.down_proj = Linear(intermediate, hidden, bias=bias)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(F.relu(self.up_proj(hidden)).square())


class Router(nn.Module):
    """Selects experts by sigmoid scores. The correction bias changes the selection, not the weights of the experts."""

    e_score_correction_bias: Tensor

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        self.rule = Routing(
            config.n_group,
            config.topk_group,
            config.num_experts_per_tok,
            config.norm_topk_prob,
            config.routed_scaling_factor,
        )
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts))

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """hidden (T, H) → expert ids (T, k) and expert weights (T, k); scores in at least fp32."""
        backend = select("route", hidden.device, hidden.dtype)
        choice: tuple[Tensor, Tensor] = backend.function(hidden, self.weight, self.e_score_correction_bias, self.rule)
        return choice


class Experts(nn.Module):
    """The routed experts, with stacked weights in memory. On disk each expert has its own tensors."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        shape = (config.n_routed_experts, config.moe_intermediate_size, config.hidden_size)
        self.up_proj = nn.Parameter(torch.empty(shape))
        self.down_proj = nn.Parameter(torch.empty(shape[0], shape[2], shape[1]))
        self.packed_up, self.packed_down = PackedWeight(), PackedWeight()  # as in `Linear`

    def forward(self, hidden: Tensor, choice: Tensor, weight: Tensor) -> Tensor:
        backend = select("experts", hidden.device, hidden.dtype)
        out: Tensor = backend.function(hidden, choice, weight, self.up_proj, self.down_proj, self._packed())
        return out

    def _packed(self) -> PackedPair:
        return self.packed_up.get(self.up_proj), self.packed_down.get(self.down_proj)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Experts:
        super()._apply(fn, recurse)
        self._packed()  # as in `Linear`
        return self


class Int8Experts(nn.Module):
    """`Experts` with int8 stacked weights and a scale (E, out) per row; see `ops.reference.int8`."""

    up_proj: Tensor
    up_proj_scale: Tensor
    down_proj: Tensor
    down_proj_scale: Tensor

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        for name in ("up_proj", "down_proj"):
            weight, scale = int8.quantize(getattr(experts, name))
            self.register_buffer(name, weight)
            self.register_buffer(f"{name}_scale", scale)

    def forward(self, hidden: Tensor, choice: Tensor, weight: Tensor) -> Tensor:
        backend = select("experts_int8", hidden.device, hidden.dtype)
        both = self.up_proj, self.up_proj_scale, self.down_proj, self.down_proj_scale
        out: Tensor = backend.function(hidden, choice, weight, *both)
        return out


class MoE(nn.Module):
    """Routed experts plus one shared expert."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        self.shared_experts = MLP(config.hidden_size, config.moe_shared_expert_intermediate_size, config.mlp_bias)

    def forward(self, hidden: Tensor, meta: AttentionMetadata | None = None) -> Tensor:
        """hidden (…, H) → (…, H). meta: the padding of the pass, so that padding loads no extra experts."""
        flat = hidden.flatten(0, -2)
        choice, weight = self.gate(flat)
        if meta is not None:
            choice = meta.route_padding(choice)
        routed: Tensor = self.experts(flat, choice, weight).view_as(hidden)
        return routed + self.shared_experts(hidden)
