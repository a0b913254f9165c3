"""Attention of a block over [cached keys ; the block itself] with one softmax, and of whole sequences.

Scale 1/√D; no positional encoding.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower.ops.precision import upcast
from twotower.ops.reference.kv_write import slot_indices


class CachedKV(NamedTuple):
    """Keys and values of earlier tokens where they lie: of row b, head h, token t < lengths[b] the vector start[b] +
    h·stride[b] + t of k, v (vectors, D).

    width: no length is greater, known on the host. even: row b begins at b·heads·even, so that a view shows them all;
    0 where rows lie anywhere.
    """

    k: Tensor
    v: Tensor
    start: Tensor
    stride: Tensor
    lengths: Tensor
    max_length: int
    uniform_stride: int

    def dense(self, heads: int) -> tuple[Tensor, Tensor, Tensor]:
        """k, v (B, heads, width, D), copied only where rows lie anywhere, and which exist (B, width)."""
        token = torch.arange(self.max_length, device=self.lengths.device)
        exists = token < self.lengths[:, None]
        if self.uniform_stride:
            vectors = len(self.lengths) * heads * self.uniform_stride
            shape = (len(self.lengths), heads, self.uniform_stride, self.k.shape[1])
            k, v = (pool[:vectors].view(shape)[:, :, : self.max_length] for pool in (self.k, self.v))
            return k, v, exists
        where = torch.where(exists[:, None], slot_indices(self.start, self.stride, heads, token[None]), 0)
        return self.k[where], self.v[where], exists


def attention(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, causal: bool, cached: CachedKV | None = None
) -> Tensor:
    """q (B, L, Hq, D); k, v (B, L, Hkv, D), of which valid (B, L) count (None: all) → (B, L, Hq, D).

    A query sees the cached keys, those of its own block (causal: up to its own place), and in any case itself.
    """
    mask = own_block_mask(q.shape[1], valid, causal, q.device)
    context, exists = None, None
    if cached is not None and cached.max_length:
        past_k, past_v, exists = cached.dense(k.shape[2])
        context = (past_k, past_v)
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    return block_attention(q, k, v, mask, context, exists).transpose(1, 2)


def own_block_mask(length: int, valid: Tensor | None, causal: bool, device: torch.device) -> Tensor | None:
    """(B or 1, L, L): which token of its own block a query sees. A padding query sees at least itself."""
    mask = torch.ones(1, length, length, dtype=torch.bool, device=device).tril() if causal else None
    if valid is not None:
        keys = valid[:, None] | torch.eye(length, dtype=torch.bool, device=device)
        mask = keys if mask is None else mask & keys
    return mask


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: Tensor | None,
    context: tuple[Tensor, Tensor] | None = None,
    context_mask: Tensor | None = None,
) -> Tensor:
    """q (B, Hq, L, D); k, v (B, Hkv, L, D) with block_mask (B or 1, L, L) or None: which of them a query sees, one at
    least; context k, v (B, Hkv, T, D) with context_mask (B, T), True where a key exists → (B, Hq, L, D).

    The scores of the two parts are joined, never the keys: the cache is not copied.
    """
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
    probs = torch.softmax(upcast(scores) * scale, dim=-1).to(v.dtype)
    out = probs[..., seen:] @ v
    if context is not None:
        out = out + probs[..., :seen] @ context[1]
    heads: Tensor = out.unflatten(2, (groups, length)).flatten(1, 2)
    return heads


class QueryTile(NamedTuple):
    """Queries lo…hi of a long sequence, and mask (B, 1, hi − lo, keys): which keys each may see (at least one)."""

    lo: int
    hi: int
    mask: Tensor


def tiled_attention(
    q: Tensor, k: Tensor, v: Tensor, tiles: Iterable[QueryTile], own: tuple[Tensor, Tensor] | None = None
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
