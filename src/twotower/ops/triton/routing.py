"""Triton kernels of `route`: `_logits_kernel` computes the router logits, `_topk_kernel` selects experts.

Products are exact (bf16 inputs, or "ieee") with fp32 sums. Programs split the columns of hidden and weight, because one
program alone would need several µs to read the weight. The split is always the same, so a token's scores do not depend
on the number of tokens. Of equal scores the lowest expert id comes first.

Memory traffic of L = 16 tokens at the 30B shape (128 experts, width 2688, bf16): weight 672 KiB, hidden 84 KiB (again
per 16 experts, from the cache), 56 KiB of fp32 between the kernels. Importing this module needs Triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from twotower.ops.reference.routing import Routing
from twotower.ops.triton.launch import contiguous_from, device_guard, tile_of

TOKENS = 16  # tokens and experts per program of `_logits_kernel`
EXPERTS = 16
COLUMNS = 128  # columns of hidden per loop step
SHARE = 384  # columns per program: 7 × 8 programs per tile of tokens at the 30B shape


def route(hidden: Tensor, weight: Tensor, bias: Tensor | None, rule: Routing) -> tuple[Tensor, Tensor]:
    """As `twotower.ops.reference.routing.route`, without gradients."""
    tokens, width = hidden.shape
    experts = weight.shape[0]
    topk_ids = torch.empty(tokens, rule.top, dtype=torch.int64, device=hidden.device)
    topk_weights = torch.empty(tokens, rule.top, dtype=torch.float32, device=hidden.device)
    if not topk_ids.numel():
        return topk_ids, topk_weights
    hidden, weight = contiguous_from(hidden, 1), weight.contiguous()
    parts = triton.cdiv(width, SHARE)
    sums = torch.empty(parts, tokens, experts, dtype=torch.float32, device=hidden.device)
    tile = tile_of(experts)
    with device_guard(hidden):
        _logits_kernel[triton.cdiv(tokens, TOKENS), triton.cdiv(experts, EXPERTS), parts](
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
            UPCAST=hidden.dtype != weight.dtype,
            num_warps=2,
            num_stages=3,
        )
        _topk_kernel[(tokens,)](
            sums,
            None if bias is None else bias.contiguous(),
            topk_ids,
            topk_weights,
            tokens,
            float(rule.factor),
            COUNT=experts,
            SOFTMAX=rule.scores == "softmax",
            PARTS=parts,
            GROUPS=rule.n_group,
            KEPT=rule.topk_group,
            TOP=rule.top,
            NORMALISE=rule.normalise,
            TILE=tile,
            TOP_TILE=triton.next_power_of_2(rule.top),
            num_warps=1 if tile <= 256 else 4,  # a single warp needs no barrier
        )
    return topk_ids, topk_weights


@triton.jit
def _logits_kernel(
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
    UPCAST: tl.constexpr,
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
        if UPCAST:
            x = x.to(tl.float32)
            w = w.to(tl.float32)
        total = tl.dot(x, tl.trans(w), total, input_precision="ieee")
    place = (tl.program_id(2).to(tl.int64) * tokens + token) * COUNT
    tl.store(sums + place[:, None] + expert[None, :], total, mask=here[:, None] & real[None, :])


@triton.jit
def _lowest_argmax(values, ids, END: tl.constexpr):
    """The lowest id with the largest value; a valid id also if values are NaN."""
    return tl.minimum(tl.min(tl.where(values == tl.max(values, axis=0), ids, END), axis=0), END - 1)


@triton.jit
def _topk_kernel(
    sums,
    bias,
    topk_ids,
    topk_weights,
    tokens,
    factor,
    COUNT: tl.constexpr,
    SOFTMAX: tl.constexpr,
    PARTS: tl.constexpr,
    GROUPS: tl.constexpr,
    KEPT: tl.constexpr,
    TOP: tl.constexpr,
    NORMALISE: tl.constexpr,
    TILE: tl.constexpr,
    TOP_TILE: tl.constexpr,
):
    """One token: scores, selection within the kept groups, expert weights."""
    SIZE: tl.constexpr = COUNT // GROUPS
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, TILE)
    real = expert < COUNT
    logit = tl.zeros([TILE], dtype=tl.float32)
    for part in tl.static_range(PARTS):  # fixed order of summation; all loads are issued at once
        logit += tl.load(sums + (part * tokens + token) * COUNT + expert, mask=real, other=0.0)
    if SOFTMAX:
        power = tl.exp(logit - tl.max(tl.where(real, logit, -float("inf")), axis=0))
        score = tl.where(real, power, 0.0)
        score /= tl.sum(score, axis=0)
    else:
        score = tl.where(real, 1.0 / (1.0 + tl.exp(-logit)), 0.0)
    biased = score
    if bias is not None:
        biased = score + tl.load(bias + expert, mask=real, other=0.0).to(tl.float32)
    biased = tl.where(real, biased, -float("inf"))

    if GROUPS > 1:
        group = expert // SIZE
        group_score = tl.full([TILE], -float("inf"), dtype=tl.float32)  # the sum of the group's two best
        for g in range(GROUPS):
            mine = tl.where(group == g, biased, -float("inf"))
            total = tl.max(mine, axis=0)
            if SIZE > 1:
                total += tl.max(tl.where(expert == _lowest_argmax(mine, expert, COUNT), -float("inf"), mine), axis=0)
            group_score = tl.where(real & (group == g), total, group_score)
        left = group_score
        for _ in range(KEPT):
            left = tl.where(group == _lowest_argmax(left, expert, COUNT) // SIZE, -float("inf"), left)
        kept = left != group_score
        biased = tl.where(real & (kept == 0), 0.0, biased)  # 0, not −∞, as in the published implementation

    slot = tl.arange(0, TOP_TILE)
    ids = tl.zeros([TOP_TILE], dtype=tl.int32)
    weights = tl.zeros([TOP_TILE], dtype=tl.float32)
    for i in range(TOP):
        best = _lowest_argmax(biased, expert, COUNT)
        ids = tl.where(slot == i, best, ids)
        weights = tl.where(slot == i, tl.sum(tl.where(expert == best, score, 0.0), axis=0), weights)
        biased = tl.where(expert == best, -float("inf"), biased)
    if NORMALISE:
        weights = weights / (tl.sum(weights, axis=0) + 1e-20)
    tl.store(topk_ids + token * TOP + slot, ids.to(tl.int64), mask=slot < TOP)
    tl.store(topk_weights + token * TOP + slot, weights * factor, mask=slot < TOP)
