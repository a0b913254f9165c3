"""Triton kernels of `linear_int8` and `linear_int4` for few tokens: packed weights are read once.

The kernels dequantise them in registers.

Memory traffic of `out_proj` of the 30B shape (4096 → 2688, bf16) with 16 tokens: 10.5 MiB (int8) or 5.9 MiB (int4) of
weights; x, 128 KiB, is read by 42 programs from the cache; 84 KiB of results. 42 programs cannot saturate the memory
bandwidth of a GPU, so the sum over inputs is split (split-K) in 7 parts, which a second launch adds in order: 1.1 MiB
of fp32 written and read. The parts depend on the weight only. With several tiles of tokens a program adds all parts
itself, in the same order, so a token's sum does not depend on the number of tokens. Importing this module needs Triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from twotower.ops.reference import int4, int8
from twotower.ops.triton.gemm import OUTS, Scheme, as_int16_pairs, gemm_tile, launch_config, max_tile_rows
from twotower.ops.triton.launch import contiguous_from, device_guard, tile_of

# Above this, torch is used. It moves 9 bytes per int8 weight before multiplying (int8 read; bf16 written, transposed,
# read), which takes as long as twice this many tokens at a third of the tensor cores' rate. Of an int4 weight it moves
# about 30 bytes.
MAX_TOKENS, MAX_TOKENS_INT4 = 256, 1024
PROGRAMS = 264  # target: two per multiprocessor of an H100 (132)
MIN_SPLIT_INPUTS = 512  # with fewer, starting a program costs more than reading its weights
PART_STEP = 128  # a part is a multiple of every step
COLUMNS = 512  # outputs of a token per program that adds the parts


def linear_int8(x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `twotower.ops.reference.int8.linear`, without gradients."""
    if not 0 < x.numel() <= MAX_TOKENS * x.shape[-1] or not len(scale):
        return int8.linear(x, q, scale, bias)
    return _linear(x, "int8", as_int16_pairs(q), scale.contiguous(), len(scale), bias)


def linear_int4(x: Tensor, data: Tensor, out: int, bias: Tensor | None = None) -> Tensor:
    """As `twotower.ops.reference.int4.linear`, without gradients. In bf16, weights are rounded to bf16 as there."""
    if not 0 < x.numel() <= MAX_TOKENS_INT4 * x.shape[-1] or not out:
        return int4.linear(x, data, out, bias)
    return _linear(x, "int4", data.contiguous(), None, out, bias)


def _linear(x: Tensor, scheme: Scheme, weight: Tensor, scale: Tensor | None, out: int, bias: Tensor | None) -> Tensor:
    width = x.shape[-1]
    flat = contiguous_from(x.reshape(-1, width), 1)
    tokens = len(flat)
    rows = min(max_tile_rows(x.dtype), tile_of(tokens))
    launch = launch_config(x.dtype, scheme, rows)
    tiles, columns = triton.cdiv(tokens, rows), triton.cdiv(out, OUTS)
    parts, part = split_k(width, columns)
    split = parts > 1 and tiles * columns < PROGRAMS // 2
    result = x.new_empty(tokens, out)
    sums = torch.empty(parts, tokens, out, dtype=torch.float32, device=x.device) if split else result
    with device_guard(x):
        _linear_kernel[(columns, tiles, parts if split else 1)](
            flat,
            weight,
            scale,
            bias,
            sums,
            flat.stride(0),
            tokens,
            SCHEME=scheme,
            PART=part,
            PARTS=1 if split else parts,
            WHOLE=not split,
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
        if split:
            _reduce_splits_kernel[(tokens, triton.cdiv(out, COLUMNS))](
                sums, scale, bias, result, tokens, PARTS=parts, OUT=out, COLUMNS=COLUMNS, num_warps=4
            )
    return result.view(*x.shape[:-1], out)


def split_k(width: int, columns: int) -> tuple[int, int]:
    """Number of parts that a sum over `width` inputs is split in, and the length of one part.

    columns: the number of programs of a tile of tokens without a split.
    """
    parts = max(min(triton.cdiv(PROGRAMS, columns), width // MIN_SPLIT_INPUTS), 1)
    part = triton.cdiv(triton.cdiv(width, parts), PART_STEP) * PART_STEP
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
    SCHEME: tl.constexpr,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
    WHOLE: tl.constexpr,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    ROWS: tl.constexpr,
    OUTS: tl.constexpr,
    STEP: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Some outputs (axis 0) of a tile of tokens (axis 1) over PARTS parts of the inputs, from part number (axis 2) on.

    WHOLE: the parts are all inputs, so the kernel also applies scale and bias. scale: None for int4.
    """
    first = tl.program_id(0) * OUTS
    token = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    live = token < tokens
    start = tl.program_id(2) * PART
    rows = x + token.to(tl.int64) * x_stride
    total = tl.zeros([ROWS, OUTS], dtype=tl.float32)
    for i in range(PARTS):
        at = start + i * PART
        total += gemm_tile(rows, live, weight, first, at, PART, OUT, IN, SCHEME, ROWS, OUTS, STEP, OPERAND, PRECISION)
    outs = first + tl.arange(0, OUTS)
    exists = outs < OUT
    if WHOLE:
        if scale is not None:
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
    if scale is not None:
        total *= tl.load(scale + outs, mask=exists, other=0.0)
    if bias is not None:
        total += tl.load(bias + outs, mask=exists, other=0.0).to(tl.float32)
    tl.store(result + token * OUT + outs, total.to(result.dtype.element_ty), mask=exists)
