"""Triton kernel of `state_update`: one program per row and head, and several per row for the convolution window.

A head whose state is larger than 64 × 128 has several programs, each for a part of its width.

Memory traffic of one row of the 30B shapes that accepts L = 16 tokens: state 2 MiB read and 2 MiB written; step inputs
x 256 KiB, B 64 KiB, dt and log_decay 8 KiB; window and its new inputs 36 KiB read, 36 KiB written. Importing this
module needs Triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from twotower.ops.reference import mamba_block as reference
from twotower.ops.reference.mamba_block import MambaStepInputs
from twotower.ops.triton.launch import (
    contiguous_from,
    device_guard,
    dot_precision,
    exceeds_one_program,
    head_tile,
    tile_of,
)

WINDOW_CHANNELS = 256  # channels of the convolution window per program


def state_update(
    conv_window: Tensor, ssm_state: Tensor, inputs: MambaStepInputs, accepted: Tensor, rows: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `twotower.ops.reference.mamba_block.state_update`, always in place.

    Programs of rows that accept 0 tokens exit at once.
    """
    batch, length, heads = inputs.dt.shape
    taps, channels = conv_window.shape[1] + 1, conv_window.shape[2]
    if not batch * length:
        return conv_window, ssm_state
    width, size = ssm_state.shape[2:]
    if exceeds_one_program(length, size):
        new = reference.state_update(conv_window, ssm_state, inputs, accepted, rows)
        return (conv_window.copy_(new[0]), ssm_state.copy_(new[1])) if rows is None else new
    assert conv_window.is_contiguous(), "a pool is contiguous"
    assert ssm_state.is_contiguous(), "a pool is contiguous"
    xBC, x, B = (contiguous_from(v, 2) for v in (inputs.xBC, inputs.x, inputs.B))
    exact = conv_window.dtype == torch.float32  # exact products take registers
    width_tile = head_tile(width, size, length if exact else 1)
    head_programs = heads * triton.cdiv(width, width_tile)
    grid = (batch, head_programs + (triton.cdiv(channels, WINDOW_CHANNELS) if taps > 1 else 0))
    with device_guard(ssm_state):
        _state_update_kernel[grid](
            conv_window,
            ssm_state,
            xBC,
            x,
            inputs.dt.contiguous(),
            inputs.log_decay.contiguous(),
            B,
            accepted.contiguous(),
            None if rows is None else rows.contiguous(),
            *(xBC.stride(0), xBC.stride(1), x.stride(0), x.stride(1), B.stride(0), B.stride(1)),
            length,
            HAS_ROWS=rows is not None,
            HEADS=heads,
            GROUPS=inputs.B.shape[2],
            WIDTH=width,
            SIZE=size,
            TAPS=taps,
            CHANNELS=channels,
            TOKENS=1 if length == 1 else tile_of(length),
            WIDTH_TILE=width_tile,
            SIZE_TILE=tile_of(size),
            TAPS_TILE=triton.next_power_of_2(max(taps - 1, 1)),
            CHANNELS_TILE=WINDOW_CHANNELS,
            PRECISION=dot_precision(conv_window.dtype),
            num_warps=8 if length > 1 and exact else 4,
        )
    return conv_window, ssm_state


@triton.jit
def _update_state(
    state,
    x,
    dt,
    log_decay,
    B,
    x_token,
    B_token,
    first,
    count,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDTH_TILE: tl.constexpr,
    SIZE_TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Updates some rows of one head's state, from `first` on, with its first `count` tokens.

    Pointers are at the row and head.
    """
    tokens = tl.arange(0, TOKENS)
    counted = tokens < count
    p = first + tl.arange(0, WIDTH_TILE)
    n = tl.arange(0, SIZE_TILE)
    time = tl.load(dt + tokens * HEADS, mask=counted, other=0.0)
    passing = tl.load(log_decay + tokens * HEADS, mask=counted, other=0.0)
    of_x = counted[:, None] & (p < WIDTH)[None, :]
    value = tl.load(x + tokens[:, None] * x_token + p[None, :], mask=of_x, other=0.0).to(tl.float32)
    of_B = counted[:, None] & (n < SIZE)[None, :]
    key = tl.load(B + tokens[:, None] * B_token + n[None, :], mask=of_B, other=0.0).to(tl.float32)
    total = tl.sum(passing, axis=0)
    if TOKENS == 1:
        new = tl.trans(value * time[:, None]) * key
    else:
        left = tl.exp(total - tl.cumsum(passing, axis=0))  # decay from each token to the end of the block
        new = tl.dot(tl.trans(value * (left * time)[:, None]), key, input_precision=PRECISION)
    h = state + p[:, None] * SIZE + n[None, :]
    of_h = (p < WIDTH)[:, None] & (n < SIZE)[None, :]
    tl.store(h, tl.load(h, mask=of_h, other=0.0) * tl.exp(total) + new, mask=of_h)


@triton.jit
def _update_window(
    window, xBC, xBC_token, channels, count, TAPS: tl.constexpr, CHANNELS: tl.constexpr, TAPS_TILE: tl.constexpr
):
    """Keeps the last K − 1 of [window ; the first `count` inputs] for some channels of a row."""
    j = tl.arange(0, TAPS_TILE)
    exists = (j < TAPS - 1)[:, None] & (channels < CHANNELS)[None, :]
    source = (j + count)[:, None]
    old = source < TAPS - 1
    kept = tl.load(window + source * CHANNELS + channels[None, :], mask=exists & old, other=0.0)
    fresh = tl.load(
        xBC + (source - (TAPS - 1)) * xBC_token + channels[None, :], mask=exists & (source >= TAPS - 1), other=0.0
    )
    tl.debug_barrier()  # read the whole old window before overwriting it
    moved = tl.where(old, kept, fresh.to(kept.dtype))
    tl.store(window + j[:, None] * CHANNELS + channels[None, :], moved, mask=exists)


@triton.jit
def _state_update_kernel(
    conv_window,
    ssm_state,
    xBC,
    x,
    dt,
    log_decay,
    B,
    accepted,
    rows,
    xBC_row,
    xBC_token,
    x_row,
    x_token,
    B_row,
    B_token,
    length,
    HAS_ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    SIZE: tl.constexpr,
    TAPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDTH_TILE: tl.constexpr,
    SIZE_TILE: tl.constexpr,
    TAPS_TILE: tl.constexpr,
    CHANNELS_TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One row (axis 0); a part of one head's state, or, after the heads, some channels of the window (axis 1)."""
    PARTS: tl.constexpr = (WIDTH + WIDTH_TILE - 1) // WIDTH_TILE
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    head = part // PARTS
    slot = row
    if HAS_ROWS:
        slot = tl.load(rows + row).to(tl.int64)
    count = tl.load(accepted + row).to(tl.int32)
    if count > 0:
        if head < HEADS:
            of_head = row * length * HEADS + head
            _update_state(
                ssm_state + (slot * HEADS + head) * (WIDTH * SIZE),
                x + row * x_row + head * WIDTH,
                dt + of_head,
                log_decay + of_head,
                B + row * B_row + head // (HEADS // GROUPS) * SIZE,
                x_token,
                B_token,
                part % PARTS * WIDTH_TILE,
                tl.minimum(count, length),
                HEADS,
                WIDTH,
                SIZE,
                TOKENS,
                WIDTH_TILE,
                SIZE_TILE,
                PRECISION,
            )
        else:
            _update_window(
                conv_window + slot * ((TAPS - 1) * CHANNELS),
                xBC + row * xBC_row,
                xBC_token,
                (part - HEADS * PARTS) * CHANNELS_TILE + tl.arange(0, CHANNELS_TILE),
                count,
                TAPS,
                CHANNELS,
                TAPS_TILE,
            )
