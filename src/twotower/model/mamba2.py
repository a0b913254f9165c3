"""The Mamba-2 mixer. A pass of up to `chunk_size` tokens is one matrix-form chunk, a longer one a chunked scan."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twotower.config import BackboneConfig
from twotower.kernels.conv import causal_conv
from twotower.kernels.precision import accumulation_dtype
from twotower.kernels.ssd import ssd_block, ssd_chunked
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
        z, trace, C = self._project(hidden, past, sees.valid)
        state = None if past is None else past.ssm_state
        if hidden.shape[1] <= self.config.chunk_size:
            y = ssd_block(trace.x, trace.dt, trace.log_decay, trace.B, C, state)
        else:
            y, _ = ssd_chunked(trace.x, trace.dt, trace.log_decay, trace.B, C, state, self.config.chunk_size)
        return self._output(y, trace.x, z), trace

    def forward_with_boundaries(self, hidden: Tensor, sees: Visibility, chunk: int) -> tuple[Tensor, MambaPast]:
        """A whole sequence from zero state, and the past before each chunk of it (training's context pass).

        hidden (B, S, H) with S a multiple of `chunk` → output (B, S, H) and a `MambaPast` of B·S/chunk rows.
        """
        z, trace, C = self._project(hidden, None, sees.valid)
        y, before = ssd_chunked(trace.x, trace.dt, trace.log_decay, trace.B, C, None, chunk)
        taps = self.config.conv_kernel - 1
        padded = F.pad(trace.xBC, (0, 0, taps, 0))
        windows = padded.unfold(1, taps, chunk)[:, : before.shape[1]].transpose(2, 3)  # (B, chunks, K−1, C)
        return self._output(y, trace.x, z), MambaPast(windows.flatten(0, 1), before.flatten(0, 1))

    def _project(
        self, hidden: Tensor, past: MambaPast | None, valid: Tensor | None
    ) -> tuple[Tensor, MambaTrace, Tensor]:
        config = self.config
        acc = accumulation_dtype(hidden.dtype)
        z, xBC, dt = self.in_proj(hidden).split([config.mamba_inner, config.conv_dim, config.mamba_num_heads], dim=-1)
        dt = F.softplus(dt.to(acc) + self.dt_bias.to(acc)).clamp(*config.time_step_limit)
        if valid is not None:  # padding leaves no mark: no input to the convolution, no time passes
            xBC = xBC * valid[..., None]
            dt = dt * valid[..., None]
        log_decay = dt * -self.A_log.to(acc).exp()
        active = F.silu(self.conv1d(xBC, None if past is None else past.conv_window))
        bc = config.n_groups * config.ssm_state_size
        x, B, C = active.split([config.mamba_inner, bc, bc], dim=-1)
        x = x.unflatten(-1, (config.mamba_num_heads, -1))
        B, C = (v.unflatten(-1, (config.n_groups, -1)) for v in (B, C))
        return z, MambaTrace(xBC, x, dt, log_decay, B), C

    def _output(self, y: Tensor, x: Tensor, z: Tensor) -> Tensor:
        y = y + x * self.D.to(x.dtype)[:, None]
        return self.out_proj(self.norm(y.flatten(2), z))
