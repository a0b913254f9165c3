"""Triton kernels of `attention`: the cached keys of a row are shared out among programs (splits), which stream them
from the pool as they lie; a second kernel joins the splits.

The query heads of one KV head are stacked, token by token, and cut into tiles; a program is one tile of one row and KV
head over one split. The first split takes the block's own keys too. How many splits there are depends on shapes alone,
where each begins on the row's length, so passes can be captured and no split of a short row is in vain: it stops at
once. Softmax is fp32, in powers of two. Import this only where a kernel is to run.

Bytes moved for one row of the 30B shape (32 query and 2 KV heads of 128, bf16), L = 16, 128K tokens of context: keys
and values 128 MiB read (by two tiles of queries side by side, so once from memory and once more from the L2 cache);
33 splits leave 8.3 MiB of fp32 and read it back. One token (AR): 128 MiB, and 2 MiB for 128 splits.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from twotower.ops.reference import attention as reference
from twotower.ops.reference.attention import CachedKV
from twotower.ops.triton.launch import MAX_HEAD, device_of, tile_of

PROGRAMS = 132  # of 8 warps, that a launch has at least where there is work: one for each multiprocessor of an H100
LEAST_KEYS = 256  # of a split: fewer take less time than joining them
MOST_KEYS = 4096  # of a split, where rows are many: one long row does not keep the others waiting
MOST_ROUNDS = 16  # of all multiprocessors: with as many no row is waited for, and all splits leave at most 264 MiB
PARTS = 16  # splits that are joined together


class Tiles(NamedTuple):
    """rows: stacked queries a program holds; keys: cached ones it takes at a time."""

    rows: int
    keys: int
    warps: int
    stages: int


def tiles(stacked: int, width: int, dtype: torch.dtype) -> Tiles:
    """128 queries: 256 would fill half the registers with sums alone (128 KiB), 64 would read all keys twice as often.
    8 warps share 128, 4 fewer; three stages of 64 keys and values of 128 are 96 KiB. fp32 works without tensor cores,
    and any more than these would take more registers than there are."""
    if dtype == torch.float32:
        return Tiles(16, 32, 8, 2) if tile_of(width) > 64 else Tiles(min(32, tile_of(stacked)), 32, 4, 2)
    if tile_of(width) > 128:
        return Tiles(min(64, tile_of(stacked)), 32, 4, 2)
    rows = min(128, tile_of(stacked))
    return Tiles(rows, 64, 8 if rows == 128 else 4, 3)


def splits_of(programs: int, width: int, warps: int) -> int:
    """How many programs share up to `width` cached keys, where one each would be `programs` of so many warps."""
    filling = PROGRAMS * 8 // warps // programs
    evening = PROGRAMS * 8 // warps * MOST_ROUNDS // programs
    needed: int = max(1, min(evening, triton.cdiv(width, MOST_KEYS)), min(filling, triton.cdiv(width, LEAST_KEYS)))
    return needed


def attention(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, causal: bool, cached: CachedKV | None = None
) -> Tensor:
    """As `twotower.ops.reference.attention.attention`, without gradients."""
    rows, length, all_heads, width = q.shape
    if tile_of(width) > MAX_HEAD:
        return reference.attention(q, k, v, valid, causal, cached)
    heads = k.shape[2]
    out = q.new_empty(q.shape)
    if not out.numel():
        return out
    q = q if q.stride(3) == 1 else q.contiguous()
    k, v = (k, v) if k.stride(3) == 1 and k.stride() == v.stride() else (k.contiguous(), v.contiguous())
    stacked = all_heads // heads * length
    tile = tiles(stacked, width, q.dtype)
    grid = (triton.cdiv(stacked, tile.rows), 1, rows * heads)
    pools: tuple[Tensor | None, ...] = (None,) * 5
    parts, weights, splits = None, None, 1
    if cached is not None and cached.max_length:
        assert cached.k.is_contiguous(), "a pool is contiguous"
        assert cached.v.is_contiguous(), "a pool is contiguous"
        pools = (cached.k, cached.v, *(part.contiguous() for part in (cached.start, cached.stride, cached.lengths)))
        splits = splits_of(grid[0] * grid[2], cached.max_length, tile.warps)
    if splits > 1:
        parts = q.new_empty(rows * heads, splits, stacked, width, dtype=torch.float32)
        weights = q.new_empty(rows * heads, splits, stacked, dtype=torch.float32)
    sizes = {"HEADS": heads, "GROUPS": all_heads // heads, "WIDTH": width, "WIDTH_TILE": tile_of(width)}
    sizes |= {"KEYS": tile.keys, "LEAST": LEAST_KEYS}
    with device_of(q):
        _attention_kernel[grid[0], splits, grid[2]](
            *(q, k, v),
            None if valid is None else valid.bool().contiguous().view(torch.uint8),
            *pools,
            *(out, parts, weights),
            *q.stride()[:3],
            *k.stride()[:3],
            length,
            splits,
            width**-0.5 * math.log2(math.e),
            HAS_VALID=valid is not None,
            HAS_CACHE=pools[0] is not None,
            CAUSAL=causal,
            SPLIT=splits > 1,
            ROWS=tile.rows,
            OWN=min(tile.keys, tile_of(length)),
            **sizes,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        if splits > 1:
            _join_kernel[stacked, grid[2]](
                parts, weights, pools[4], out, length, splits, PARTS=PARTS, **sizes, num_warps=4
            )
    return out


# --- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit
def _share(cached, splits, KEYS: tl.constexpr, LEAST: tl.constexpr):
    """How many of a row's cached keys each split takes: whole tiles."""
    each = (cached + splits - 1) // splits
    return tl.maximum((each + KEYS - 1) // KEYS * KEYS, LEAST)


@triton.jit
def _seen(best, mass, mixed, query, keys, values, seen, scale):
    """Softmax so far (largest score, sum, mixed values), and one more tile of keys, of which a query sees some."""
    scores = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale
    scores = tl.where(seen, scores, -float("inf"))
    larger = tl.maximum(best, tl.max(scores, axis=1))  # finite, as `best` is: −∞ − −∞ would be no number
    shrunk = tl.exp2(best - larger)
    probs = tl.exp2(scores - larger[:, None])
    mass = mass * shrunk + tl.sum(probs, axis=1)
    mixed = tl.dot(probs.to(values.dtype), values, mixed * shrunk[:, None], input_precision="ieee")
    return larger, mass, mixed


@triton.jit(do_not_specialize=["splits"])
def _attention_kernel(
    q,
    k,
    v,
    valid,
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
    HAS_VALID: tl.constexpr,
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
    LEAST: tl.constexpr,
):
    """One tile of stacked queries (axis 0, the fastest: tiles that read the same keys run side by side), one split of
    the cached keys (axis 1), one row and KV head (axis 2)."""
    tile = tl.program_id(0)
    split = tl.program_id(1)
    row = (tl.program_id(2) // HEADS).to(tl.int64)
    head = tl.program_id(2) % HEADS
    low = 0
    high = 0
    if HAS_CACHE:
        cached = tl.load(lengths + row).to(tl.int32)
        share = _share(cached, splits, KEYS, LEAST)
        low = split * share
        high = tl.minimum(low + share, cached)
        if (split > 0) & (low >= cached):  # `_join_kernel` knows, and does not read what is not written
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

    # Softmax begins with the query's own key, which it sees in any case: nothing else is read at padding, and the
    # largest score is finite. In other splits it begins with nothing.
    first = split == 0
    itself = here & first
    own = itself[:, None] & of_head
    same = tl.load(k + token[:, None] * k_token + d[None, :], mask=own, other=0.0)
    best = tl.sum(query.to(tl.float32) * same.to(tl.float32), axis=1) * scale
    best = tl.where(itself, best, -1.0e30)
    mass = tl.where(here & (split > 0), 0.0, 1.0)  # beyond the last query 1, to be divided by
    mixed = tl.load(v + token[:, None] * k_token + d[None, :], mask=own, other=0.0).to(tl.float32)

    # The other tokens of the block; a single one has none.
    end = length
    if CAUSAL:
        end = tl.minimum(end, (tile * ROWS + ROWS - 1) // GROUPS + 1)
    end = tl.where(first & (length > 1), end, 0)
    for begin in range(0, end, OWN):
        other = begin + tl.arange(0, OWN)
        counted = other < length
        if HAS_VALID:
            counted = counted & (tl.load(valid + row * length + other, mask=counted, other=0) != 0)
        exists = counted[:, None] & of_head
        keys = tl.load(k + other[:, None] * k_token + d[None, :], mask=exists, other=0.0)
        values = tl.load(v + other[:, None] * k_token + d[None, :], mask=exists, other=0.0)
        if CAUSAL:  # noqa: SIM108  a constexpr branch
            seen = other[None, :] < token[:, None]
        else:
            seen = other[None, :] != token[:, None]
        best, mass, mixed = _seen(best, mass, mixed, query, keys, values, seen & counted[None, :], scale)

    if HAS_CACHE:
        where = (tl.load(start + row).to(tl.int64) + head * tl.load(stride + row).to(tl.int64)) * WIDTH
        pool_k += where
        pool_v += where
        for begin in range(low, high, KEYS):
            other = begin + tl.arange(0, KEYS)
            counted = other < high
            exists = counted[:, None] & of_head
            keys = tl.load(pool_k + other[:, None] * WIDTH + d[None, :], mask=exists, other=0.0)
            values = tl.load(pool_v + other[:, None] * WIDTH + d[None, :], mask=exists, other=0.0)
            best, mass, mixed = _seen(best, mass, mixed, query, keys, values, counted[None, :], scale)

    mixed = mixed / mass[:, None]
    if SPLIT:
        place = (tl.program_id(2).to(tl.int64) * splits + split) * (length * GROUPS) + stacked
        tl.store(parts + place[:, None] * WIDTH + d[None, :], mixed, mask=here[:, None] & of_head)
        tl.store(weights + place, best + tl.log2(mass), mask=here)
    else:
        place = (row * length + token) * (HEADS * GROUPS) + query_head
        at_out = out + place[:, None] * WIDTH + d[None, :]
        tl.store(at_out, mixed.to(out.dtype.element_ty), mask=here[:, None] & of_head)


@triton.jit(do_not_specialize=["splits"])
def _join_kernel(
    parts,
    weights,
    lengths,
    out,
    length,
    splits,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_TILE: tl.constexpr,
    KEYS: tl.constexpr,
    LEAST: tl.constexpr,
    PARTS: tl.constexpr,
):
    """One stacked query (axis 0) of one row and KV head (axis 1): the mean of its splits, by their masses (logs of)."""
    stacked = tl.program_id(0)
    row = (tl.program_id(1) // HEADS).to(tl.int64)
    head = tl.program_id(1) % HEADS
    cached = tl.load(lengths + row).to(tl.int32)
    share = _share(cached, splits, KEYS, LEAST)
    used = tl.maximum((cached + share - 1) // share, 1)
    d = tl.arange(0, WIDTH_TILE)
    of_head = d < WIDTH
    first = tl.program_id(1).to(tl.int64) * splits * (length * GROUPS) + stacked
    best = -1.0e30
    mass = 0.0
    mixed = tl.full([WIDTH_TILE], 0.0, dtype=tl.float32)
    for begin in tl.range(0, used, PARTS, num_stages=2):
        part = begin + tl.arange(0, PARTS)
        exists = part < used
        place = first + part * (length * GROUPS)
        weight = tl.load(weights + place, mask=exists, other=-float("inf"))
        at = parts + place[:, None] * WIDTH + d[None, :]
        value = tl.load(at, mask=exists[:, None] & of_head[None, :], other=0.0)
        larger = tl.maximum(best, tl.max(weight, axis=0))
        shrunk = tl.exp2(best - larger)
        weight = tl.exp2(weight - larger)
        mass = mass * shrunk + tl.sum(weight, axis=0)
        mixed = mixed * shrunk + tl.sum(weight[:, None] * value, axis=0)
        best = larger
    place = (row * length + stacked // GROUPS) * (HEADS * GROUPS) + head * GROUPS + stacked % GROUPS
    tl.store(out + place * WIDTH + d, (mixed / mass).to(out.dtype.element_ty), mask=of_head)
