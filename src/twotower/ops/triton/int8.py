"""Triton kernel of `linear_int8` for few tokens: reads the packed int8 weights once and upcasts them in registers.

Memory traffic of `out_proj` of the 30B shape (4096 → 2688, bf16) with 16 tokens: 10.5 MiB of weights; x, 128 KiB, is
read by 42 programs from the cache; 84 KiB of results. 42 programs cannot saturate the memory bandwidth of a GPU, so the
sum over inputs is split (split-K) in 7 parts, which a second launch adds in order: 1.1 MiB of fp32 written and read.
Importing this module needs Triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from twotower.ops.reference import int8 as reference
from twotower.ops.triton.gemm import OUTS, as_int16_pairs, gemm_tile, launch_config, max_tile_rows
from twotower.ops.triton.launch import contiguous_from, device_guard, tile_of

# Above this, torch is used. It moves 9 bytes per weight before multiplying (int8 read; bf16 written, transposed, read),
# which takes as long as twice this many tokens at a third of the tensor cores' rate.
MAX_TOKENS = 256
PROGRAMS = 264  # target: two per multiprocessor of an H100 (132)
MIN_SPLIT_INPUTS = 512  # with fewer, starting a program costs more than reading its weights
COLUMNS = 512  # outputs of a token per program that adds the parts


def linear_int8(x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `twotower.ops.reference.int8.linear`, without gradients."""
    width, out = x.shape[-1], len(scale)
    if not 0 < x.numel() <= MAX_TOKENS * width or not out:
        return reference.linear(x, q, scale, bias)
    flat = contiguous_from(x.reshape(-1, width), 1)
    tokens = len(flat)
    rows = min(max_tile_rows(x.dtype), tile_of(tokens))
    launch = launch_config(x.dtype, True, rows)
    tiles = triton.cdiv(tokens, rows)
    parts, part = split_k(width, triton.cdiv(out, OUTS) * tiles, launch.step)
    result = x.new_empty(tokens, out)
    sums = result if parts == 1 else torch.empty(parts, tokens, out, dtype=torch.float32, device=x.device)
    with device_guard(x):
        _linear_kernel[(triton.cdiv(out, OUTS), tiles, parts)](
            flat,
            as_int16_pairs(q),
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
            _reduce_splits_kernel[(tokens, triton.cdiv(out, COLUMNS))](
                sums, scale.contiguous(), bias, result, tokens, PARTS=parts, OUT=out, COLUMNS=COLUMNS, num_warps=4
            )
    return result.view(*x.shape[:-1], out)


def split_k(width: int, programs: int, step: int) -> tuple[int, int]:
    """Number of parts that a sum over `width` inputs is split in, and the length of one part.

    programs: the number of programs without a split. step: a part is a multiple of it.
    """
    parts = max(min(triton.cdiv(PROGRAMS, programs), width // MIN_SPLIT_INPUTS), 1)
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
    """Some outputs (axis 0) of a tile of tokens (axis 1) over a part of the inputs (axis 2).

    WHOLE: the part is all inputs, so the kernel also applies scale and bias.
    """
    first = tl.program_id(0) * OUTS
    token = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    live = token < tokens
    start = tl.program_id(2) * PART
    rows = x + token.to(tl.int64) * x_stride
    total = gemm_tile(rows, live, weight, first, start, PART, OUT, IN, True, ROWS, OUTS, STEP, OPERAND, PRECISION)
    outs = first + tl.arange(0, OUTS)
    exists = outs < OUT
    if WHOLE:
        total *= tl.load(scale + outs, mask=exists, other=0.0)[None, :]
        if bias is not None:
            total += tl.load(bias + outs, mask=exists, other=0.0).to(tl.float32)[None, :]
    at = sums + (tl.program_id(2) * tokens + token).to(tl.int64)[:, None] * OUT + outs[None, :]
    tl.store(at, total.to(sums.dtype.element_ty), mask=live[:, None] & exists[None, :])


@triton.jit(do_not_specialize=["tokens"])
def _reduce_splits_kernel(
    sums, scale, bias, result, tokens, PARTS: tl.constexpr, OUT: tl.constexpr, COLUMNS: tl.constexpr
):
    """One token (axis 0), some outputs (axis 1): adds the parts in order, then applies scale and bias."""
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
