"""The Mamba-2 mixer. A pass of up to `chunk_size` tokens is one matrix-form chunk, a longer one a chunked scan."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from twotower.cache.layer_cache import MambaCache
from twotower.config import BackboneConfig
from twotower.model.layer_io import AttentionMetadata
from twotower.model.linear import Linear
from twotower.model.norm import GatedGroupRMSNorm
from twotower.ops.reference.mamba_block import MambaStepInputs, MambaWeights, convolve, gate_and_norm, split
from twotower.ops.reference.ssd import final_state, pass_states, ssd_block, ssd_chunked
from twotower.ops.registry import select


class CausalConv(nn.Module):
    """Holder of `conv1d.{weight,bias}` in the released shape (C, 1, K)."""

    def __init__(self, channels: int, taps: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, taps))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None


class Mamba2(nn.Module):
    """in_proj → z | xBC | dt; causal conv and SiLU over xBC; selective scan; gated group norm; out_proj."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        inner, heads = config.mamba_inner, config.mamba_num_heads
        self.in_proj = Linear(config.hidden_size, inner + config.conv_dim + heads, bias=config.use_bias)
        self.conv1d = CausalConv(config.conv_dim, config.conv_kernel, config.use_conv_bias)
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.A_log = nn.Parameter(torch.empty(heads))
        self.D = nn.Parameter(torch.ones(heads))
        self.norm = GatedGroupRMSNorm(inner)
        self.out_proj = Linear(inner, config.hidden_size, bias=config.use_bias)

    def reset_parameters(self) -> None:
        """Mamba-2's own initialisation: decay rates 1…16, time steps log-uniform in [time_step_min, time_step_max]."""
        config = self.config
        nn.init.kaiming_uniform_(self.conv1d.weight, a=math.sqrt(5))
        with torch.no_grad():
            rates = torch.linspace(1, 16, config.mamba_num_heads)
            self.A_log.copy_(rates.log())
            low, high = math.log(config.time_step_min), math.log(config.time_step_max)
            steps = torch.exp(torch.rand(config.mamba_num_heads) * (high - low) + low).clamp(config.time_step_floor)
            self.dt_bias.copy_(steps + torch.log(-torch.expm1(-steps)))  # inverse of softplus

    def forward(
        self, hidden: Tensor, past: MambaCache | None, meta: AttentionMetadata, trace: bool = True
    ) -> tuple[Tensor, MambaStepInputs | None]:
        """hidden (B, L, H) → output (B, L, H) and, if wanted, the trace the state after any prefix is rebuilt from."""
        projected, weights = self.in_proj(hidden), self.weights
        window, state = (None, None) if past is None else past
        if hidden.shape[1] <= self.config.chunk_size:
            block = select("mamba_block", projected.device, projected.dtype).function
            mixed, kept = block(projected, meta.valid, window, state, weights, trace)
            return self.out_proj(mixed), kept
        z, xBC, dt, log_decay = split(projected, meta.valid, weights)
        kept, C = convolve(xBC, window, dt, log_decay, weights)
        y, _ = ssd_chunked(kept.x, kept.dt, kept.log_decay, kept.B, C, state, self.config.chunk_size)
        return self.out_proj(gate_and_norm(y, kept.x, z, weights)), kept if trace else None

    def forward_packed(
        self, hidden: Tensor, valid: Tensor, starts_document: Tensor, windows: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, MambaCache]:
        """Packed rows from zero state, and the past before each of their blocks (training's context pass).

        hidden (B, S, H); valid (B, S); starts_document (B, blocks): blocks that start from zero state;
        windows: raw convolution inputs (B, S, C) → those before each block (B, blocks, K−1, C). Returns the output
        (B, S, H) and a `MambaCache` of B·blocks rows.
        """
        weights = self.weights
        z, xBC, dt, log_decay = split(self.in_proj(hidden), valid, weights)
        blocks = starts_document.shape[1]
        window = windows(xBC).flatten(0, 1)
        folded = [v.unflatten(1, (blocks, -1)).flatten(0, 1) for v in (xBC, dt, log_decay)]
        xBC, dt, log_decay = folded
        trace, C = convolve(xBC, window, dt, log_decay, weights)
        added = final_state(trace.x, trace.dt, trace.log_decay, trace.B, None).unflatten(0, (-1, blocks))
        before = pass_states(added, trace.log_decay.sum(1).unflatten(0, (-1, blocks)), None, starts_document).flatten(
            0, 1
        )
        y = ssd_block(trace.x, trace.dt, trace.log_decay, trace.B, C, before)
        z = z.unflatten(1, (blocks, -1)).flatten(0, 1)
        return self.out_proj(gate_and_norm(y, trace.x, z, weights)).view_as(hidden), MambaCache(window, before)

    @property
    def weights(self) -> MambaWeights:
        """All but the projections, as the kernels take it."""
        config, conv = self.config, self.conv1d
        return MambaWeights(
            conv.weight,
            conv.bias,
            self.dt_bias,
            self.A_log,
            self.D,
            self.norm.weight,
            config.n_groups,
            config.layer_norm_epsilon,
            config.time_step_limit,
        )
