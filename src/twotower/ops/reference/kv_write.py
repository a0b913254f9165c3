"""Pools that texts share: where a text's vectors lie in them, and how they are written.

While autograd records, writes give a new pool: an earlier pass may still need what the old one held. Otherwise they
change the given one, however large it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Ends(NamedTuple):
    """Where the texts of some rows end in a pool, and how many of a block's tokens count: start, stride, lengths, valid
    (B,), see `vectors_at`."""

    start: Tensor
    stride: Tensor
    lengths: Tensor
    valid: Tensor


Pair = tuple[Tensor, Tensor]


def vectors_at(start: Tensor, stride: Tensor, heads: int, tokens: Tensor) -> Tensor:
    """start, stride (B,), tokens (B or 1, T) → (B, heads, T): head h of row b keeps token t at start[b] + h·stride[b]
    + t."""
    head = torch.arange(heads, device=start.device)[:, None]
    return start[:, None, None] + head * stride[:, None, None] + tokens[:, None]


def places(start: Tensor, stride: Tensor, heads: int, tokens: Tensor, exists: Tensor, spare: int) -> Tensor:
    """`vectors_at` as (B, T, heads); `spare` where `exists` (B, T) is False or a row's own columns end."""
    exists = exists & (tokens < stride[:, None])
    return torch.where(exists[..., None], vectors_at(start, stride, heads, tokens).transpose(1, 2), spare)


def append(pools: Sequence[Pair], new: Sequence[Pair], ends: Ends) -> list[Pair]:
    """Keys and values of a block at the ends of texts, layer by layer: pools (V + 1, D), whose last vector takes the
    writes of padding, and new (B, L, heads, D) → the pools."""
    first = new[0][0]
    step = torch.arange(first.shape[1], device=first.device)
    tokens, exists = ends.lengths[:, None] + step, step < ends.valid[:, None]
    at = places(ends.start, ends.stride, first.shape[2], tokens, exists, len(pools[0][0]) - 1).flatten()
    return [
        (put(k_pool, at, k.flatten(0, 2)), put(v_pool, at, v.flatten(0, 2)))
        for (k_pool, v_pool), (k, v) in zip(pools, new, strict=True)
    ]


def put(pool: Tensor, places: Tensor, value: Tensor) -> Tensor:
    """pool (R, …) with value (B, …) at places (B,)."""
    value = value.to(pool.dtype)
    return pool.index_copy(0, places, value) if torch.is_grad_enabled() else pool.index_copy_(0, places, value)


def emptied(pool: Tensor, places: Tensor) -> Tensor:
    """pool (R, …) with zeros at places (B,)."""
    return pool.index_fill(0, places, 0) if torch.is_grad_enabled() else pool.index_fill_(0, places, 0)
