"""Triton kernel of `mamba_block`: one program per row and group of heads.

A program also computes the norm of its group, before or after the gate. There is no loop over tokens: a block is one
tile of matrix products; a block of one token uses sums instead. Sizes are padded to powers of two and masked. A
head whose state is larger than 64 × 128 is computed in parts of its width. Arithmetic is fp32. The host does not wait,
and grids depend on shapes only, so passes can be captured in a CUDA graph. Importing this module needs Triton.

Memory traffic of one row of the 30B shapes (H 64, P 64, N 128, G 8, K 4, bf16), L = 16: state 2 MiB read once, z | xBC
| dt 322 KiB read, result 128 KiB written, and 256 KiB of fp32 intermediates, written and read back from cache by the
same program. The step inputs, if kept: 520 KiB written.
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
from twotower.ops.triton.mamba_parts import conv_silu, gate, group_norm, scan, softplus


def mamba_block(
    projected: Tensor,
    token_mask: Tensor | None,
    window: Tensor | None,
    state: Tensor | None,
    weights: MambaWeights,
    keep_step_inputs: bool = True,
) -> tuple[Tensor, MambaStepInputs | None]:
    """As `twotower.ops.reference.mamba_block.mamba_block`, without gradients."""
    rows, length = projected.shape[:2]
    if exceeds_one_program(length, weights.state_size) or not rows * length:
        return reference.mamba_block(projected, token_mask, window, state, weights, keep_step_inputs)
    projected = contiguous_from(projected, 2)
    window, state = (None if part is None else contiguous_from(part, 1) for part in (window, state))
    mixed = projected.new_empty(rows, length, weights.inner)
    # A norm needs all heads of a group; `unnormed` holds them in fp32 until the last one is computed.
    in_place = mixed.dtype == torch.float32 or weights.norm == "none"
    unnormed = mixed if in_place else torch.empty_like(mixed, dtype=torch.float32)
    kept = _empty_step_inputs(projected, token_mask, weights) if keep_step_inputs else None
    tile = 1 if length == 1 else tile_of(length)
    with device_guard(projected):
        _block_kernel[(rows, weights.n_groups)](
            projected,
            None if token_mask is None else token_mask.bool().contiguous().view(torch.uint8),
            window,
            state,
            weights.conv_weight.contiguous(),
            weights.conv_bias,
            weights.dt_bias,
            weights.A_log,
            weights.D,
            weights.norm_weight,
            unnormed,
            mixed,
            *(kept or (None,) * 5),
            projected.stride(0),
            projected.stride(1),
            0 if window is None else window.stride(0),
            0 if state is None else state.stride(0),
            length,
            weights.eps,
            *map(float, weights.time_step_limit),
            HAS_MASK=token_mask is not None,
            HAS_WINDOW=window is not None,
            HAS_STATE=state is not None,
            HAS_BIAS=weights.conv_bias is not None,
            KEEP_STEP_INPUTS=keep_step_inputs,
            NORM=weights.norm,
            HEADS=weights.heads,
            GROUPS=weights.n_groups,
            WIDTH=weights.head_dim,
            SIZE=weights.state_size,
            TAPS=weights.taps,
            TOKENS=tile,
            WIDTH_TILE=head_tile(weights.head_dim, weights.state_size),
            SIZE_TILE=tile_of(weights.state_size),
            PRECISION=dot_precision(projected.dtype),
            num_warps=4 if tile == 1 else 8,
            num_stages=2 if tile <= 32 else 1,  # prefetch; at 64: 128 KiB of shared memory
        )
    return mixed, kept


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
    conv_weight,
    conv_bias,
    dt_bias,
    A_log,
    D,
    norm_weight,
    unnormed,
    mixed,
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
    eps,
    least_dt,
    largest_dt,
    HAS_MASK: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_STATE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KEEP_STEP_INPUTS: tl.constexpr,
    NORM: tl.constexpr,
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
    """One row (axis 0), one group of heads (axis 1)."""
    INNER: tl.constexpr = HEADS * WIDTH
    CONV_DIM: tl.constexpr = INNER + 2 * GROUPS * SIZE
    HEADS_PER_GROUP: tl.constexpr = HEADS // GROUPS
    PARTS: tl.constexpr = (WIDTH + WIDTH_TILE - 1) // WIDTH_TILE  # of a head, whose state may exceed a program
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    projected += row * row_stride
    first = row * length  # index of the row's first token in the outputs
    unnormed += first * INNER
    mixed += first * INNER
    xBC = projected + INNER
    if HAS_MASK:
        token_mask += first
    if HAS_WINDOW:
        window += row * window_stride
    if HAS_STATE:
        state += row * state_stride
    if KEEP_STEP_INPUTS:
        kept_x += first * INNER
        kept_dt += first * HEADS
        kept_decay += first * HEADS
        kept_B += first * GROUPS * SIZE
        if HAS_MASK:
            kept_xBC += first * CONV_DIM

    tokens = tl.arange(0, TOKENS)
    here = tokens < length
    counted = here
    if HAS_MASK:
        counted = here & (tl.load(token_mask + tokens, mask=here, other=0) != 0)
    n = tl.arange(0, SIZE_TILE)
    p = tl.arange(0, WIDTH_TILE)
    of_state = n < SIZE

    channels = INNER + group * SIZE + n
    # fmt: off
    B = conv_silu(
        xBC, token_mask, window, conv_weight, conv_bias, kept_xBC, token_stride, length, tokens, channels, of_state,
        HAS_MASK, HAS_WINDOW, HAS_BIAS, KEEP_STEP_INPUTS, CONV_DIM, TAPS,
    )
    channels += GROUPS * SIZE
    C = conv_silu(
        xBC, token_mask, window, conv_weight, conv_bias, kept_xBC, token_stride, length, tokens, channels, of_state,
        HAS_MASK, HAS_WINDOW, HAS_BIAS, KEEP_STEP_INPUTS, CONV_DIM, TAPS,
    )
    # fmt: on
    if KEEP_STEP_INPUTS:
        of_group = kept_B + tokens[:, None] * (GROUPS * SIZE) + group * SIZE + n[None, :]
        tl.store(of_group, B, mask=here[:, None] & of_state[None, :])
    if TOKENS == 1:  # noqa: SIM108  constexpr: only one branch is compiled
        scores = tl.sum(C * B, axis=1)[:, None]
    else:
        scores = tl.dot(C, tl.trans(B), input_precision=PRECISION)  # (TOKENS, TOKENS)

    squares = tl.zeros([TOKENS], dtype=tl.float32)
    for i in range(HEADS_PER_GROUP * PARTS):
        head = group * HEADS_PER_GROUP + i // PARTS
        in_head = i % PARTS * WIDTH_TILE + p
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
            HAS_MASK, HAS_WINDOW, HAS_BIAS, KEEP_STEP_INPUTS, CONV_DIM, TAPS,
        )
        if KEEP_STEP_INPUTS:
            tl.store(kept_x + tokens[:, None] * INNER + columns[None, :], x, mask=exists)
            tl.store(kept_dt + tokens * HEADS + head, dt, mask=here)
            tl.store(kept_decay + tokens * HEADS + head, log_decay, mask=here)
        y = scan(
            x, dt, log_decay, C, scores, state, columns, of_head, HAS_STATE, SIZE, TOKENS, SIZE_TILE, PRECISION,
        )
        # fmt: on
        y += x * tl.load(D + head).to(tl.float32)
        if NORM != "before_gate":
            y *= gate(projected, token_stride, tokens, columns, exists)
        squares += tl.sum(y * y, axis=1)
        tl.store(unnormed + tokens[:, None] * INNER + columns[None, :], y.to(unnormed.dtype.element_ty), mask=exists)

    if NORM != "none":
        tl.debug_barrier()  # threads read values that other threads wrote
        group_norm(
            unnormed,
            mixed,
            norm_weight,
            projected,
            token_stride,
            length,
            squares,
            eps,
            group,
            NORM,
            INNER,
            HEADS_PER_GROUP,
            WIDTH,
            TOKENS,
            WIDTH_TILE,
        )
