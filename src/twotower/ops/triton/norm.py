"""Triton kernel of `rms_norm`: one program per token holds the whole token, so each value is read once.

Sums and modulation are in fp32; the result is rounded once. Memory traffic of one token of the 30B shape (width 2688,
bf16): 5 KiB each for x, weight, shift and scale (weight, shift and scale come from cache after the first token) and 5
KiB written. Importing this module needs Triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from twotower.ops.reference import norm as reference
from twotower.ops.reference.norm import Order
from twotower.ops.triton.launch import MAX_NORM_WIDTH, contiguous_from, device_guard, tile_of


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    modulation: tuple[Tensor, Tensor] | None = None,
    order: Order = "before",
    offset: float = 0.0,
) -> Tensor:
    """As `twotower.ops.reference.norm.rms_norm`, without gradients."""
    width = x.shape[-1]
    tile = tile_of(width)
    if tile > MAX_NORM_WIDTH or x.dim() != 3:
        return reference.rms_norm(x, weight, eps, modulation, order, offset)
    rows, length, _ = x.shape
    out = torch.empty(x.shape, dtype=weight.dtype, device=x.device)
    if not out.numel():
        return out
    x = contiguous_from(x, 2)
    shift, scale = (None, None) if modulation is None else (contiguous_from(part, 2) for part in modulation)
    with device_guard(x):
        _norm_kernel[(rows * length,)](
            x,
            weight.contiguous(),
            shift,
            scale,
            out,
            x.stride(0),
            x.stride(1),
            0 if shift is None else shift.stride(0),
            0 if scale is None else scale.stride(0),
            length,
            eps,
            offset,
            MODULATED="" if modulation is None else order,
            WIDTH=width,
            TILE=tile,
            num_warps=min(max(tile // 512, 4), 16),  # 16 values of each vector per thread, at most 32
        )
    return out


@triton.jit
def _norm_kernel(
    x,
    weight,
    shift,
    scale,
    out,
    x_row,
    x_token,
    shift_row,
    scale_row,
    length,
    eps,
    offset,
    MODULATED: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
):
    """One token. All loads are issued before the reduction, so none waits for the sum."""
    at = tl.program_id(0).to(tl.int64)
    row = (tl.program_id(0) // length).to(tl.int64)  # 64-bit divisions would take longer than the rest
    x += row * x_row + tl.program_id(0) % length * x_token
    columns = tl.arange(0, TILE)
    exists = columns < WIDTH
    value = tl.load(x + columns, mask=exists, other=0.0).to(tl.float32)
    factor = offset + tl.load(weight + columns, mask=exists, other=0.0).to(tl.float32)
    if MODULATED != "":
        added = tl.load(shift + row * shift_row + columns, mask=exists, other=0.0).to(tl.float32)
        grown = 1.0 + tl.load(scale + row * scale_row + columns, mask=exists, other=0.0).to(tl.float32)
    if MODULATED == "before":
        value = value * grown + added
    value = value * tl.rsqrt(tl.sum(value * value, axis=0) / WIDTH + eps) * factor
    if MODULATED == "after":
        value = value * grown + added
    tl.store(out + at * WIDTH + columns, value.to(out.dtype.element_ty), mask=exists)
