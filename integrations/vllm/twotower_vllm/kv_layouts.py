"""Keys and values as vLLM's attention backends lay them out in blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from twotower.ops.reference.attention import CachedKV

Layout = Callable[[Tensor], tuple[Tensor, Tensor]]  # blocks (…, H, N, 2·D) → keys and values (…, H, N, D)


def cpu_layout(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Backend CPU_ATTN: the memory of a head in a block is its keys as (D, N), then its values as (N, D)."""
    tokens = blocks.shape[-2]
    keys, values = blocks.flatten(-2).unflatten(-1, (2, -1)).unbind(-2)
    return keys.unflatten(-1, (-1, tokens)).transpose(-1, -2), values.unflatten(-1, (tokens, -1))


def flash_layout(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Backend FLASH_ATTN: each token has its key, then its value."""
    keys, values = blocks.chunk(2, dim=-1)
    return keys, values


LAYOUTS: dict[str, Layout] = {"CPU_ATTN": cpu_layout, "FLASH_ATTN": flash_layout}


class Rows(NamedTuple):
    """The rows of a draft. table: (B, blocks), the blocks of each row; lengths: tokens of each, on the host."""

    table: Tensor
    lengths: list[int]


def read_kv(cache: Tensor, rows: Rows, layout: Layout) -> CachedKV:
    """Copies the keys and values of rows out of a cache (blocks, H, N, 2·D)."""
    longest, size = max(rows.lengths), cache.shape[2]
    blocks = cache[rows.table[:, : -(-longest // size)].to(cache.device)]  # (B, blocks, H, N, 2·D)
    k, v = (part.transpose(1, 2).flatten(2, 3)[:, :, :longest] for part in layout(blocks))
    count, heads, _, width = k.shape
    start = torch.arange(count, device=cache.device) * (heads * longest)
    return CachedKV(
        k=k.reshape(-1, width),
        v=v.reshape(-1, width),
        start=start,
        stride=torch.full_like(start, longest),
        lengths=torch.tensor(rows.lengths, device=cache.device),
        max_length=longest,
        uniform_stride=longest,
    )
