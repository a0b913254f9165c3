"""Triton kernels of `route`: one for the products with the router's weight, one program a token for the choice.

Products are exact (of bf16, or "ieee") and their sums fp32. The columns of hidden and weight are shared out among
programs, always in the same way: one alone would take several µs to read the weight, and a token's scores do not depend
on how many others there are. Of equal scores the lowest expert id comes first.

Bytes moved for L = 16 at the 30B shape (128 experts, 2688 wide, bf16): the weight 672 KiB, hidden 84 KiB (again for
each 16 experts, from the cache), 56 KiB of fp32 between the kernels. Import this only where a kernel is to run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from twotower.ops.reference.routing import Routing
from twotower.ops.triton.launch import dense_from, device_of, tile_of

TOKENS = 16  # and experts, a program of the products
EXPERTS = 16
COLUMNS = 128  # of hidden at a time
SHARE = 384  # columns a program: at 2688 there are 7 times 8 programs for one tile of tokens


def route(hidden: Tensor, weight: Tensor, bias: Tensor, rule: Routing) -> tuple[Tensor, Tensor]:
    """As `twotower.ops.reference.routing.route`, without gradients."""
    tokens, width = hidden.shape
    experts = weight.shape[0]
    choice = torch.empty(tokens, rule.top, dtype=torch.int64, device=hidden.device)
    chosen = torch.empty(tokens, rule.top, dtype=torch.float32, device=hidden.device)
    if not choice.numel():
        return choice, chosen
    hidden, weight = dense_from(hidden, 1), weight.contiguous()
    parts = triton.cdiv(width, SHARE)
    sums = torch.empty(parts, tokens, experts, dtype=torch.float32, device=hidden.device)
    tile = tile_of(experts)
    with device_of(hidden):
        _product_kernel[triton.cdiv(tokens, TOKENS), triton.cdiv(experts, EXPERTS), parts](
            hidden,
            weight,
            sums,
            hidden.stride(0),
            tokens,
            COUNT=experts,
            WIDTH=width,
            SHARE=SHARE,
            TOKENS=TOKENS,
            EXPERTS=EXPERTS,
            COLUMNS=COLUMNS,
            WIDEN=hidden.dtype != weight.dtype,
            num_warps=2,
            num_stages=3,
        )
        _choice_kernel[(tokens,)](
            sums,
            bias.contiguous(),
            choice,
            chosen,
            tokens,
            float(rule.factor),
            COUNT=experts,
            PARTS=parts,
            GROUPS=rule.n_group,
            KEPT=rule.topk_group,
            TOP=rule.top,
            NORMALISE=rule.normalise,
            TILE=tile,
            TOP_TILE=triton.next_power_of_2(rule.top),
            num_warps=1 if tile <= 256 else 4,  # alone, a warp meets without a barrier
        )
    return choice, chosen


@triton.jit
def _product_kernel(
    hidden,
    weight,
    sums,
    hidden_token,
    tokens,
    COUNT: tl.constexpr,
    WIDTH: tl.constexpr,
    SHARE: tl.constexpr,
    TOKENS: tl.constexpr,
    EXPERTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Some tokens (axis 0), experts (axis 1) and columns (axis 2)."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    expert = tl.program_id(1) * EXPERTS + tl.arange(0, EXPERTS)
    here = token < tokens
    real = expert < COUNT
    hidden += token.to(tl.int64)[:, None] * hidden_token
    weight += expert[:, None] * WIDTH
    total = tl.zeros([TOKENS, EXPERTS], dtype=tl.float32)
    low = tl.program_id(2) * SHARE
    for begin in range(low, tl.minimum(low + SHARE, WIDTH), COLUMNS):
        column = begin + tl.arange(0, COLUMNS)
        exists = (column < WIDTH)[None, :]
        x = tl.load(hidden + column[None, :], mask=here[:, None] & exists, other=0.0)
        w = tl.load(weight + column[None, :], mask=real[:, None] & exists, other=0.0)
        if WIDEN:
            x = x.to(tl.float32)
            w = w.to(tl.float32)
        total = tl.dot(x, tl.trans(w), total, input_precision="ieee")
    place = (tl.program_id(2).to(tl.int64) * tokens + token) * COUNT
    tl.store(sums + place[:, None] + expert[None, :], total, mask=here[:, None] & real[None, :])


@triton.jit
def _first(values, ids, END: tl.constexpr):
    """The lowest of the ids whose value is the largest; a real one even where values are no numbers."""
    return tl.minimum(tl.min(tl.where(values == tl.max(values, axis=0), ids, END), axis=0), END - 1)


@triton.jit
def _choice_kernel(
    sums,
    bias,
    choice,
    chosen,
    tokens,
    factor,
    COUNT: tl.constexpr,
    PARTS: tl.constexpr,
    GROUPS: tl.constexpr,
    KEPT: tl.constexpr,
    TOP: tl.constexpr,
    NORMALISE: tl.constexpr,
    TILE: tl.constexpr,
    TOP_TILE: tl.constexpr,
):
    """One token: sigmoid, the choice among the kept groups, weights."""
    SIZE: tl.constexpr = COUNT // GROUPS
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, TILE)
    real = expert < COUNT
    logit = tl.zeros([TILE], dtype=tl.float32)
    for part in tl.static_range(PARTS):  # one after the other, so always in the same order; all are read at once
        logit += tl.load(sums + (part * tokens + token) * COUNT + expert, mask=real, other=0.0)
    score = tl.where(real, 1.0 / (1.0 + tl.exp(-logit)), 0.0)
    biased = score + tl.load(bias + expert, mask=real, other=0.0).to(tl.float32)
    biased = tl.where(real, biased, -float("inf"))

    if GROUPS > 1:
        group = expert // SIZE
        worth = tl.full([TILE], -float("inf"), dtype=tl.float32)  # of an expert's group: the sum of its two best
        for g in range(GROUPS):
            mine = tl.where(group == g, biased, -float("inf"))
            total = tl.max(mine, axis=0)
            if SIZE > 1:
                total += tl.max(tl.where(expert == _first(mine, expert, COUNT), -float("inf"), mine), axis=0)
            worth = tl.where(real & (group == g), total, worth)
        left = worth
        for _ in range(KEPT):
            left = tl.where(group == _first(left, expert, COUNT) // SIZE, -float("inf"), left)
        kept = left != worth
        biased = tl.where(real & (kept == 0), 0.0, biased)  # 0, not −∞: the reference's rule

    slot = tl.arange(0, TOP_TILE)
    ids = tl.zeros([TOP_TILE], dtype=tl.int32)
    weights = tl.zeros([TOP_TILE], dtype=tl.float32)
    for i in range(TOP):
        best = _first(biased, expert, COUNT)
        ids = tl.where(slot == i, best, ids)
        weights = tl.where(slot == i, tl.sum(tl.where(expert == best, score, 0.0), axis=0), weights)
        biased = tl.where(expert == best, -float("inf"), biased)
    if NORMALISE:
        weights = weights / (tl.sum(weights, axis=0) + 1e-20)
    tl.store(choice + token * TOP + slot, ids.to(tl.int64), mask=slot < TOP)
    tl.store(chosen + token * TOP + slot, weights * factor, mask=slot < TOP)
