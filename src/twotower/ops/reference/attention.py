"""Attention of a block over [cached keys ; the block's own keys] with one softmax, and attention of whole sequences.

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
    """Keys and values of earlier tokens, in place in a pool.

    Token t < lengths[b] of row b and head h is the vector at index start[b] + h·stride[b] + t of k and v (vectors, D).
    max_length: an upper bound of the lengths, known on the host. uniform_stride: if all rows have the same stride and
    row b starts at b·heads·uniform_stride, that stride, so that a view covers all rows; otherwise 0.
    """

    k: Tensor
    v: Tensor
    start: Tensor
    stride: Tensor
    lengths: Tensor
    max_length: int
    uniform_stride: int

    def dense(self, heads: int) -> tuple[Tensor, Tensor, Tensor]:
        """k, v (B, heads, max_length, D) and which tokens exist (B, max_length).

        Copies only if the rows have no uniform stride.
        """
        token = torch.arange(self.max_length, device=self.lengths.device)
        exists = token < self.lengths[:, None]
        if self.uniform_stride:
            vectors = len(self.lengths) * heads * self.uniform_stride
            shape = (len(self.lengths), heads, self.uniform_stride, self.k.shape[1])
            k, v = (pool[:vectors].view(shape)[:, :, : self.max_length] for pool in (self.k, self.v))
            return k, v, exists
        where = torch.where(exists[:, None], slot_indices(self.start, self.stride, heads, token[None]), 0)
        # A weight of 0 times NaN is NaN, and a vector that does not exist may be another row's.
        return self.k[where], self.v[where].masked_fill_(~exists[:, None, :, None], 0), exists


def attention(
    q: Tensor, k: Tensor, v: Tensor, token_mask: Tensor | None, causal: bool, cached: CachedKV | None = None
) -> Tensor:
    """Attention of a block over its cached context and itself → (B, L, Hq, D).

    q (B, L, Hq, D); k, v (B, L, Hkv, D); token_mask (B, L): False at padding (None: no padding). A query attends to the
    cached keys, to the valid keys of its own block (causal: up to its own position), and always to itself.
    """
    mask = own_block_mask(q.shape[1], token_mask, causal, q.device)
    context, exists = None, None
    if cached is not None and cached.max_length:
        past_k, past_v, exists = cached.dense(k.shape[2])
        context = (past_k, past_v)
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    return block_attention(q, k, v, mask, context, exists).transpose(1, 2)


def own_block_mask(length: int, token_mask: Tensor | None, causal: bool, device: torch.device) -> Tensor | None:
    """The mask (B or 1, L, L) of a block's own keys, or None: no mask. A padding query attends at least to itself."""
    mask = torch.ones(1, length, length, dtype=torch.bool, device=device).tril() if causal else None
    if token_mask is not None:
        keys = token_mask[:, None] | torch.eye(length, dtype=torch.bool, device=device)
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
    """Attention with one softmax over context keys and a block's own keys → (B, Hq, L, D).

    q (B, Hq, L, D); k, v (B, Hkv, L, D); block_mask (B or 1, L, L) or None: which own keys a query attends to, at least
    one; context: k, v (B, Hkv, T, D) with context_mask (B, T), True where a key exists.

    Concatenates scores, not keys, so the cache is not copied.
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
    scale = q.shape[-1] ** -0.5  # applied after the upcast: scaling q in bf16 would round
    probs = torch.softmax(upcast(scores) * scale, dim=-1).to(v.dtype)
    out = probs[..., seen:] @ v
    if context is not None:
        out = out + probs[..., :seen] @ context[1]
    heads: Tensor = out.unflatten(2, (groups, length)).flatten(1, 2)
    return heads


class QueryTile(NamedTuple):
    """Queries lo…hi of a long sequence.

    mask (B, 1, hi − lo, keys): the keys each query attends to, at least one.
    """

    lo: int
    hi: int
    mask: Tensor


def tiled_attention(
    q: Tensor, k: Tensor, v: Tensor, tiles: Iterable[QueryTile], own: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Attention of whole sequences, one fused call per tile of queries → (B, Hq, S, D).

    q (B, Hq, S, D); k, v (B, Hkv, S, D). The keys of a tile are k[:hi], followed by own[lo:hi] if `own` keys and values
    of the same shape are given.
    """
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
