"""Triton kernels of `mamba_block`: one program per row and head, then a norm with one program per token and group.

`_block_kernel` has no loop over tokens: a block is one tile of matrix products; a block of one token uses sums instead.
Sizes are padded to powers of two and masked. A head whose state is larger than 64 × 128 has several programs, each for
a part of its width. The heads of a group all compute the convolution of B and C, from the cache. Without a norm,
`_norm_kernel` is not launched. Arithmetic is fp32. The host does not wait, and grids depend on shapes only, so passes
can be captured in a CUDA graph. States are read in their pools, by slot. Importing this module needs Triton.

Memory traffic of one row of the 30B shapes (H 64, P 64, N 128, G 8, K 4, bf16), L = 16: state 2 MiB read once, z | xBC
| dt 322 KiB read, result 128 KiB written, and 256 KiB of fp32 between the kernels, written and read. The step inputs,
if kept: 520 KiB written. One row is 64 programs, which an H100 (132 multiprocessors) runs at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from twotower.ops.reference import mamba_block as reference
from twotower.ops.reference.mamba_block import MambaStepInputs, MambaWeights, empty_step_inputs
from twotower.ops.triton.launch import (
    contiguous_from,
    device_guard,
    dot_precision,
    exceeds_one_program,
    head_tile,
    tile_of,
)
from twotower.ops.triton.mamba_parts import conv_silu, gate, scan, softplus

MAX_GROUP_WIDTH = 16384  # width of a group of heads that a norm keeps in the registers of 16 warps


def mamba_block(
    projected: Tensor,
    token_mask: Tensor | None,
    window: Tensor | None,
    state: Tensor | None,
    weights: MambaWeights,
    keep_step_inputs: bool = True,
    slots: Tensor | None = None,
) -> tuple[Tensor, MambaStepInputs | None]:
    """As `twotower.ops.reference.mamba_block.mamba_block`, without gradients."""
    rows, length = projected.shape[:2]
    too_large = exceeds_one_program(length, weights.state_size) or weights.inner // weights.n_groups > MAX_GROUP_WIDTH
    if too_large or not rows * length:
        return reference.mamba_block(projected, token_mask, window, state, weights, keep_step_inputs, slots)
    projected = contiguous_from(projected, 2)
    window, state = (None if part is None else contiguous_from(part, 1) for part in (window, state))
    mixed = projected.new_empty(rows, length, weights.inner)
    in_place = mixed.dtype == torch.float32 or weights.norm == "none"
    unnormed = mixed if in_place else torch.empty_like(mixed, dtype=torch.float32)  # a norm needs fp32
    kept = _empty_step_inputs(projected, token_mask, weights) if keep_step_inputs else None
    tile = 1 if length == 1 else tile_of(length)
    width_tile = head_tile(weights.head_dim, weights.state_size, tile)
    with device_guard(projected):
        _block_kernel[(rows, weights.heads * triton.cdiv(weights.head_dim, width_tile))](
            projected,
            None if token_mask is None else token_mask.bool().contiguous().view(torch.uint8),
            window,
            state,
            None if slots is None or window is None else slots.contiguous(),
            weights.conv_weight.contiguous(),
            weights.conv_bias,
            weights.dt_bias,
            weights.A_log,
            weights.D,
            unnormed,
            *(kept or (None,) * 5),
            projected.stride(0),
            projected.stride(1),
            0 if window is None else window.stride(0),
            0 if state is None else state.stride(0),
            length,
            *map(float, weights.time_step_limit),
            HAS_MASK=token_mask is not None,
            HAS_WINDOW=window is not None,
            HAS_STATE=state is not None,
            HAS_BIAS=weights.conv_bias is not None,
            KEEP_STEP_INPUTS=keep_step_inputs,
            GATED=weights.norm != "before_gate",
            HEADS=weights.heads,
            GROUPS=weights.n_groups,
            WIDTH=weights.head_dim,
            SIZE=weights.state_size,
            TAPS=weights.taps,
            TOKENS=tile,
            WIDTH_TILE=width_tile,
            SIZE_TILE=tile_of(weights.state_size),
            PRECISION=dot_precision(projected.dtype),
            num_warps=4 if tile == 1 else 8,
            num_stages=1,
        )
        if weights.norm != "none":
            _norm(unnormed, mixed, projected, weights)
    return mixed, kept


def _norm(unnormed: Tensor, mixed: Tensor, projected: Tensor, weights: MambaWeights) -> None:
    """Writes the normed output (B, L, H·P) to `mixed`; the two may be the same memory."""
    rows, length = projected.shape[:2]
    width = weights.inner // weights.n_groups
    tile = triton.next_power_of_2(width)
    _norm_kernel[(rows * length, weights.n_groups)](
        unnormed,
        mixed,
        weights.norm_weight,
        projected,
        projected.stride(0),
        projected.stride(1),
        length,
        weights.eps,
        GATED=weights.norm == "before_gate",
        INNER=weights.inner,
        WIDTH=width,
        TILE=tile,
        num_warps=min(max(tile // 512, 1), 16),
    )


def _empty_step_inputs(projected: Tensor, token_mask: Tensor | None, weights: MambaWeights) -> MambaStepInputs:
    """Without padding, the convolution inputs are a view of `projected`."""
    xBC = projected[..., weights.inner : weights.inner + weights.conv_dim]
    xBC = xBC if token_mask is None else torch.empty_like(xBC, memory_format=torch.contiguous_format)
    return empty_step_inputs(xBC, weights.heads, weights.head_dim, weights.n_groups, weights.state_size)


@triton.jit
def _block_kernel(
    projected,
    token_mask,
    window,
    state,
    slots,
    conv_weight,
    conv_bias,
    dt_bias,
    A_log,
    D,
    unnormed,
    kept_xBC,
    kept_x,
    kept_dt,
    kept_decay,
    kept_B,
    row_stride,
    token_stride,
    window_stride,
    state_stride,
    length,
    least_dt,
    largest_dt,
    HAS_MASK: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_STATE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KEEP_STEP_INPUTS: tl.constexpr,
    GATED: tl.constexpr,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    SIZE: tl.constexpr,
    TAPS: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDTH_TILE: tl.constexpr,
    SIZE_TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One row (axis 0), a part of one head (axis 1). The first part of a group also stores its B."""
    INNER: tl.constexpr = HEADS * WIDTH
    CONV_DIM: tl.constexpr = INNER + 2 * GROUPS * SIZE
    HEADS_PER_GROUP: tl.constexpr = HEADS // GROUPS
    PARTS: tl.constexpr = (WIDTH + WIDTH_TILE - 1) // WIDTH_TILE  # of a head, whose state may exceed a program
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    head = part // PARTS
    group = head // HEADS_PER_GROUP
    of_group = part == group * HEADS_PER_GROUP * PARTS  # the first program of the group
    projected += row * row_stride
    first = row * length  # index of the row's first token in the outputs
    unnormed += first * INNER
    xBC = projected + INNER
    slot = row
    if slots is not None:
        slot = tl.load(slots + row).to(tl.int64)
    if HAS_MASK:
        token_mask += first
    if HAS_WINDOW:
        window += slot * window_stride
    if HAS_STATE:
        state += slot * state_stride
    if KEEP_STEP_INPUTS and HAS_MASK:
        kept_xBC += first * CONV_DIM

    tokens = tl.arange(0, TOKENS)
    here = tokens < length
    counted = here
    if HAS_MASK:
        counted = here & (tl.load(token_mask + tokens, mask=here, other=0) != 0)
    n = tl.arange(0, SIZE_TILE)
    of_state = n < SIZE

    channels = INNER + group * SIZE + n
    # fmt: off
    B = conv_silu(
        xBC, token_mask, window, conv_weight, conv_bias, kept_xBC, token_stride, length, tokens, channels, of_state,
        of_group, HAS_MASK, HAS_WINDOW, HAS_BIAS, KEEP_STEP_INPUTS, CONV_DIM, TAPS,
    )
    channels += GROUPS * SIZE
    C = conv_silu(
        xBC, token_mask, window, conv_weight, conv_bias, kept_xBC, token_stride, length, tokens, channels, of_state,
        of_group, HAS_MASK, HAS_WINDOW, HAS_BIAS, KEEP_STEP_INPUTS, CONV_DIM, TAPS,
    )
    # fmt: on
    if TOKENS == 1:  # noqa: SIM108  constexpr: only one branch is compiled
        scores = tl.sum(C * B, axis=1)[:, None]
    else:
        scores = tl.dot(C, tl.trans(B), input_precision=PRECISION)  # (TOKENS, TOKENS)

    in_head = part % PARTS * WIDTH_TILE + tl.arange(0, WIDTH_TILE)
    of_head = in_head < WIDTH
    columns = head * WIDTH + in_head
    exists = here[:, None] & of_head[None, :]
    dt = tl.load(xBC + CONV_DIM + tokens * token_stride + head, mask=here, other=0.0).to(tl.float32)
    dt = softplus(dt + tl.load(dt_bias + head).to(tl.float32))
    dt = tl.where(counted, tl.minimum(tl.maximum(dt, least_dt), largest_dt), 0.0)
    log_decay = dt * -tl.exp(tl.load(A_log + head).to(tl.float32))
    # fmt: off
    x = conv_silu(
        xBC, token_mask, window, conv_weight, conv_bias, kept_xBC, token_stride, length, tokens, columns, of_head,
        True, HAS_MASK, HAS_WINDOW, HAS_BIAS, KEEP_STEP_INPUTS, CONV_DIM, TAPS,
    )
    # fmt: on
    if KEEP_STEP_INPUTS:
        at = first + tokens
        tl.store(kept_x + at[:, None] * INNER + columns[None, :], x, mask=exists)
        tl.store(kept_dt + at * HEADS + head, dt, mask=here & (part % PARTS == 0))
        tl.store(kept_decay + at * HEADS + head, log_decay, mask=here & (part % PARTS == 0))
        of_B = here[:, None] & of_state[None, :] & of_group
        tl.store(kept_B + at[:, None] * (GROUPS * SIZE) + group * SIZE + n[None, :], B, mask=of_B)
    y = scan(x, dt, log_decay, C, scores, state, columns, of_head, HAS_STATE, SIZE, TOKENS, SIZE_TILE, PRECISION)
    y += x * tl.load(D + head).to(tl.float32)
    if GATED:
        y *= gate(projected, token_stride, tokens, columns, exists)
    tl.store(unnormed + tokens[:, None] * INNER + columns[None, :], y.to(unnormed.dtype.element_ty), mask=exists)


@triton.jit
def _norm_kernel(
    unnormed,
    mixed,
    norm_weight,
    projected,
    row_stride,
    token_stride,
    length,
    eps,
    GATED: tl.constexpr,
    INNER: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
):
    """RMSNorm of one token (axis 0) over one group of heads (axis 1), times SiLU(z) if GATED."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, TILE)
    exists = column < WIDTH
    column += tl.program_id(1) * WIDTH
    y = tl.load(unnormed + token * INNER + column, mask=exists, other=0.0)
    y *= tl.rsqrt(tl.sum(y * y, axis=0) / WIDTH + eps)
    y *= tl.load(norm_weight + column, mask=exists, other=0.0).to(tl.float32)
    if GATED:
        at = projected + token // length * row_stride + token % length * token_stride
        z = tl.load(at + column, mask=exists, other=0.0).to(tl.float32)
        y *= z / (1.0 + tl.exp(-z))
    tl.store(mixed + token * INNER + column, y.to(mixed.dtype.element_ty), mask=exists)
