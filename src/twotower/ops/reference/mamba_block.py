"""A Mamba-2 mixer from in_proj's output to out_proj's input over one block, and the update of its state.

    z | xBC | dt = projected            xBC: padding zeroed; dt = softplus(dt + dt_bias), clamped, 0 at padding
    x | B | C = SiLU(conv(window ; xBC))
    y = scan(x, dt, B, C) from the state, + D·x
    mixed = group RMSNorm(y · SiLU(z)), or group RMSNorm(y) · SiLU(z), or y · SiLU(z)

`mamba_block` and `state_update` are the references of the kernels in `ops/triton/mamba_block.py`,
`ops/triton/state_update.py` and `ops/cpu/mamba.h`. Everything but z is computed in at least fp32. H heads of width P, G
groups, state size N, K convolution taps, C = H·P + 2·G·N channels of the convolution.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower.ops.precision import accumulation_dtype
from twotower.ops.reference.conv import causal_conv
from twotower.ops.reference.kv_write import write_slots
from twotower.ops.reference.ssd import final_state, pass_states, ssd_block
from twotower.specs import GateNorm


class MambaWeights(NamedTuple):
    """The weights of a Mamba-2 mixer without its projections.

    conv_weight (C, 1, K); conv_bias (C,) or None; dt_bias, A_log, D (H,); norm_weight (H·P,), None without a norm;
    head_dim: P; time_step_limit: the smallest and the largest dt; norm: as in `specs.Mamba2Spec`.
    """

    conv_weight: Tensor
    conv_bias: Tensor | None
    dt_bias: Tensor
    A_log: Tensor
    D: Tensor
    norm_weight: Tensor | None
    n_groups: int
    head_dim: int
    eps: float
    time_step_limit: tuple[float, float]
    norm: GateNorm = "after_gate"

    @property
    def inner(self) -> int:
        return self.heads * self.head_dim

    @property
    def heads(self) -> int:
        return self.A_log.shape[0]

    @property
    def conv_dim(self) -> int:
        return self.conv_weight.shape[0]

    @property
    def taps(self) -> int:
        return self.conv_weight.shape[2]

    @property
    def state_size(self) -> int:
        return (self.conv_dim - self.inner) // (2 * self.n_groups)


class MambaStepInputs(NamedTuple):
    """The scan inputs of L tokens of a Mamba-2 layer: enough to rebuild the state after any prefix of them.

    xBC (B, L, C): convolution inputs before the convolution; x (B, L, H, P), dt and log_decay (B, L, H), B (B, L, G,
    N): as the scan gets them.
    """

    xBC: Tensor
    x: Tensor
    dt: Tensor
    log_decay: Tensor
    B: Tensor


def empty_step_inputs(xBC: Tensor, heads: int, head_dim: int, groups: int, state_size: int) -> MambaStepInputs:
    """Uninitialized step inputs for a kernel to fill.

    xBC (…, B, L, C): the buffer of the convolution inputs, which may hold them already.
    """
    lead = xBC.shape[:-1]
    sizes = ((heads, head_dim), (heads,), (heads,), (groups, state_size))
    return MambaStepInputs(xBC, *(xBC.new_empty(lead + size, dtype=torch.float32) for size in sizes))


def mamba_block(
    projected: Tensor,
    token_mask: Tensor | None,
    window: Tensor | None,
    state: Tensor | None,
    weights: MambaWeights,
    keep_step_inputs: bool = True,
    slots: Tensor | None = None,
) -> tuple[Tensor, MambaStepInputs | None]:
    """A Mamba-2 mixer between its projections, over one block.

    projected (B, L, H·P + C + H); token_mask (B, L): False at padding (None: no padding); window (R, K−1, C) and state
    (R, H, P, N): before the block (None: zeros), of row b in slot slots[b] (slots None: R = B, slot b).

    Returns mixed (B, L, H·P) in projected's dtype, and the step inputs, or None unless `keep_step_inputs`.
    """
    window, state = in_slots(window, slots), in_slots(state, slots)
    z, xBC, dt, log_decay = split(projected, token_mask, weights)
    kept, C = convolve(xBC, window, dt, log_decay, weights)
    y = ssd_block(kept.x, kept.dt, kept.log_decay, kept.B, C, state)
    return gate_and_norm(y, kept.x, z, weights), kept if keep_step_inputs else None


def in_slots(pool: Tensor | None, slots: Tensor | None) -> Tensor | None:
    """The rows of a pool at `slots` (B,), or the pool itself."""
    return pool if pool is None or slots is None else pool[slots]


def state_update(
    conv_window: Tensor, ssm_state: Tensor, inputs: MambaStepInputs, accepted: Tensor, rows: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Advances the states in slots `rows` (B,) by the first `accepted` (B,) tokens of the step inputs.

    conv_window (R, K−1, C) and ssm_state (R, H, P, N) are the pools. The slots are distinct; rows None: R = B, slot b
    is row b. Returns the updated pools: changed in place if `rows` is given, new tensors otherwise and under autograd.
    Without autograd, a backend may update in place in both cases.
    """
    if rows is None:
        return _updated(conv_window, ssm_state, inputs, accepted)
    window, state = _updated(conv_window[rows], ssm_state[rows], inputs, accepted)
    return write_slots(conv_window, rows, window), write_slots(ssm_state, rows, state)


def update_pools(
    conv_window: Tensor, ssm_state: Tensor, inputs: MambaStepInputs, accepted: Tensor, rows: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `state_update`, and always in place without autograd: CUDA graphs find the pools by their addresses."""
    window, state = state_update(conv_window, ssm_state, inputs, accepted, rows)
    if rows is not None or torch.is_grad_enabled():
        return window, state
    return conv_window.copy_(window), ssm_state.copy_(state)


# --- parts, also used for a mixer over longer sequences --------------------------------------------------------------


def split(projected: Tensor, token_mask: Tensor | None, weights: MambaWeights) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """projected (B, L, …) → z, xBC before the convolution, dt and log_decay.

    Padding leaves every state unchanged: its convolution input and its dt are 0.
    """
    acc = accumulation_dtype(projected.dtype)
    z, xBC, dt = projected.split([weights.inner, weights.conv_dim, weights.heads], dim=-1)
    dt = F.softplus(dt.to(acc) + weights.dt_bias.to(acc)).clamp(*weights.time_step_limit)
    if token_mask is not None:
        xBC = xBC * token_mask[..., None]
        dt = dt * token_mask[..., None]
    return z, xBC, dt, dt * -weights.A_log.to(acc).exp()


def convolve(
    xBC: Tensor, window: Tensor | None, dt: Tensor, log_decay: Tensor, weights: MambaWeights
) -> tuple[MambaStepInputs, Tensor]:
    """Convolution and SiLU → the step inputs and C (B, L, G, N)."""
    active = F.silu(causal_conv(xBC, window, weights.conv_weight, weights.conv_bias))
    bc = weights.n_groups * weights.state_size
    x, B, C = active.split([weights.inner, bc, bc], dim=-1)
    x = x.unflatten(-1, (weights.heads, weights.head_dim))
    B, C = (v.unflatten(-1, (weights.n_groups, weights.state_size)) for v in (B, C))
    return MambaStepInputs(xBC, x, dt, log_decay, B), C


def scan_blocks(
    z: Tensor,
    xBC: Tensor,
    dt: Tensor,
    log_decay: Tensor,
    window: Tensor,
    starts_document: Tensor,
    weights: MambaWeights,
) -> tuple[Tensor, Tensor]:
    """The results of `split` over packed rows (B, S, …) → mixed (B·blocks, L, H·P), and the states before each block.

    window (B·blocks, K−1, C): before each block; starts_document (B, blocks): blocks that start from zero state.
    """
    blocks = starts_document.shape[1]
    xBC, dt, log_decay, z = (v.unflatten(1, (blocks, -1)).flatten(0, 1) for v in (xBC, dt, log_decay, z))
    inputs, C = convolve(xBC, window, dt, log_decay, weights)
    added = final_state(inputs.x, inputs.dt, inputs.log_decay, inputs.B, None).unflatten(0, (-1, blocks))
    decays = inputs.log_decay.sum(1).unflatten(0, (-1, blocks))
    before = pass_states(added, decays, None, starts_document).flatten(0, 1)
    y = ssd_block(inputs.x, inputs.dt, inputs.log_decay, inputs.B, C, before)
    return gate_and_norm(y, inputs.x, z, weights), before


def gate_and_norm(y: Tensor, x: Tensor, z: Tensor, weights: MambaWeights) -> Tensor:
    """y, x (B, L, H, P), z (B, L, H·P) → y + D·x, gated by z and normed, (B, L, H·P) in z's dtype."""
    y = (y + x * weights.D.to(x.dtype)[:, None]).flatten(2)
    acc = accumulation_dtype(z.dtype)
    y, gate = y.to(acc), F.silu(z.to(acc))
    if weights.norm_weight is None:
        out = y * gate
    elif weights.norm == "after_gate":
        out = group_norm(y * gate, weights.norm_weight, weights.n_groups, weights.eps)
    else:
        out = group_norm(y, weights.norm_weight, weights.n_groups, weights.eps) * gate
    return out.to(z.dtype)


def group_norm(x: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    """RMSNorm of x (..., width) within each of `groups` groups, times weight (width,), in x's dtype."""
    grouped = x.unflatten(-1, (groups, x.shape[-1] // groups))
    return F.rms_norm(grouped, grouped.shape[-1:], eps=eps).flatten(-2) * weight.to(x.dtype)


def _updated(window: Tensor, state: Tensor, inputs: MambaStepInputs, accepted: Tensor) -> tuple[Tensor, Tensor]:
    counted = (torch.arange(inputs.dt.shape[1], device=accepted.device) < accepted[:, None])[..., None]
    ssm = final_state(inputs.x, inputs.dt * counted, inputs.log_decay * counted, inputs.B, state)
    conv_inputs = torch.cat([window, inputs.xBC.to(window.dtype)], dim=1)
    columns = accepted[:, None] + torch.arange(window.shape[1], device=accepted.device)
    return conv_inputs.gather(1, columns[..., None].expand(-1, -1, conv_inputs.shape[2])), ssm
