"""Triton kernels of `attention`: programs share a row's cached keys in splits; a second kernel combines the splits.

Each program reads its split from the pool in place. The query heads of one KV head are stacked, token by token, and cut
into tiles. One program handles one tile of one row and KV head over one split. The first split also takes the block's
own keys. The number of splits depends on shapes only, so a CUDA graph can capture the pass. The range of a split
depends on the row's length; a split beyond a short row's keys exits at once. With a window of w, the splits divide only
the last w − 1 cached keys. Rows may have a causal prefix: each program reads its length on the device. Softmax is
computed in fp32 with base-2 exponentials. Importing this module needs Triton.

Memory traffic of one row of the 30B shape (32 query and 2 KV heads of 128, bf16) with 128K tokens of context:

- A block of 16 tokens reads 128 MiB of keys and values; two tiles of queries side by side read them once from memory
  and once from the L2 cache. 33 splits write 8.3 MiB of fp32 and read it back.
- One token (AR) reads 128 MiB; 128 splits write and read 2 MiB.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from twotower.ops.reference import attention as reference
from twotower.ops.reference.attention import PLAIN, AttentionOptions, CachedKV
from twotower.ops.triton.launch import MAX_HEAD_DIM, device_guard, tile_of
from twotower.ops.triton.softmax import (
    cached_keys,
    causal_tokens,
    final_scores,
    keys_outside,
    online_softmax_step,
    own_seen,
    score_factors,
)

PROGRAMS = 132  # target number of 8-warp programs: one per multiprocessor of an H100
MIN_SPLIT_KEYS = 256  # with fewer keys, combining takes longer than the split
MAX_SPLIT_KEYS = 4096  # with many rows: limits how long one long row delays the launch
MAX_WAVES = 16  # programs per multiprocessor at most: enough to balance rows; splits write at most 264 MiB
PARTS = 16  # splits combined per loop step


class TileShape(NamedTuple):
    """rows: stacked queries per program; keys: cached keys per loop step."""

    rows: int
    keys: int
    warps: int
    stages: int


def tile_shape(stacked: int, width: int, dtype: torch.dtype) -> TileShape:
    """The tile sizes of `_attention_kernel`.

    128 queries: 256 would fill half the registers with accumulators (128 KiB); 64 would read all keys twice as often. 8
    warps handle 128 queries, 4 warps fewer. Three stages of 64 keys and values of width 128 take 96 KiB. fp32 does not
    use tensor cores; larger tiles would exceed the registers.
    """
    if dtype == torch.float32:
        return TileShape(16, 32, 8, 2) if tile_of(width) > 64 else TileShape(min(32, tile_of(stacked)), 32, 4, 2)
    if tile_of(width) > 128:
        return TileShape(min(64, tile_of(stacked)), 32, 4, 2)
    rows = min(128, tile_of(stacked))
    return TileShape(rows, 64, 8 if rows == 128 else 4, 3)


def num_splits(programs: int, width: int, warps: int) -> int:
    """Number of splits of up to `width` cached keys.

    programs: the number of programs of `warps` warps that one split would give.
    """
    filling = PROGRAMS * 8 // warps // programs
    evening = PROGRAMS * 8 // warps * MAX_WAVES // programs
    needed: int = max(
        1, min(evening, triton.cdiv(width, MAX_SPLIT_KEYS)), min(filling, triton.cdiv(width, MIN_SPLIT_KEYS))
    )
    return needed


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    token_mask: Tensor | None,
    causal: bool,
    cached: CachedKV | None = None,
    options: AttentionOptions = PLAIN,
    prefix: Tensor | None = None,
) -> Tensor:
    """As `twotower.ops.reference.attention.attention`, without gradients."""
    rows, length, all_heads, width = q.shape
    if tile_of(width) > MAX_HEAD_DIM:
        return reference.attention(q, k, v, token_mask, causal, cached, options, prefix)
    heads = k.shape[2]
    out = q.new_empty(q.shape)
    if not out.numel():
        return out
    q = q if q.stride(3) == 1 else q.contiguous()
    k, v = (k, v) if k.stride(3) == 1 and k.stride() == v.stride() else (k.contiguous(), v.contiguous())
    stacked = all_heads // heads * length
    tile = tile_shape(stacked, width, q.dtype)
    grid = (triton.cdiv(stacked, tile.rows), 1, rows * heads)
    pools: tuple[Tensor | None, ...] = (None,) * 5
    parts, weights, splits = None, None, 1
    reach = 0 if cached is None else min(cached.max_length, (options.window or sys.maxsize) - 1)
    if cached is not None and reach:
        assert cached.k.is_contiguous(), "a pool is contiguous"
        assert cached.v.is_contiguous(), "a pool is contiguous"
        pools = (cached.k, cached.v, *(part.contiguous() for part in (cached.start, cached.stride, cached.lengths)))
        splits = num_splits(grid[0] * grid[2], reach, tile.warps)
    if splits > 1:
        parts = q.new_empty(rows * heads, splits, stacked, width, dtype=torch.float32)
        weights = q.new_empty(rows * heads, splits, stacked, dtype=torch.float32)
    sizes = {"HEADS": heads, "GROUPS": all_heads // heads, "WIDTH": width, "WIDTH_TILE": tile_of(width)}
    sizes |= {"KEYS": tile.keys, "MIN_KEYS": MIN_SPLIT_KEYS}
    with device_guard(q):
        _attention_kernel[grid[0], splits, grid[2]](
            *(q, k, v),
            None if token_mask is None else token_mask.bool().contiguous().view(torch.uint8),
            None if prefix is None else prefix.contiguous(),
            *pools,
            *(out, parts, weights),
            *q.stride()[:3],
            *k.stride()[:3],
            length,
            splits,
            *score_factors(options, width),
            options.window,
            HAS_MASK=token_mask is not None,
            HAS_CACHE=pools[0] is not None,
            CAUSAL=causal or prefix is not None,
            SPLIT=splits > 1,
            ROWS=tile.rows,
            OWN=min(tile.keys, tile_of(length)),
            **sizes,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        if splits > 1:
            _combine_kernel[stacked, grid[2]](
                parts, weights, pools[4], out, length, splits, options.window, PARTS=PARTS, **sizes, num_warps=4
            )
    return out


# --- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["splits"])
def _attention_kernel(
    q,
    k,
    v,
    token_mask,
    prefix,
    pool_k,
    pool_v,
    start,
    stride,
    lengths,
    out,
    parts,
    weights,
    q_row,
    q_token,
    q_head,
    k_row,
    k_token,
    k_head,
    length,
    splits,
    scale,
    cap,
    window,
    HAS_MASK: tl.constexpr,
    HAS_CACHE: tl.constexpr,
    CAUSAL: tl.constexpr,
    SPLIT: tl.constexpr,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_TILE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    OWN: tl.constexpr,
    MIN_KEYS: tl.constexpr,
):
    """One tile of stacked queries (axis 0), one split of the cached keys (axis 1), one row and KV head (axis 2).

    Axis 0 varies fastest, so tiles that read the same keys run side by side. CAUSAL: with a prefix, the first `prefix`
    tokens of a row are causal, and the others are not.
    """
    tile = tl.program_id(0)
    split = tl.program_id(1)
    row = (tl.program_id(2) // HEADS).to(tl.int64)
    head = tl.program_id(2) % HEADS
    if HAS_CACHE:
        first_key, cached, share = cached_keys(lengths, row, window, splits, KEYS, MIN_KEYS)
        low = split * share
        high = tl.minimum(low + share, cached)
        if (split > 0) & (low >= cached):  # `_combine_kernel` does not read unused splits
            return

    d = tl.arange(0, WIDTH_TILE)
    of_head = (d < WIDTH)[None, :]
    stacked = tile * ROWS + tl.arange(0, ROWS)
    here = stacked < length * GROUPS
    token = stacked // GROUPS
    query_head = head * GROUPS + stacked % GROUPS
    at_query = q + row * q_row + token[:, None] * q_token + query_head[:, None] * q_head + d[None, :]
    query = tl.load(at_query, mask=here[:, None] & of_head, other=0.0)
    k += row * k_row + head * k_head
    v += row * k_row + head * k_head

    # Start with the query's own key, which is never masked: the maximum score is finite also at padding. Other splits
    # start empty.
    first = split == 0
    itself = here & first
    own = itself[:, None] & of_head
    same = tl.load(k + token[:, None] * k_token + d[None, :], mask=own, other=0.0)
    max_score = final_scores(tl.sum(query.to(tl.float32) * same.to(tl.float32), axis=1), scale, cap)
    max_score = tl.where(itself, max_score, -1.0e30)
    exp_sum = tl.where(here & (split > 0), 0.0, 1.0)  # 1 beyond the last query, to avoid dividing by 0
    acc = tl.load(v + token[:, None] * k_token + d[None, :], mask=own, other=0.0).to(tl.float32)

    # The other tokens of the block, if any.
    begin_own = 0
    end = length
    causal = length
    if CAUSAL:
        first_token, end, causal = causal_tokens(tile, prefix, row, length, ROWS, GROUPS)
        if window is not None:
            begin_own = tl.maximum(first_token - (window - 1), 0) // OWN * OWN
    end = tl.where(first & (length > 1), end, 0)
    for begin in range(begin_own, end, OWN):
        other = begin + tl.arange(0, OWN)
        counted = other < length
        if HAS_MASK:
            counted = counted & (tl.load(token_mask + row * length + other, mask=counted, other=0) != 0)
        exists = counted[:, None] & of_head
        keys = tl.load(k + other[:, None] * k_token + d[None, :], mask=exists, other=0.0)
        values = tl.load(v + other[:, None] * k_token + d[None, :], mask=exists, other=0.0)
        seen = own_seen(token, other, prefix, causal, window, CAUSAL)
        max_score, exp_sum, acc = online_softmax_step(
            max_score, exp_sum, acc, query, keys, values, seen & counted[None, :], scale, cap
        )

    if HAS_CACHE:
        where = tl.load(start + row).to(tl.int64) + head * tl.load(stride + row).to(tl.int64) + first_key
        where *= WIDTH
        pool_k += where
        pool_v += where
        begin_cached = low
        if CAUSAL and window is not None:  # later tiles of queries do not see the first keys
            begin_cached += tl.maximum(keys_outside(first_token, cached, window) - low, 0) // KEYS * KEYS
        for begin in range(begin_cached, high, KEYS):
            other = begin + tl.arange(0, KEYS)
            counted = other < high
            exists = counted[:, None] & of_head
            keys = tl.load(pool_k + other[:, None] * WIDTH + d[None, :], mask=exists, other=0.0)
            values = tl.load(pool_v + other[:, None] * WIDTH + d[None, :], mask=exists, other=0.0)
            seen = counted[None, :]
            if CAUSAL and window is not None:
                outside = keys_outside(tl.where(token < causal, token, 0), cached, window)
                seen = seen & (other[None, :] >= outside[:, None])
            max_score, exp_sum, acc = online_softmax_step(
                max_score, exp_sum, acc, query, keys, values, seen, scale, cap
            )

    if SPLIT and CAUSAL and window is not None:  # a query may see no key of a split
        exp_sum = tl.where(exp_sum == 0.0, 1.0, exp_sum)
    acc = acc / exp_sum[:, None]
    if SPLIT:
        place = (tl.program_id(2).to(tl.int64) * splits + split) * (length * GROUPS) + stacked
        tl.store(parts + place[:, None] * WIDTH + d[None, :], acc, mask=here[:, None] & of_head)
        tl.store(weights + place, max_score + tl.log2(exp_sum), mask=here)
    else:
        place = (row * length + token) * (HEADS * GROUPS) + query_head
        at_out = out + place[:, None] * WIDTH + d[None, :]
        tl.store(at_out, acc.to(out.dtype.element_ty), mask=here[:, None] & of_head)


@triton.jit(do_not_specialize=["splits"])
def _combine_kernel(
    parts,
    weights,
    lengths,
    out,
    length,
    splits,
    window,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_TILE: tl.constexpr,
    KEYS: tl.constexpr,
    MIN_KEYS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Combines the splits of one stacked query (axis 0) of one row and KV head (axis 1) by their log-sum-exp."""
    stacked = tl.program_id(0)
    row = (tl.program_id(1) // HEADS).to(tl.int64)
    head = tl.program_id(1) % HEADS
    _, cached, share = cached_keys(lengths, row, window, splits, KEYS, MIN_KEYS)
    used = tl.maximum((cached + share - 1) // share, 1)
    d = tl.arange(0, WIDTH_TILE)
    of_head = d < WIDTH
    first = tl.program_id(1).to(tl.int64) * splits * (length * GROUPS) + stacked
    max_score = -1.0e30
    exp_sum = 0.0
    acc = tl.full([WIDTH_TILE], 0.0, dtype=tl.float32)
    for begin in tl.range(0, used, PARTS, num_stages=2):
        part = begin + tl.arange(0, PARTS)
        exists = part < used
        place = first + part * (length * GROUPS)
        weight = tl.load(weights + place, mask=exists, other=-float("inf"))
        at = parts + place[:, None] * WIDTH + d[None, :]
        value = tl.load(at, mask=exists[:, None] & of_head[None, :], other=0.0)
        larger = tl.maximum(max_score, tl.max(weight, axis=0))
        rescale = tl.exp2(max_score - larger)
        weight = tl.exp2(weight - larger)
        exp_sum = exp_sum * rescale + tl.sum(weight, axis=0)
        acc = acc * rescale + tl.sum(weight[:, None] * value, axis=0)
        max_score = larger
    place = (row * length + stacked // GROUPS) * (HEADS * GROUPS) + head * GROUPS + stacked % GROUPS
    tl.store(out + place * WIDTH + d, (acc / exp_sum).to(out.dtype.element_ty), mask=of_head)
