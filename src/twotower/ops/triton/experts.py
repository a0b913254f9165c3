"""Triton kernels of `experts` and `experts_int8`: every chosen expert's weights are read once for a tile of tokens, no
other's, and the host waits for nothing.

Four launches: `_plan_kernel` puts the (token, expert) pairs in the order of their experts and lists the tiles that
there are to do; `_expert_kernel` multiplies a tile by `OUTS` outputs of its expert, once for `up` and once for `down`;
`_mixture_kernel` sums each token's pairs, always in the same order. Grids depend on shapes alone: those programs for
which the list has no tile end at once.

Bytes moved for a layer of the 30B shapes (hidden 2688, experts of 1856): 19.0 MiB of bf16 or 9.5 MiB of int8 for each
expert that is chosen, 6 in an AR step (114 or 57 MiB), some 75 for a block of 16 tokens (1.4 or 0.7 GiB); beside them
each pair's hidden row, read by 29 programs, and its inner row, read by 42, 0.3 MiB a pair from the cache; and 5 KiB a
pair of results, written and read. Import this only where a kernel is to run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from twotower.ops.reference.experts import PackedPair
from twotower.ops.triton.gemm import OUTS, in_pairs, kept_in, launch_of, most_rows, product
from twotower.ops.triton.launch import dense_from, device_of, tile_of

COMPARED = 128 * 128  # of pairs with experts, at once by one program
LANES = 2048  # pairs that a program looks at together
COLUMNS = 512  # of a token's result, a program


def experts(
    hidden: Tensor, choice: Tensor, weight: Tensor, up: Tensor, down: Tensor, packed: PackedPair = (None, None)
) -> Tensor:
    """As `twotower.ops.reference.experts.experts_sorted`, without gradients. packed: not read."""
    return _mixture(hidden, choice, weight, (up.contiguous(), None), (down.contiguous(), None), up.shape[1])


def experts_int8(
    hidden: Tensor, choice: Tensor, weight: Tensor, up: Tensor, up_scale: Tensor, down: Tensor, down_scale: Tensor
) -> Tensor:
    """As `twotower.ops.reference.int8.experts_sorted`."""
    both = (in_pairs(up), up_scale.contiguous()), (in_pairs(down), down_scale.contiguous())
    return _mixture(hidden, choice, weight, *both, up_scale.shape[1])


Weights = tuple[Tensor, Tensor | None]  # as they lie, or int8 and its scale


def _mixture(hidden: Tensor, choice: Tensor, weight: Tensor, up: Weights, down: Weights, inner: int) -> Tensor:
    """inner: the experts' width I."""
    if not choice.numel():
        return torch.zeros_like(hidden)
    hidden = dense_from(hidden, 1)
    mixed = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    width, top, count = hidden.shape[1], choice.shape[1], len(up[0])
    rows = rows_of_a_tile(choice.numel(), count, hidden.dtype)
    with device_of(hidden):
        order, items = plan(choice, count, rows)
        kept = kept_in(hidden.dtype)
        activated = hidden.new_empty(choice.numel(), inner, dtype=kept)
        pairs = hidden.new_empty(choice.numel(), width, dtype=kept)
        for x, (matrix, scale), out, is_up in ((hidden, up, activated, True), (activated, down, pairs, False)):
            launch = launch_of(hidden.dtype, scale is not None, rows)
            _expert_kernel[(len(items), triton.cdiv(out.shape[1], OUTS))](
                x,
                matrix,
                scale,
                out,
                order,
                items,
                x.stride(0),
                IS_UP=is_up,
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
        _mixture_kernel[(len(mixed), triton.cdiv(width, COLUMNS))](
            pairs, weight.contiguous(), mixed, TOP=top, WIDTH=width, COLUMNS=COLUMNS, num_warps=4
        )
    return mixed


def rows_of_a_tile(pairs: int, experts: int, dtype: torch.dtype) -> int:
    """As many as an expert has on average, 16 at least: a product of fewer takes as long."""
    return min(most_rows(dtype), tile_of(triton.cdiv(pairs, experts)))


def plan(choice: Tensor, experts: int, rows: int) -> tuple[Tensor, Tensor]:
    """choice (T, k) → order (T·k,): the pairs, token by token, grouped by expert; items (tiles, 3): for each tile of at
    most `rows` pairs its expert, its first place in `order` and where the expert's places end, or −1 and what not."""
    pairs = choice.numel()
    every = triton.next_power_of_2(experts)
    # Few pairs: as many tiles as there can be, at the front. Many: an expert's tiles at places that it knows alone.
    few = pairs <= min(experts, COMPARED // every)
    most = pairs if few else experts + pairs // rows
    order = torch.empty(pairs, dtype=torch.int32, device=choice.device)
    items = torch.empty(most, 3, dtype=torch.int32, device=choice.device)
    _plan_kernel[(experts,)](
        choice.contiguous(),
        order,
        items,
        pairs,
        FEW=few,
        EXPERTS=experts,
        EVERY=every,
        ROWS=rows,
        LANES=tile_of(min(experts, COMPARED // every)) if few else LANES,
        num_warps=4,
    )
    return order, items


# --- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["pairs"])
def _plan_kernel(
    choice,
    order,
    items,
    pairs,
    FEW: tl.constexpr,
    EXPERTS: tl.constexpr,
    EVERY: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    """One expert (axis 0): where its pairs stand in `order`, and its tiles in `items`."""
    expert = tl.program_id(0)
    lane = tl.arange(0, LANES)
    before = tl.zeros([LANES], dtype=tl.int32)
    own = tl.zeros([LANES], dtype=tl.int32)
    at = 0
    while at < pairs:  # the interpreter knows no range up to an argument
        chosen = tl.load(choice + at + lane, mask=at + lane < pairs, other=EXPERTS).to(tl.int32)
        before += (chosen < expert).to(tl.int32)
        own += (chosen == expert).to(tl.int32)
        at += LANES
    first = tl.sum(before, axis=0)
    end = first + tl.sum(own, axis=0)

    filled = first
    at = 0
    while at < pairs:
        chosen = tl.load(choice + at + lane, mask=at + lane < pairs, other=EXPERTS).to(tl.int32)
        mine = (chosen == expert).to(tl.int32)
        place = filled + tl.cumsum(mine, axis=0) - 1
        tl.store(order + place, at + lane, mask=mine != 0)
        filled += tl.sum(mine, axis=0)
        at += LANES

    if FEW:  # the pairs are one vector: every expert's tiles can be counted here
        every = tl.arange(0, EVERY)
        chosen = tl.load(choice + lane, mask=lane < pairs, other=EXPERTS).to(tl.int32)
        counts = tl.sum((chosen[None, :] == every[:, None]).to(tl.int32), axis=1)
        tiles = tl.where(every < EXPERTS, (counts + ROWS - 1) // ROWS, 0)
        slot = tl.sum(tl.where(every < expert, tiles, 0), axis=0)
        next_slot = slot + (end - first + ROWS - 1) // ROWS
        if expert == EXPERTS - 1:
            tl.store(items + lane * 3, lane * 0 - 1, mask=(lane >= next_slot) & (lane < pairs))
    else:  # unlike in every two experts, in order, and at least as many as it has tiles
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
    out,
    order,
    items,
    x_stride,
    IS_UP: tl.constexpr,
    TOP: tl.constexpr,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    ROWS: tl.constexpr,
    OUTS: tl.constexpr,
    STEP: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of pairs of one expert (axis 0), some outputs (axis 1). IS_UP: from tokens to pairs in order, relu(…)²;
    else from pairs in order to pairs token by token."""
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
    INT8: tl.constexpr = scale is not None
    SIZE: tl.constexpr = (OUT + 15) // 16 * 8 * IN if INT8 else OUT * IN  # of an expert, in elements as they are loaded
    total = product(
        rows, live, weight + expert * SIZE, first, 0, IN, OUT, IN, INT8, ROWS, OUTS, STEP, OPERAND, PRECISION
    )
    outs = first + tl.arange(0, OUTS)
    exists = outs < OUT
    if INT8:
        total *= tl.load(scale + expert * OUT + outs, mask=exists, other=0.0)[None, :]
    result = total.to(out.dtype.element_ty)
    if IS_UP:  # each rounded, as torch does
        positive = tl.maximum(result.to(tl.float32), 0.0, propagate_nan=tl.PropagateNan.ALL)
        result = (positive * positive).to(out.dtype.element_ty)
    at = out + target.to(tl.int64)[:, None] * OUT + outs[None, :]
    tl.store(at, result, mask=live[:, None] & exists[None, :])


@triton.jit
def _mixture_kernel(pairs, weight, mixed, TOP: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """One token (axis 0), some columns (axis 1)."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    exists = column < WIDTH
    total = tl.zeros([COLUMNS], dtype=tl.float32)
    for i in tl.static_range(TOP):
        pair = token * TOP + i
        value = tl.load(pairs + pair * WIDTH + column, mask=exists, other=0.0).to(tl.float32)
        total += value * tl.load(weight + pair).to(tl.float32)
    tl.store(mixed + token * WIDTH + column, total.to(mixed.dtype.element_ty), mask=exists)
