"""One tile of queries of the attention of training: the forms of the call of torch's fused attention.

The form decides which kernel torch takes on a GPU. None of them has been measured there.

| form | what it does | on CUDA |
|---|---|---|
| grouped | torch repeats keys and values for query heads | bf16: a cuDNN plan for each number of keys; fp32: scores |
| padded | as grouped, with few numbers of keys; further keys are masked | fewer cuDNN plans |
| stacked | the query heads of a key head are stacked along the queries | memory-efficient kernel; a larger mask |
| repeated | keys and values are copied for their query heads | memory-efficient kernel; more keys in memory |
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

KEYS = 128  # numbers of keys are rounded up to multiples, and then to few of them


class QueryTile(NamedTuple):
    """Queries lo…hi of a long sequence, and the keys from `first` on.

    mask (B, 1, hi − lo, keys): the keys each query attends to, at least one.
    """

    lo: int
    hi: int
    mask: Tensor
    first: int = 0


def tile_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None, form: str) -> Tensor:
    """Attention of one tile → (B, Hq, L, D). q (B, Hq, L, D); k, v (B, Hkv, T, D); mask (B, 1, L, T)."""
    groups = q.shape[1] // k.shape[1]
    if groups == 1 or form in ("grouped", "padded"):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=groups > 1)
    with _memory_efficient(q.device):
        if form == "repeated":
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        stacked = q.unflatten(1, (-1, groups)).flatten(2, 3)  # (B, Hkv, groups·L, D)
        wide = mask.repeat(1, 1, groups, 1)
        out = F.scaled_dot_product_attention(stacked, k, v, attn_mask=wide, scale=scale)
    apart: Tensor = out.unflatten(2, (groups, -1)).flatten(1, 2)
    return apart


@contextmanager
def _memory_efficient(device: torch.device) -> Iterator[None]:
    """Within the block, torch takes its memory-efficient kernel on a GPU, or else forms the scores."""
    if device.type != "cuda":
        yield
        return
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        yield


def with_padded_keys(tile: QueryTile, length: int) -> QueryTile:
    """The tile with one of few numbers of keys, at most all `length` of them; the further keys are masked.

    If the mask has further columns for the tile's own keys, they stay behind the others.
    """
    lo, hi, mask, first = tile
    count = hi - first
    wanted = min(few_sizes(count), length)
    begin = min(first, length - wanted)
    padded = F.pad(mask[..., :count], (first - begin, begin + wanted - hi))
    return QueryTile(lo, hi, torch.cat([padded, mask[..., count:]], dim=-1), begin)


def few_sizes(keys: int) -> int:
    """The least of 1, 2, 3, 4, 6, 8, 12, 16, … times KEYS that is at least `keys`: up to 1.5 times as many."""
    wanted = max(-(-keys // KEYS), 1)
    power = 1 << (wanted.bit_length() - 1)
    return KEYS * next(size for size in (power, power * 3 // 2, 2 * power) if size >= wanted)
