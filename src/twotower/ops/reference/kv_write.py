"""Writes to memory pools that sequences share: where a sequence's K/V vectors lie, and how values are written.

While autograd records, a write returns a new pool, because an earlier pass may still need the old values. Otherwise a
write changes the pool in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class AppendPositions(NamedTuple):
    """Where each row's new K/V vectors go in a pool: start, stride, lengths (B,) as in `slot_indices`.

    counts (B,): how many tokens of the block each row appends; the others are padding.
    """

    start: Tensor
    stride: Tensor
    lengths: Tensor
    counts: Tensor


TensorPair = tuple[Tensor, Tensor]


def slot_indices(start: Tensor, stride: Tensor, heads: int, tokens: Tensor) -> Tensor:
    """The pool index of each token's vector: start, stride (B,), tokens (B or 1, T) → (B, heads, T).

    Head h of row b keeps token t at index start[b] + h·stride[b] + t.
    """
    head = torch.arange(heads, device=start.device)[:, None]
    return start[:, None, None] + head * stride[:, None, None] + tokens[:, None]


def write_indices(start: Tensor, stride: Tensor, heads: int, tokens: Tensor, exists: Tensor, spare: int) -> Tensor:
    """`slot_indices` as (B, T, heads); `spare` where `exists` (B, T) is False or a row has no more slots."""
    exists = exists & (tokens < stride[:, None])
    return torch.where(exists[..., None], slot_indices(start, stride, heads, tokens).transpose(1, 2), spare)


def kv_append(pools: Sequence[TensorPair], new: Sequence[TensorPair], positions: AppendPositions) -> list[TensorPair]:
    """Appends a block's keys and values to each row, layer by layer, and returns the pools.

    pools: (V + 1, D) for K and V of each layer; the last vector takes the writes of padding. new: (B, L, heads, D).
    """
    first = new[0][0]
    step = torch.arange(first.shape[1], device=first.device)
    tokens, exists = positions.lengths[:, None] + step, step < positions.counts[:, None]
    spare = len(pools[0][0]) - 1
    indices = write_indices(positions.start, positions.stride, first.shape[2], tokens, exists, spare).flatten()
    return [
        (write_slots(k_pool, indices, k.flatten(0, 2)), write_slots(v_pool, indices, v.flatten(0, 2)))
        for (k_pool, v_pool), (k, v) in zip(pools, new, strict=True)
    ]


def write_slots(pool: Tensor, slots: Tensor, values: Tensor) -> Tensor:
    """The pool (R, …) with values (B, …) written at slots (B,)."""
    values = values.to(pool.dtype)
    return pool.index_copy(0, slots, values) if torch.is_grad_enabled() else pool.index_copy_(0, slots, values)


def zero_slots(pool: Tensor, slots: Tensor) -> Tensor:
    """The pool (R, …) with zeros at slots (B,)."""
    return pool.index_fill(0, slots, 0) if torch.is_grad_enabled() else pool.index_fill_(0, slots, 0)
