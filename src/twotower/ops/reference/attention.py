"""Attention of a block over [cached keys ; the block's own keys] with one softmax, and attention of whole sequences.

Scale 1/√D unless given. Queries and keys come with their rotary position embedding, if there is one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from twotower import options as environment
from twotower.ops.precision import upcast
from twotower.ops.reference.attention_tiles import QueryTile, tile_attention, with_padded_keys
from twotower.ops.reference.kv_write import slot_indices


class AttentionOptions(NamedTuple):
    """How scores become weights: see `specs.AttentionSpec`. scale: None: 1 / √D.

    window: w means that a causal query attends to the last w keys, itself included. A query that is not causal attends
    to the w − 1 cached keys before its block, and to its whole block.
    """

    scale: float | None = None
    window: int | None = None
    softcap: float | None = None


PLAIN = AttentionOptions()


class CachedKV(NamedTuple):
    """Keys and values of earlier tokens, in place in a pool.

    Token t < lengths[b] of row b and head h is the vector at index start[b] + h·stride[b] + t of k and v (vectors, D).
    A layer with a window of w has only the last w − 1 tokens, numbered from 0; so layers with different windows have
    different start, stride and lengths. The window rule depends on distances alone.
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
    q: Tensor,
    k: Tensor,
    v: Tensor,
    token_mask: Tensor | None,
    causal: bool,
    cached: CachedKV | None = None,
    options: AttentionOptions = PLAIN,
    prefix: Tensor | None = None,
) -> Tensor:
    """Attention of a block over its cached context and itself → (B, L, Hq, D).

    q (B, L, Hq, D); k, v (B, L, Hkv, D); token_mask (B, L): False at padding (None: no padding). A query attends to the
    cached keys, to the valid keys of its own block (causal: up to its own position), and always to itself. prefix (B,):
    the first queries of each row that are causal, the others are not, whatever `causal` says.
    """
    mask = own_block_mask(q.shape[1], token_mask, causal, q.device, options.window, prefix)
    context, context_mask = None, None
    if cached is not None and cached.max_length:
        past_k, past_v, exists = cached.dense(k.shape[2])
        context, context_mask = (past_k, past_v), exists[:, None]
        if options.window is not None:
            queries = q.shape[1] if causal or prefix is not None else 1
            near = window_mask(cached.max_length, cached.lengths, queries, options.window, prefix)
            context_mask = context_mask & near
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    return block_attention(q, k, v, mask, context, context_mask, options).transpose(1, 2)


def window_mask(keys: int, lengths: Tensor, queries: int, window: int, prefix: Tensor | None = None) -> Tensor:
    """Which of `keys` cached keys lie in the window of each query, (B, queries, keys); lengths (B,): of the cache.

    prefix (B,): queries after the first `prefix` have the window of the first one.
    """
    place = torch.arange(queries, device=lengths.device)
    position = lengths[:, None] + (place if prefix is None else torch.where(place < prefix[:, None], place, 0))
    return torch.arange(keys, device=lengths.device) > (position - window)[..., None]


def own_block_mask(
    length: int,
    token_mask: Tensor | None,
    causal: bool,
    device: torch.device,
    window: int | None = None,
    prefix: Tensor | None = None,
) -> Tensor | None:
    """The mask (B or 1, L, L) of a block's own keys, or None: no mask. A padding query attends at least to itself.

    prefix (B,): see `attention`.
    """
    mask = None
    if causal or prefix is not None:
        mask = torch.ones(1, length, length, dtype=torch.bool, device=device).tril()
        mask = mask if window is None else mask.triu(1 - window)
    if mask is not None and prefix is not None:
        mask = mask | (torch.arange(length, device=device) >= prefix[:, None])[..., None]
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
    options: AttentionOptions = PLAIN,
) -> Tensor:
    """Attention with one softmax over context keys and a block's own keys → (B, Hq, L, D).

    q (B, Hq, L, D); k, v (B, Hkv, L, D); block_mask (B or 1, L, L) or None: which own keys a query attends to, at least
    one; context: k, v (B, Hkv, T, D) with context_mask (B, 1 or L, T): which of them a query attends to.

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
            wide = context_mask if context_mask.shape[1] == 1 else context_mask.repeat(1, groups, 1)
            past = past.masked_fill(~wide[:, None], -torch.inf)
        scores = torch.cat([past, scores], dim=-1)
    probs = torch.softmax(final_scores(scores, q.shape[-1], options), dim=-1).to(v.dtype)
    out = probs[..., seen:] @ v
    if context is not None:
        out = out + probs[..., :seen] @ context[1]
    heads: Tensor = out.unflatten(2, (groups, length)).flatten(1, 2)
    return heads


def final_scores(products: Tensor, head_dim: int, options: AttentionOptions) -> Tensor:
    """Products of queries and keys → scaled and capped scores in at least fp32. −∞ stays −∞."""
    # The scale is applied after the upcast: scaling q in bf16 would round.
    scores = upcast(products) * (head_dim**-0.5 if options.scale is None else options.scale)
    if options.softcap is None:
        return scores
    return torch.where(scores == -torch.inf, scores, options.softcap * torch.tanh(scores / options.softcap))


def tiled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tiles: Iterable[QueryTile],
    own: tuple[Tensor, Tensor] | None = None,
    options: AttentionOptions = PLAIN,
) -> Tensor:
    """Attention of whole sequences, one fused call per tile of queries → (B, Hq, S, D).

    q (B, Hq, S, D); k, v (B, Hkv, S, D). The keys of a tile are k[first:hi], followed by own[lo:hi] if `own` keys and
    values of the same shape are given. The masks contain the window. The option `training_attention` chooses the form
    of the calls (`tile_attention`).
    """
    choice = environment.current().training_attention
    outs = []
    for tile in tiles:
        lo, hi, mask, first = tile if choice != "padded" else with_padded_keys(tile, k.shape[2])
        end = hi if choice != "padded" else first + mask.shape[3] - (0 if own is None else hi - lo)
        keys, values = k[:, :, first:end], v[:, :, first:end]
        if own is not None:
            keys, values = (torch.cat([a, b[:, :, lo:hi]], dim=2) for a, b in zip((keys, values), own, strict=True))
        part = q[:, :, lo:hi]
        if options.softcap is None:
            out = tile_attention(part, keys, values, mask, options.scale, choice)
        else:
            out = block_attention(part, keys, values, mask[:, 0], options=options)
        outs.append(out)
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)
