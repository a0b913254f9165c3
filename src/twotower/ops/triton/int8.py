"""Triton kernel of `linear_int8` for few tokens: int8 panels are read once and widened in registers.

Bytes moved for `out_proj` of the 30B shape (4096 → 2688, bf16), 16 tokens: 10.5 MiB of weights; x, 128 KiB, by 42
programs from the cache; 84 KiB of results. 42 programs cannot keep a GPU's memory busy, so each row's sum is cut in 7
parts, and a second launch adds them in order: 1.1 MiB of fp32 written and read. Import this only where a kernel is to
run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from twotower.ops.reference import int8 as reference
from twotower.ops.triton.gemm import OUTS, in_pairs, launch_of, most_rows, product
from twotower.ops.triton.launch import dense_from, device_of, tile_of

# Above, torch: it moves 9 bytes a weight before it multiplies (int8 read, bf16 written, turned, read), which costs as
# much time as a third of the tensor cores' rate takes for twice as many tokens.
MOST_TOKENS = 256
PROGRAMS = 264  # wanted: two for each of an H100's 132 processors
LEAST_PART = 512  # inputs; of fewer, starting costs more than reading
COLUMNS = 512  # of a token's result, a program that adds parts


def linear_int8(x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `twotower.ops.reference.int8.linear`, without gradients."""
    width, out = x.shape[-1], len(scale)
    if not 0 < x.numel() <= MOST_TOKENS * width or not out:
        return reference.linear(x, q, scale, bias)
    flat = dense_from(x.reshape(-1, width), 1)
    tokens = len(flat)
    rows = min(most_rows(x.dtype), tile_of(tokens))
    launch = launch_of(x.dtype, True, rows)
    tiles = triton.cdiv(tokens, rows)
    parts, part = parts_of(width, triton.cdiv(out, OUTS) * tiles, launch.step)
    result = x.new_empty(tokens, out)
    sums = result if parts == 1 else torch.empty(parts, tokens, out, dtype=torch.float32, device=x.device)
    with device_of(x):
        _linear_kernel[(triton.cdiv(out, OUTS), tiles, parts)](
            flat,
            in_pairs(q),
            scale.contiguous(),
            bias,
            sums,
            flat.stride(0),
            tokens,
            PART=part,
            WHOLE=parts == 1,
            OUT=out,
            IN=width,
            ROWS=rows,
            OUTS=OUTS,
            STEP=launch.step,
            OPERAND=launch.operand,
            PRECISION=launch.precision,
            num_warps=launch.warps,
            num_stages=launch.stages,
        )
        if parts > 1:
            _sum_kernel[(tokens, triton.cdiv(out, COLUMNS))](
                sums, scale.contiguous(), bias, result, tokens, PARTS=parts, OUT=out, COLUMNS=COLUMNS, num_warps=4
            )
    return result.view(*x.shape[:-1], out)


def parts_of(width: int, programs: int, step: int) -> tuple[int, int]:
    """In how many parts a sum over `width` inputs is cut where `programs` do all of it, and the length of one."""
    parts = max(min(triton.cdiv(PROGRAMS, programs), width // LEAST_PART), 1)
    part = triton.cdiv(triton.cdiv(width, parts), step) * step
    return triton.cdiv(width, part), part


@triton.jit(do_not_specialize=["tokens"])
def _linear_kernel(
    x,
    weight,
    scale,
    bias,
    sums,
    x_stride,
    tokens,
    PART: tl.constexpr,
    WHOLE: tl.constexpr,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    ROWS: tl.constexpr,
    OUTS: tl.constexpr,
    STEP: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Some outputs (axis 0) of a tile of tokens (axis 1) over a part of the inputs (axis 2). WHOLE: over all of them,
    and finished here."""
    first = tl.program_id(0) * OUTS
    token = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    live = token < tokens
    start = tl.program_id(2) * PART
    rows = x + token.to(tl.int64) * x_stride
    total = product(rows, live, weight, first, start, PART, OUT, IN, True, ROWS, OUTS, STEP, OPERAND, PRECISION)
    outs = first + tl.arange(0, OUTS)
    exists = outs < OUT
    if WHOLE:
        total *= tl.load(scale + outs, mask=exists, other=0.0)[None, :]
        if bias is not None:
            total += tl.load(bias + outs, mask=exists, other=0.0).to(tl.float32)[None, :]
    at = sums + (tl.program_id(2) * tokens + token).to(tl.int64)[:, None] * OUT + outs[None, :]
    tl.store(at, total.to(sums.dtype.element_ty), mask=live[:, None] & exists[None, :])


@triton.jit(do_not_specialize=["tokens"])
def _sum_kernel(sums, scale, bias, result, tokens, PARTS: tl.constexpr, OUT: tl.constexpr, COLUMNS: tl.constexpr):
    """One token (axis 0), some outputs (axis 1): its parts, in order."""
    token = tl.program_id(0).to(tl.int64)
    outs = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    exists = outs < OUT
    total = tl.zeros([COLUMNS], dtype=tl.float32)
    for i in tl.static_range(PARTS):
        total += tl.load(sums + (i * tokens + token) * OUT + outs, mask=exists, other=0.0)
    total *= tl.load(scale + outs, mask=exists, other=0.0)
    if bias is not None:
        total += tl.load(bias + outs, mask=exists, other=0.0).to(tl.float32)
    tl.store(result + token * OUT + outs, total.to(result.dtype.element_ty), mask=exists)
