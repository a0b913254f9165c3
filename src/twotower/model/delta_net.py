"""The gated DeltaNet mixer. Its caches and step inputs are those of Mamba-2 (see `ops.reference.delta_rule`)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twotower.cache.layer_cache import MambaCache
from twotower.model.layer_io import AttentionMetadata
from twotower.model.linear import Linear, linears
from twotower.model.mamba2 import CausalConv
from twotower.model.norm import GatedGroupRMSNorm
from twotower.ops.precision import accumulation_dtype
from twotower.ops.reference.conv import causal_conv
from twotower.ops.reference.delta_rule import DeltaInputs, delta_rule, packed_states
from twotower.ops.reference.mamba_block import MambaStepInputs, group_norm
from twotower.ops.reference.ssd import ssd_block
from twotower.specs import DeltaNetSpec, TowerSpec

L2_EPS = 1e-6  # of the norms of queries and keys


class Projected(NamedTuple):
    """The projections of a pass: qkv (B, L, C) before the convolution, z (B, L, H·P), and b and a (B, L, H)."""

    qkv: Tensor
    z: Tensor
    b: Tensor
    a: Tensor


class GatedDeltaNet(nn.Module):
    """Projections → q | k | v, z, b, a; causal conv and SiLU over q | k | v; delta rule; gated norm; out_proj."""

    def __init__(self, spec: DeltaNetSpec, tower: TowerSpec) -> None:
        super().__init__()
        self.spec, self.eps = spec, tower.norm_eps
        hidden, inner, heads = tower.hidden_size, spec.inner, spec.num_heads
        if spec.grouped_projections:
            self.in_proj_qkvz = Linear(hidden, spec.conv_dim + inner, bias=False)
            self.in_proj_ba = Linear(hidden, 2 * heads, bias=False)
        else:
            self.in_proj_qkv = Linear(hidden, spec.conv_dim, bias=False)
            self.in_proj_z = Linear(hidden, inner, bias=False)
            self.in_proj_b, self.in_proj_a = (Linear(hidden, heads, bias=False) for _ in "ba")
        self.conv1d = CausalConv(spec.conv_dim, spec.conv_kernel, bias=False)
        self.dt_bias = nn.Parameter(torch.ones(heads))
        self.A_log = nn.Parameter(torch.empty(heads))
        self.norm = GatedGroupRMSNorm(spec.head_dim)
        self.out_proj = Linear(inner, hidden, bias=False)

    def reset_parameters(self) -> None:
        """The initialisation of Qwen3-Next: decay rates up to 16, steps near 1."""
        nn.init.kaiming_uniform_(self.conv1d.weight, a=math.sqrt(5))
        nn.init.ones_(self.dt_bias)
        with torch.no_grad():
            self.A_log.uniform_(0.01, 16).log_()

    def project(self, hidden: Tensor, token_mask: Tensor | None) -> Projected:
        """hidden (B, L, H) → the projections; the inputs of the convolution are 0 at padding."""
        if self.spec.grouped_projections:
            qkv, z, b, a = self._ungroup(*linears(hidden, self.in_proj_qkvz, self.in_proj_ba))
        else:
            modules = (self.in_proj_qkv, self.in_proj_z, self.in_proj_b, self.in_proj_a)
            qkv, z, b, a = linears(hidden, *modules)
        return Projected(qkv if token_mask is None else qkv * token_mask[..., None], z, b, a)

    def _ungroup(self, qkvz: Tensor, ba: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Projections whose parts are ordered by key head → parts ordered by kind."""
        spec = self.spec
        each = spec.num_heads // spec.num_groups
        sizes = [spec.state_size, spec.state_size, each * spec.head_dim, each * spec.head_dim]
        q, k, v, z = qkvz.unflatten(-1, (spec.num_groups, -1)).split(sizes, dim=-1)
        b, a = ba.unflatten(-1, (spec.num_groups, -1)).split([each, each], dim=-1)
        return torch.cat([part.flatten(-2) for part in (q, k, v)], -1), z.flatten(-2), b.flatten(-2), a.flatten(-2)

    def recurrence(self, projected: Projected, window: Tensor | None, token_mask: Tensor | None) -> DeltaInputs:
        """Convolution, norms and gates → the inputs of the delta rule."""
        spec = self.spec
        acc = accumulation_dtype(projected.qkv.dtype)
        active = F.silu(causal_conv(projected.qkv, window, self.conv1d.weight, None))
        keys = spec.num_groups * spec.state_size
        q, k, v = active.split([keys, keys, spec.inner], dim=-1)
        q, k = (_unit(part.unflatten(-1, (spec.num_groups, spec.state_size))) for part in (q, k))
        log_decay = -self.A_log.to(acc).exp() * F.softplus(projected.a.to(acc) + self.dt_bias.to(acc))
        beta, dt = torch.sigmoid(projected.b.to(acc)), torch.ones_like(log_decay)
        if token_mask is not None:
            beta, log_decay, dt = (part * token_mask[..., None] for part in (beta, log_decay, dt))
        v = v.unflatten(-1, (spec.num_heads, spec.head_dim))
        return DeltaInputs(q * spec.state_size**-0.5, k, v, beta, log_decay, dt)

    def output(self, y: Tensor, z: Tensor) -> Tensor:
        """y (B, L, H, P), z (B, L, H·P) → the norm of each head, times SiLU(z), through out_proj (B, L, H)."""
        acc = y.dtype
        weight = self.norm.weight.repeat(self.spec.num_heads)
        normed = group_norm(y.flatten(2), weight, self.spec.num_heads, self.eps)
        return self.out_proj((normed * F.silu(z.to(acc))).to(z.dtype))

    def forward(
        self, hidden: Tensor, past: MambaCache | None, meta: AttentionMetadata, keep_step_inputs: bool = True
    ) -> tuple[Tensor, MambaStepInputs | None]:
        """As `Mamba2.forward`."""
        window, state = (None, None) if past is None else past.gathered()
        projected = self.project(hidden, meta.token_mask)
        inputs = self.recurrence(projected, window, meta.token_mask)
        y, written = delta_rule(inputs, state, self.spec.chunk_size)
        out = self.output(y, projected.z)
        if not keep_step_inputs:
            return out, None
        return out, MambaStepInputs(projected.qkv, written, inputs.dt, inputs.log_decay, inputs.k)

    def forward_packed(
        self, hidden: Tensor, token_mask: Tensor, starts_document: Tensor, windows: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, MambaCache]:
        """As `Mamba2.forward_packed`; the states before the blocks are computed one after another."""
        projected = self.project(hidden, token_mask)
        blocks = starts_document.shape[1]
        window = windows(projected.qkv).flatten(0, 1)
        in_blocks = Projected(*(part.unflatten(1, (blocks, -1)).flatten(0, 1) for part in projected))
        inputs = self.recurrence(in_blocks, window, token_mask.unflatten(1, (blocks, -1)).flatten(0, 1))
        before, written = packed_states(inputs, starts_document, self.spec.chunk_size)
        y = ssd_block(written, inputs.dt, inputs.log_decay, inputs.k, inputs.q, before)
        return self.output(y, in_blocks.z).view_as(hidden), MambaCache(window, before)


def _unit(x: Tensor) -> Tensor:
    """Vectors of length 1 along the last dimension."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_EPS)
