"""Attention of a block over [cached context ; the block itself] with one softmax.

q (B, Hq, L, D); context k, v (B, Hkv, T, D) with `context_mask` (B, T), True where a key exists;
block k, v (B, Hkv, L, D). `block_mask` (B or 1, L, L) or None says which block keys a query sees;
every query must see at least one. Scale 1/√D; no positional encoding.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower.kernels.precision import accumulation_dtype


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: Tensor | None,
    context: tuple[Tensor, Tensor] | None = None,
    context_mask: Tensor | None = None,
) -> Tensor:
    """→ (B, Hq, L, D). The scores of the two parts are joined, never the keys: the cache is not copied."""
    groups = q.shape[1] // k.shape[1]
    length = q.shape[2]
    # The query heads of one KV head are stacked along the length, so K and V are never repeated.
    q = q.unflatten(1, (-1, groups)).flatten(2, 3)  # (B, Hkv, groups·L, D)
    scores = q @ k.transpose(-1, -2)
    if block_mask is not None:
        mask = block_mask.repeat(1, groups, 1)[:, None]
        scores = scores.masked_fill(~mask, -torch.inf)
    seen = 0
    if context is not None:
        seen = context[0].shape[2]
        past = q @ context[0].transpose(-1, -2)
        if context_mask is not None:
            past = past.masked_fill(~context_mask[:, None, None], -torch.inf)
        scores = torch.cat([past, scores], dim=-1)
    scale = q.shape[-1] ** -0.5  # after widening: in bf16 it would round q
    probs = torch.softmax(scores.to(accumulation_dtype(q.dtype)) * scale, dim=-1).to(v.dtype)
    out = probs[..., seen:] @ v
    if context is not None:
        out = out + probs[..., :seen] @ context[1]
    return out.unflatten(2, (groups, length)).flatten(1, 2)


class Tile(NamedTuple):
    """Queries lo…hi of a long sequence, and mask (B, 1, hi − lo, keys): which keys each may see (at least one)."""

    lo: int
    hi: int
    mask: Tensor


def tiled_attention(
    q: Tensor, k: Tensor, v: Tensor, tiles: Iterable[Tile], own: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Whole sequences, one fused attention call for each tile of queries: q (B, Hq, S, D), k, v (B, Hkv, S, D) →
    (B, Hq, S, D). A tile's keys are k[:hi], then, with `own` keys and values of the same shape, own[lo:hi]."""
    outs = []
    for lo, hi, mask in tiles:
        keys, values = k[:, :, :hi], v[:, :, :hi]
        if own is not None:
            keys, values = (torch.cat([a, b[:, :, lo:hi]], dim=2) for a, b in zip((keys, values), own, strict=True))
        outs.append(
            F.scaled_dot_product_attention(
                q[:, :, lo:hi], keys, values, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1]
            )
        )
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)
