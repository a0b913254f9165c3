"""Pools that texts share: where a text's vectors lie in them, and how they are written.

While autograd records, writes give a new pool: an earlier pass may still need what the old one held. Otherwise they
change the given one, however large it is.
"""

from __future__ import annotations

import torch
from torch import Tensor


def vectors_at(start: Tensor, stride: Tensor, heads: int, tokens: Tensor) -> Tensor:
    """start, stride (B,), tokens (B or 1, T) → (B, heads, T): head h of row b keeps token t at start[b] + h·stride[b]
    + t."""
    head = torch.arange(heads, device=start.device)[:, None]
    return start[:, None, None] + head * stride[:, None, None] + tokens[:, None]


def put(pool: Tensor, places: Tensor, value: Tensor) -> Tensor:
    """pool (R, …) with value (B, …) at places (B,)."""
    value = value.to(pool.dtype)
    return pool.index_copy(0, places, value) if torch.is_grad_enabled() else pool.index_copy_(0, places, value)


def emptied(pool: Tensor, places: Tensor) -> Tensor:
    """pool (R, …) with zeros at places (B,)."""
    return pool.index_fill(0, places, 0) if torch.is_grad_enabled() else pool.index_fill_(0, places, 0)
