"""The Mamba-2 mixer. A pass of up to `chunk_size` tokens is one matrix-form chunk, a longer one a chunked scan."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twotower.config import BackboneConfig
from twotower.kernels.conv import causal_conv
from twotower.kernels.precision import accumulation_dtype
from twotower.kernels.ssd import advance, ssd_block, ssd_chunked, states_before
from twotower.model.coupling import MambaPast, MambaTrace, Visibility
from twotower.model.linear import Linear
from twotower.model.norm import GatedGroupRMSNorm


class CausalConv(nn.Module):
    """Holder of `conv1d.{weight,bias}` in the released shape (C, 1, K)."""

    def __init__(self, channels: int, taps: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, taps))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None

    def forward(self, x: Tensor, window: Tensor | None) -> Tensor:
        return causal_conv(x, window, self.weight, self.bias)


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
        self.norm = GatedGroupRMSNorm(inner, config.n_groups, config.layer_norm_epsilon)
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

    def forward(self, hidden: Tensor, past: MambaPast | None, sees: Visibility) -> tuple[Tensor, MambaTrace]:
        """hidden (B, L, H) → output (B, L, H) and the trace the state after any prefix is rebuilt from."""
        z, xBC, dt, log_decay = self._project(hidden, sees.valid)
        trace, C = self._convolve(xBC, None if past is None else past.conv_window, dt, log_decay)
        state = None if past is None else past.ssm_state
        if hidden.shape[1] <= self.config.chunk_size:
            y = ssd_block(trace.x, trace.dt, trace.log_decay, trace.B, C, state)
        else:
            y, _ = ssd_chunked(trace.x, trace.dt, trace.log_decay, trace.B, C, state, self.config.chunk_size)
        return self._output(y, trace.x, z), trace

    def forward_packed(
        self, hidden: Tensor, valid: Tensor, fresh: Tensor, windows: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, MambaPast]:
        """Packed rows from zero state, and the past before each of their blocks (training's context pass).

        hidden (B, S, H); valid (B, S); fresh (B, blocks): blocks that start from zero state; windows: raw convolution
        inputs (B, S, C) → those before each block (B, blocks, K−1, C) → output (B, S, H), `MambaPast` of B·blocks rows.
        """
        z, xBC, dt, log_decay = self._project(hidden, valid)
        blocks = fresh.shape[1]
        window = windows(xBC).flatten(0, 1)
        folded = [v.unflatten(1, (blocks, -1)).flatten(0, 1) for v in (xBC, dt, log_decay)]
        trace, C = self._convolve(folded[0], window, *folded[1:])
        added = advance(trace.x, trace.dt, trace.log_decay, trace.B, None).unflatten(0, (-1, blocks))
        before = states_before(added, trace.log_decay.sum(1).unflatten(0, (-1, blocks)), None, fresh).flatten(0, 1)
        y = ssd_block(trace.x, trace.dt, trace.log_decay, trace.B, C, before)
        z = z.unflatten(1, (blocks, -1)).flatten(0, 1)
        return self._output(y, trace.x, z).view_as(hidden), MambaPast(window, before)

    def _project(self, hidden: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """hidden (B, L, H) → z, xBC before the convolution, dt and log_decay; padding leaves no mark on any state:
        no input to the convolution, and no time passes."""
        config = self.config
        acc = accumulation_dtype(hidden.dtype)
        z, xBC, dt = self.in_proj(hidden).split([config.mamba_inner, config.conv_dim, config.mamba_num_heads], dim=-1)
        dt = F.softplus(dt.to(acc) + self.dt_bias.to(acc)).clamp(*config.time_step_limit)
        if valid is not None:
            xBC = xBC * valid[..., None]
            dt = dt * valid[..., None]
        return z, xBC, dt, dt * -self.A_log.to(acc).exp()

    def _convolve(self, xBC: Tensor, window: Tensor | None, dt: Tensor, log_decay: Tensor) -> tuple[MambaTrace, Tensor]:
        """→ the trace (x, B and what they came from) and C."""
        config = self.config
        active = F.silu(self.conv1d(xBC, window))
        bc = config.n_groups * config.ssm_state_size
        x, B, C = active.split([config.mamba_inner, bc, bc], dim=-1)
        x = x.unflatten(-1, (config.mamba_num_heads, config.mamba_head_dim))
        B, C = (v.unflatten(-1, (config.n_groups, config.ssm_state_size)) for v in (B, C))
        return MambaTrace(xBC, x, dt, log_decay, B), C

    def _output(self, y: Tensor, x: Tensor, z: Tensor) -> Tensor:
        y = y + x * self.D.to(x.dtype)[:, None]
        return self.out_proj(self.norm(y.flatten(2), z))
