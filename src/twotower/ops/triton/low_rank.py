"""Triton kernels of `low_rank`: the updates of up to three linear layers that read one input, in two launches.

The first kernel multiplies the input by all a. A rank of 16 is one tile of outputs, so the sum over inputs is split
among programs (split-K). The second kernel adds the parts in order, multiplies them by b, and adds the products to the
outputs in place. Both kernels read on the device at which tokens the updates act. A tile without such a token exits at
once; other tokens are not written, so they keep their bits. The parts depend on the width of the input only, so a
token's update does not depend on the number of tokens. Importing this module needs Triton.

Memory traffic of `in_proj` of the 30B shape (2688 → 10304, bf16) with rank 16 and 16 tokens: a 84 KiB and b 322 KiB; x
84 KiB; 7 KiB of fp32 parts, which 161 programs read from the cache; 322 KiB of outputs read and written. The product
itself reads 53 MiB of weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from twotower.ops.reference.low_rank import TensorPair
from twotower.ops.triton.gemm import OUTS, gemm_tile, launch_config, max_tile_rows
from twotower.ops.triton.launch import contiguous_from, device_guard, tile_of

LAYERS = 3  # of a launch: queries, keys and values
MIN_PART_INPUTS = 256  # with fewer, starting a program costs more than its products
MAX_PARTS = 16  # every program of the second kernel adds all parts
PART_STEP = 128  # a part is a multiple of every step


def low_rank(
    outs: Sequence[Tensor], x: Tensor, adapters: Sequence[TensorPair], positions: Tensor
) -> tuple[Tensor, ...]:
    """As `twotower.ops.reference.low_rank.low_rank`, without gradients. Contiguous outputs are changed in place."""
    new = tuple(out.contiguous() for out in outs)
    if not x.numel():
        return new
    flat = contiguous_from(x.reshape(-1, x.shape[-1]), 1)
    acts = positions.bool().contiguous().view(torch.uint8)
    with device_guard(x):
        for begin in range(0, len(new), LAYERS):
            _update(new[begin : begin + LAYERS], flat, adapters[begin : begin + LAYERS], acts)
    return new


def _update(outs: Sequence[Tensor], x: Tensor, adapters: Sequence[TensorPair], acts: Tensor) -> None:
    """Changes the outputs (…, out) of up to `LAYERS` layers over x (T, in) where `acts` (T) is not 0."""
    (tokens, width), rank, count = x.shape, len(adapters[0][0]), len(outs)
    assert all(len(a) == rank for a, _ in adapters), "the adapters of a tower have one rank"
    rows, rank_tile = min(max_tile_rows(x.dtype), tile_of(tokens)), min(OUTS, tile_of(rank))
    launch, (number, part) = launch_config(x.dtype, "none", rows), split_k(width)
    parts = x.new_empty(number, tokens, count * rank, dtype=torch.float32)
    absent = (None,) * (LAYERS - count)
    sizes = [out.shape[-1] for out in outs] + [0] * (LAYERS - count)
    tiles, columns = triton.cdiv(tokens, rows), sum(triton.cdiv(size, OUTS) for size in sizes)
    given = {"RANK": rank, "RANKS": count * rank, "ROWS": rows, "OPERAND": launch.operand}
    given |= {"PRECISION": launch.precision, "num_warps": launch.warps}
    _reduce_kernel[(count * triton.cdiv(rank, rank_tile), tiles, number)](
        *(x, acts),
        *(*(a.contiguous() for a, _ in adapters), *absent),
        *(parts, x.stride(0), tokens),
        IN=width,
        PART=part,
        OUTS=rank_tile,
        STEP=launch.step,
        num_stages=launch.stages,
        **given,
    )
    _expand_kernel[(columns, tiles)](
        *(parts, acts),
        *(*(b.contiguous() for _, b in adapters), *absent),
        *(*outs, *absent),
        tokens,
        **dict(zip(("OUT0", "OUT1", "OUT2"), sizes, strict=True)),
        PARTS=number,
        RANK_TILE=rank_tile,
        OUTS=OUTS,
        **given,
    )


def split_k(width: int) -> tuple[int, int]:
    """The number of parts of a sum over `width` inputs, and the length of one part."""
    number = max(min(MAX_PARTS, width // MIN_PART_INPUTS), 1)
    part = triton.cdiv(triton.cdiv(width, number), PART_STEP) * PART_STEP
    return triton.cdiv(width, part), part


@triton.jit(do_not_specialize=["tokens"])
def _reduce_kernel(
    x,
    acts,
    a0,
    a1,
    a2,
    parts,
    x_stride,
    tokens,
    IN: tl.constexpr,
    PART: tl.constexpr,
    OUTS: tl.constexpr,
    STEP: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    ROWS: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Some values of the rank of one layer (axis 0) of a tile of tokens (axis 1) over one part of the inputs (axis 2).

    Each layer has RANK columns of `parts`, in order.
    """
    TILES: tl.constexpr = (RANK + OUTS - 1) // OUTS
    layer = tl.program_id(0) // TILES
    first = tl.program_id(0) % TILES * OUTS
    token = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    live = tl.load(acts + token, mask=token < tokens, other=0) != 0
    if tl.max(live.to(tl.int32), axis=0) == 0:
        return
    a = a0
    if a1 is not None:
        second = layer == 1
        if second:
            a = a1
    if a2 is not None:
        third = layer == 2
        if third:
            a = a2
    rows = x + token.to(tl.int64) * x_stride
    start = tl.program_id(2) * PART
    low = gemm_tile(rows, live, a, first, start, PART, RANK, IN, "none", ROWS, OUTS, STEP, OPERAND, PRECISION)
    rank = first + tl.arange(0, OUTS)
    place = (tl.program_id(2) * tokens + token).to(tl.int64) * RANKS + layer * RANK
    tl.store(parts + place[:, None] + rank[None, :], low, mask=live[:, None] & (rank < RANK)[None, :])


@triton.jit
def _add_tile(
    parts,
    token,
    live,
    tokens,
    b,
    out,
    first,
    column: tl.constexpr,
    OUT: tl.constexpr,
    PARTS: tl.constexpr,
    RANK_TILE: tl.constexpr,
    OUTS: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    ROWS: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds the update to the outputs of one layer from `first` on, for a tile of tokens.

    column: the layer's first column of `parts`.
    """
    outs = first + tl.arange(0, OUTS)
    exists = outs < OUT
    total = tl.zeros([ROWS, OUTS], dtype=tl.float32)
    for begin in tl.static_range(0, RANK, RANK_TILE):
        rank = begin + tl.arange(0, RANK_TILE)
        here = rank < RANK
        low = tl.zeros([ROWS, RANK_TILE], dtype=tl.float32)
        for i in tl.static_range(PARTS):
            place = (i * tokens + token).to(tl.int64) * RANKS + column
            low += tl.load(parts + place[:, None] + rank[None, :], mask=live[:, None] & here[None, :], other=0.0)
        of_out = b + outs[None, :] * RANK + rank[:, None]
        weight = tl.load(of_out, mask=here[:, None] & exists[None, :], other=0.0).to(OPERAND)
        total = tl.dot(low.to(OPERAND), weight, total, input_precision=PRECISION)
    at = out + token.to(tl.int64)[:, None] * OUT + outs[None, :]
    there = live[:, None] & exists[None, :]
    before = tl.load(at, mask=there, other=0.0).to(tl.float32)
    tl.store(at, (before + total).to(out.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["tokens"])
def _expand_kernel(
    parts,
    acts,
    b0,
    b1,
    b2,
    out0,
    out1,
    out2,
    tokens,
    OUT0: tl.constexpr,
    OUT1: tl.constexpr,
    OUT2: tl.constexpr,
    PARTS: tl.constexpr,
    RANK_TILE: tl.constexpr,
    OUTS: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    ROWS: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Some outputs of one layer (axis 0; the tiles of all layers in order) of a tile of tokens (axis 1)."""
    SECOND: tl.constexpr = (OUT0 + OUTS - 1) // OUTS
    THIRD: tl.constexpr = SECOND + (OUT1 + OUTS - 1) // OUTS
    tile = tl.program_id(0)
    token = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    live = tl.load(acts + token, mask=token < tokens, other=0) != 0
    if tl.max(live.to(tl.int32), axis=0) == 0:
        return
    if tile < SECOND:
        _add_tile(
            parts,
            token,
            live,
            tokens,
            b0,
            out0,
            tile * OUTS,
            0,
            OUT0,
            PARTS,
            RANK_TILE,
            OUTS,
            RANK,
            RANKS,
            ROWS,
            OPERAND,
            PRECISION,
        )
    if b1 is not None:
        second = (tile >= SECOND) & (tile < THIRD)
        if second:
            _add_tile(
                parts,
                token,
                live,
                tokens,
                b1,
                out1,
                (tile - SECOND) * OUTS,
                RANK,
                OUT1,
                PARTS,
                RANK_TILE,
                OUTS,
                RANK,
                RANKS,
                ROWS,
                OPERAND,
                PRECISION,
            )
    if b2 is not None:
        third = tile >= THIRD
        if third:
            _add_tile(
                parts,
                token,
                live,
                tokens,
                b2,
                out2,
                (tile - THIRD) * OUTS,
                2 * RANK,
                OUT2,
                PARTS,
                RANK_TILE,
                OUTS,
                RANK,
                RANKS,
                ROWS,
                OPERAND,
                PRECISION,
            )
