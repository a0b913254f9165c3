"""The Mamba-2 mixer: one matrix-form chunk for up to `chunk_size` tokens, a chunked scan for longer passes."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from twotower.cache.layer_cache import MambaCache
from twotower.model.layer_io import AttentionMetadata
from twotower.model.linear import Linear
from twotower.model.norm import GatedGroupRMSNorm
from twotower.ops.compiled import maybe_compiled
from twotower.ops.reference.mamba_block import (
    MambaStepInputs,
    MambaWeights,
    convolve,
    gate_and_norm,
    scan_blocks,
    split,
)
from twotower.ops.reference.ssd import ssd_chunked
from twotower.ops.registry import select
from twotower.specs import Mamba2Spec, TowerSpec


class CausalConv(nn.Module):
    """Holds `conv1d.{weight,bias}` in the released shape (C, 1, K)."""

    def __init__(self, channels: int, taps: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, taps))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None


class Mamba2(nn.Module):
    """in_proj → z | xBC | dt; causal conv and SiLU over xBC; selective scan; gated group norm; out_proj."""

    def __init__(self, spec: Mamba2Spec, tower: TowerSpec) -> None:
        super().__init__()
        self.spec, self.eps = spec, tower.norm_eps
        inner, heads = spec.inner, spec.num_heads
        self.in_proj = Linear(tower.hidden_size, inner + spec.conv_dim + heads, bias=spec.input_bias)
        self.conv1d = CausalConv(spec.conv_dim, spec.conv_kernel, spec.conv_bias)
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.A_log = nn.Parameter(torch.empty(heads))
        self.D = nn.Parameter(torch.ones(heads))
        self.norm = None if spec.norm == "none" else GatedGroupRMSNorm(inner)
        self.out_proj = Linear(inner, tower.hidden_size, bias=spec.output_bias)

    def project(self, hidden: Tensor) -> Tensor:
        """hidden (B, L, H) → z | xBC | dt (B, L, …), times the factors."""
        projected = self.in_proj(hidden)
        spec = self.spec
        if spec.factors is None:
            return projected
        bc = spec.num_groups * spec.state_size
        parts = projected.split([spec.inner, spec.inner, bc, bc, spec.num_heads], dim=-1)
        return torch.cat([part * factor for part, factor in zip(parts, spec.factors, strict=True)], dim=-1)

    def reset_parameters(self) -> None:
        """The initialisation of Mamba-2: decay rates 1…16, log-uniform time steps (`time_step_init`)."""
        low, high, floor = self.spec.time_step_init
        nn.init.kaiming_uniform_(self.conv1d.weight, a=math.sqrt(5))
        with torch.no_grad():
            rates = torch.linspace(1, 16, self.spec.num_heads)
            self.A_log.copy_(rates.log())
            low, high = math.log(low), math.log(high)
            steps = torch.exp(torch.rand(self.spec.num_heads) * (high - low) + low).clamp(floor)
            self.dt_bias.copy_(steps + torch.log(-torch.expm1(-steps)))  # inverse of softplus

    def forward(
        self, hidden: Tensor, past: MambaCache | None, meta: AttentionMetadata, keep_step_inputs: bool = True
    ) -> tuple[Tensor, MambaStepInputs | None]:
        """hidden (B, L, H) → output (B, L, H), and the step inputs if `keep_step_inputs`.

        The state after any prefix of the pass can be computed from the step inputs.
        """
        projected, weights = self.project(hidden), self.weights
        if hidden.shape[1] <= self.spec.chunk_size:
            backend = select("mamba_block", projected.device, projected.dtype)
            block = backend.function if backend.compiled else maybe_compiled(backend.function)
            window, state, slots = (None, None, None) if past is None else past
            mixed, kept = block(projected, meta.token_mask, window, state, weights, keep_step_inputs, slots)
            return self.out_proj(mixed), kept
        window, state = (None, None) if past is None else past.gathered()
        z, xBC, dt, log_decay = split(projected, meta.token_mask, weights)
        kept, C = convolve(xBC, window, dt, log_decay, weights)
        y, _ = ssd_chunked(kept.x, kept.dt, kept.log_decay, kept.B, C, state, self.spec.chunk_size)
        return self.out_proj(gate_and_norm(y, kept.x, z, weights)), kept if keep_step_inputs else None

    def forward_packed(
        self, hidden: Tensor, token_mask: Tensor, starts_document: Tensor, windows: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, MambaCache]:
        """The context pass of training over packed rows, which also returns the state before each block.

        hidden: (B, S, H). token_mask: (B, S). starts_document: (B, blocks), the blocks that start from zero state.
        windows: maps raw convolution inputs (B, S, C) to those before each block (B, blocks, K−1, C).
        Returns the output (B, S, H) and a `MambaCache` of B·blocks rows.
        """
        weights = self.weights
        parts = maybe_compiled(split)(self.project(hidden), token_mask, weights)
        window = windows(parts[1]).flatten(0, 1)
        mixed, before = maybe_compiled(scan_blocks)(*parts, window, starts_document, weights)
        return self.out_proj(mixed).view_as(hidden), MambaCache(window, before)

    @property
    def weights(self) -> MambaWeights:
        """The weights without the projections, as the kernels take them."""
        spec, conv = self.spec, self.conv1d
        return MambaWeights(
            conv.weight,
            conv.bias,
            self.dt_bias,
            self.A_log,
            self.D,
            None if self.norm is None else self.norm.weight,
            spec.num_groups,
            spec.head_dim,
            self.eps,
            spec.time_step_limit,
            spec.norm,
        )
