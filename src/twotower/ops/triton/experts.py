"""Triton kernels of the operations on experts: read only the selected experts' weights, once per tile of tokens.

The host does not wait for the device. Four launches. `_group_kernel` orders the (token, expert) pairs by expert and
lists the tiles to compute. `_expert_kernel` multiplies a tile by `OUTS` outputs of its expert, once for `up`, with
`gate` if the experts have gates, and once for `down`. `_combine_kernel` sums each token's pairs in a fixed order. Grids
depend on shapes only; programs without a tile in the list exit at once.

Memory traffic of one layer of the 30B shapes (hidden 2688, expert width 1856): 19.0 MiB (bf16), 9.5 MiB (int8) or
5.4 MiB (int4) per selected expert: 6 experts in an AR step (114, 57 or 32 MiB), about 75 for a block of 16 tokens (1.4,
0.7 or 0.4 GiB). In addition, 0.3 MiB per pair from the cache (the pair's hidden row, read by 29 programs, and its inner
row, read by 42), and 5 KiB per pair of results, written and read. Importing this module needs Triton.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from twotower.ops.reference.experts import NOT_PACKED, Packed
from twotower.ops.reference.int8 import Int8Pair
from twotower.ops.triton.activation import activated
from twotower.ops.triton.gemm import (
    OUTS,
    Scheme,
    as_int16_pairs,
    gemm_tile,
    intermediate_dtype,
    launch_config,
    max_tile_rows,
)
from twotower.ops.triton.launch import contiguous_from, device_guard, tile_of
from twotower.specs import Activation

COMPARED = 128 * 128  # comparisons of pairs with experts that one program makes at once
LANES = 2048  # pairs per loop step
COLUMNS = 512  # outputs of a token per program


def experts(
    hidden: Tensor,
    topk_ids: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down: Tensor,
    activation: Activation,
    packed: Packed = NOT_PACKED,
) -> Tensor:
    """As `twotower.ops.reference.experts.experts_sorted`, without gradients. packed: ignored."""
    return _moe(hidden, topk_ids, weight, None if gate is None else _plain(gate), _plain(up), _plain(down), activation)


def experts_int8(
    hidden: Tensor,
    topk_ids: Tensor,
    weight: Tensor,
    gate: Int8Pair | None,
    up: Int8Pair,
    down: Int8Pair,
    activation: Activation,
) -> Tensor:
    """As `twotower.ops.reference.int8.experts_sorted`."""
    gates = None if gate is None else _packed(gate)
    return _moe(hidden, topk_ids, weight, gates, _packed(up), _packed(down), activation)


def experts_int4(
    hidden: Tensor,
    topk_ids: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down: Tensor,
    width: int,
    activation: Activation,
) -> Tensor:
    """As `twotower.ops.reference.int4.experts_sorted`. In bf16, weights are rounded to bf16."""
    gates = None if gate is None else _int4(gate, width)
    return _moe(hidden, topk_ids, weight, gates, _int4(up, width), _int4(down, hidden.shape[1]), activation)


class ExpertMatrices(NamedTuple):
    """The matrices of all experts: plain, packed int8 with its scale, or int4 data. outs: outputs of an expert."""

    matrix: Tensor
    scale: Tensor | None
    outs: int
    scheme: Scheme


def _plain(weight: Tensor) -> ExpertMatrices:
    return ExpertMatrices(weight.contiguous(), None, weight.shape[1], "none")


def _packed(pair: Int8Pair) -> ExpertMatrices:
    return ExpertMatrices(as_int16_pairs(pair[0]), pair[1].contiguous(), pair[1].shape[1], "int8")


def _int4(data: Tensor, outs: int) -> ExpertMatrices:
    return ExpertMatrices(data.contiguous(), None, outs, "int4")


def _moe(
    hidden: Tensor,
    topk_ids: Tensor,
    weight: Tensor,
    gate: ExpertMatrices | None,
    up: ExpertMatrices,
    down: ExpertMatrices,
    activation: Activation,
) -> Tensor:
    if not topk_ids.numel():
        return torch.zeros_like(hidden)
    hidden = contiguous_from(hidden, 1)
    mixed = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    width, top, count = hidden.shape[1], topk_ids.shape[1], len(up.matrix)
    rows = rows_per_tile(topk_ids.numel(), count, hidden.dtype)
    with device_guard(hidden):
        order, items = group_by_expert(topk_ids, count, rows)
        kept = intermediate_dtype(hidden.dtype)
        inner = hidden.new_empty(topk_ids.numel(), up.outs, dtype=kept)
        pairs = hidden.new_empty(topk_ids.numel(), width, dtype=kept)
        for x, own, gates, out, is_up in ((hidden, up, gate, inner, True), (inner, down, None, pairs, False)):
            launch = launch_config(hidden.dtype, own.scheme, rows, gates is not None)
            _expert_kernel[(len(items), triton.cdiv(out.shape[1], OUTS))](
                x,
                *own[:2],
                *((None, None) if gates is None else gates[:2]),
                out,
                order,
                items,
                x.stride(0),
                SIZE=own.matrix[0].numel(),
                SCHEME=own.scheme,
                IS_UP=is_up,
                KIND=activation,
                TOP=top,
                OUT=out.shape[1],
                IN=x.shape[1],
                ROWS=rows,
                OUTS=OUTS,
                STEP=launch.step,
                OPERAND=launch.operand,
                PRECISION=launch.precision,
                num_warps=launch.warps,
                num_stages=launch.stages,
            )
        _combine_kernel[(len(mixed), triton.cdiv(width, COLUMNS))](
            pairs, weight.contiguous(), mixed, TOP=top, WIDTH=width, COLUMNS=COLUMNS, num_warps=4
        )
    return mixed


def rows_per_tile(pairs: int, experts: int, dtype: torch.dtype) -> int:
    """Rows of a tile: the average number of pairs per expert, at least 16, because a smaller product takes as long."""
    return min(max_tile_rows(dtype), tile_of(triton.cdiv(pairs, experts)))


def group_by_expert(topk_ids: Tensor, experts: int, rows: int) -> tuple[Tensor, Tensor]:
    """Groups the (token, expert) pairs by expert: topk_ids (T, k) → order (T·k,) and items (tiles, 3).

    order: the pairs, numbered token by token, grouped by expert. items: for each tile of at most `rows` pairs, its
    expert, its first index in `order` and the end of the expert's indices; an expert of −1 marks an unused tile.
    """
    pairs = topk_ids.numel()
    every = triton.next_power_of_2(experts)
    # Few pairs: tiles are dense at the front. Many: each expert computes the index of its tiles on its own.
    small = pairs <= min(experts, COMPARED // every)
    max_tiles = pairs if small else experts + pairs // rows
    order = torch.empty(pairs, dtype=torch.int32, device=topk_ids.device)
    items = torch.empty(max_tiles, 3, dtype=torch.int32, device=topk_ids.device)
    _group_kernel[(experts,)](
        topk_ids.contiguous(),
        order,
        items,
        pairs,
        SMALL=small,
        EXPERTS=experts,
        EVERY=every,
        ROWS=rows,
        LANES=tile_of(min(experts, COMPARED // every)) if small else LANES,
        num_warps=4,
    )
    return order, items


# --- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["pairs"])
def _group_kernel(
    topk_ids,
    order,
    items,
    pairs,
    SMALL: tl.constexpr,
    EXPERTS: tl.constexpr,
    EVERY: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    """One expert (axis 0): writes its pairs to `order` and its tiles to `items`."""
    expert = tl.program_id(0)
    lane = tl.arange(0, LANES)
    before = tl.zeros([LANES], dtype=tl.int32)
    own = tl.zeros([LANES], dtype=tl.int32)
    at = 0
    while at < pairs:  # Triton's interpreter has no range with a runtime bound
        chosen = tl.load(topk_ids + at + lane, mask=at + lane < pairs, other=EXPERTS).to(tl.int32)
        before += (chosen < expert).to(tl.int32)
        own += (chosen == expert).to(tl.int32)
        at += LANES
    first = tl.sum(before, axis=0)
    end = first + tl.sum(own, axis=0)

    filled = first
    at = 0
    while at < pairs:
        chosen = tl.load(topk_ids + at + lane, mask=at + lane < pairs, other=EXPERTS).to(tl.int32)
        mine = (chosen == expert).to(tl.int32)
        place = filled + tl.cumsum(mine, axis=0) - 1
        tl.store(order + place, at + lane, mask=mine != 0)
        filled += tl.sum(mine, axis=0)
        at += LANES

    if SMALL:  # one vector holds all pairs: each program counts the tiles of every expert
        every = tl.arange(0, EVERY)
        chosen = tl.load(topk_ids + lane, mask=lane < pairs, other=EXPERTS).to(tl.int32)
        counts = tl.sum((chosen[None, :] == every[:, None]).to(tl.int32), axis=1)
        tiles = tl.where(every < EXPERTS, (counts + ROWS - 1) // ROWS, 0)
        slot = tl.sum(tl.where(every < expert, tiles, 0), axis=0)
        next_slot = slot + (end - first + ROWS - 1) // ROWS
        if expert == EXPERTS - 1:
            tl.store(items + lane * 3, lane * 0 - 1, mask=(lane >= next_slot) & (lane < pairs))
    else:  # distinct, ordered index ranges, each at least as long as the expert's tiles
        slot = first // ROWS + expert
        next_slot = end // ROWS + expert + 1
        if expert == EXPERTS - 1:
            next_slot = pairs // ROWS + EXPERTS
    begin = first
    while slot < next_slot:
        tl.store(items + slot * 3, tl.where(begin < end, expert, -1))
        tl.store(items + slot * 3 + 1, begin)
        tl.store(items + slot * 3 + 2, end)
        begin += ROWS
        slot += 1


@triton.jit
def _expert_kernel(
    x,
    weight,
    scale,
    gate,
    gate_scale,
    out,
    order,
    items,
    x_stride,
    SIZE: tl.constexpr,
    SCHEME: tl.constexpr,
    IS_UP: tl.constexpr,
    KIND: tl.constexpr,
    TOP: tl.constexpr,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    ROWS: tl.constexpr,
    OUTS: tl.constexpr,
    STEP: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of pairs of one expert (axis 0), some outputs (axis 1).

    IS_UP: reads tokens, writes pairs in the order of `order`, applies the activation of KIND; otherwise reads that
    order and writes pairs token by token. SIZE: elements of one expert's matrix.
    """
    item = items + tl.program_id(0).to(tl.int64) * 3
    expert = tl.load(item).to(tl.int64)
    begin = tl.load(item + 1)
    end = tl.load(item + 2)
    if expert < 0:
        return
    place = begin + tl.arange(0, ROWS)
    live = place < end
    pair = tl.load(order + place, mask=live, other=0)
    if IS_UP:
        source = pair // TOP
        target = place
    else:
        source = place
        target = pair
    first = tl.program_id(1) * OUTS
    rows = x + source.to(tl.int64) * x_stride
    outs = first + tl.arange(0, OUTS)
    exists = outs < OUT
    if gate is not None:
        gates = gemm_tile(
            rows, live, gate + expert * SIZE, first, 0, IN, OUT, IN, SCHEME, ROWS, OUTS, STEP, OPERAND, PRECISION
        )
        if SCHEME == "int8":
            gates *= tl.load(gate_scale + expert * OUT + outs, mask=exists, other=0.0)[None, :]
        gates = activated(gates, KIND)
    total = gemm_tile(
        rows, live, weight + expert * SIZE, first, 0, IN, OUT, IN, SCHEME, ROWS, OUTS, STEP, OPERAND, PRECISION
    )
    if SCHEME == "int8":
        total *= tl.load(scale + expert * OUT + outs, mask=exists, other=0.0)[None, :]
    if gate is not None:
        total *= gates
    elif IS_UP:  # rounds before the activation, as torch does
        total = activated(total.to(out.dtype.element_ty).to(tl.float32), KIND)
    at = out + target.to(tl.int64)[:, None] * OUT + outs[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=live[:, None] & exists[None, :])


@triton.jit
def _combine_kernel(pairs, weight, mixed, TOP: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """One token (axis 0), some columns (axis 1): the weighted sum of the token's pairs."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    exists = column < WIDTH
    total = tl.zeros([COLUMNS], dtype=tl.float32)
    for i in tl.static_range(TOP):
        pair = token * TOP + i
        value = tl.load(pairs + pair * WIDTH + column, mask=exists, other=0.0).to(tl.float32)
        total += value * tl.load(weight + pair).to(tl.float32)
    tl.store(mixed + token * WIDTH + column, total.to(mixed.dtype.element_ty), mask=exists)
