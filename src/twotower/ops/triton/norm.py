"""Triton kernel of `rms_norm`: one program a token, which holds all of it, so everything is read once.

Sums and modulation are fp32, and rounded once, at the end. Bytes of a token of the 30B shape (2688 wide, bf16): 5 KiB
read, as much of the weight, of shift and of scale (the cache serves all but the first token), 5 KiB written. Import
this only where a kernel is to run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from twotower.ops.reference import norm as reference
from twotower.ops.reference.norm import Order
from twotower.ops.triton.launch import MAX_TOKEN, dense_from, device_of, tile_of


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, modulation: tuple[Tensor, Tensor] | None = None, order: Order = "before"
) -> Tensor:
    """As `twotower.ops.reference.norm.rms_norm`, without gradients."""
    rows, length, width = x.shape
    tile = tile_of(width)
    if tile > MAX_TOKEN:
        return reference.rms_norm(x, weight, eps, modulation, order)
    out = torch.empty(x.shape, dtype=weight.dtype, device=x.device)
    if not out.numel():
        return out
    x = dense_from(x, 2)
    shift, scale = (None, None) if modulation is None else (dense_from(part, 2) for part in modulation)
    with device_of(x):
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
            MODULATED="" if modulation is None else order,
            WIDTH=width,
            TILE=tile,
            num_warps=min(max(tile // 512, 4), 16),  # 16 numbers a thread of each vector, and 32 at most
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
    MODULATED: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
):
    """One token. All loads come first: none waits for the sum."""
    at = tl.program_id(0).to(tl.int64)
    row = at // length
    columns = tl.arange(0, TILE)
    exists = columns < WIDTH
    value = tl.load(x + row * x_row + at % length * x_token + columns, mask=exists, other=0.0).to(tl.float32)
    factor = tl.load(weight + columns, mask=exists, other=0.0).to(tl.float32)
    if MODULATED != "":
        added = tl.load(shift + row * shift_row + columns, mask=exists, other=0.0).to(tl.float32)
        grown = 1.0 + tl.load(scale + row * scale_row + columns, mask=exists, other=0.0).to(tl.float32)
    if MODULATED == "before":
        value = value * grown + added
    value = value * tl.rsqrt(tl.sum(value * value, axis=0) / WIDTH + eps) * factor
    if MODULATED == "after":
        value = value * grown + added
    tl.store(out + at * WIDTH + columns, value.to(out.dtype.element_ty), mask=exists)
