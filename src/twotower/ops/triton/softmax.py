"""Parts of the attention kernels: which keys a split and a query have, scores, and a step of online softmax.

Importing this module needs Triton.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from twotower.ops.reference.attention import AttentionOptions
from twotower.ops.triton.activation import tanh


def score_factors(options: AttentionOptions, head_dim: int) -> tuple[float, float | None]:
    """scale and cap of `final_scores`."""
    scale = head_dim**-0.5 if options.scale is None else options.scale
    if options.softcap is None:
        return scale * math.log2(math.e), None
    return scale / options.softcap, options.softcap * math.log2(math.e)


@triton.jit
def cached_keys(lengths, row, window, splits, KEYS: tl.constexpr, MIN_KEYS: tl.constexpr):
    """A row's cached keys → the first that a query can attend to, the number from there on, and the number of a split,
    a multiple of KEYS."""
    length = tl.load(lengths + row).to(tl.int32)
    first = 0
    if window is not None:
        first = tl.maximum(length - (window - 1), 0)
    count = length - first
    each = (count + splits - 1) // splits
    return first, count, tl.maximum((each + KEYS - 1) // KEYS * KEYS, MIN_KEYS)


@triton.jit
def final_scores(products, scale, cap):
    """Products of queries and keys → scores for base-2 exponentials. cap: None, or the softcap times log2(e)."""
    scores = products * scale
    if cap is not None:
        scores = tanh(scores) * cap
    return scores


@triton.jit
def online_softmax_step(max_score, exp_sum, acc, query, keys, values, seen, scale, cap):
    """One step of online softmax: updates (maximum score, sum of exponentials, weighted values) with a tile of keys.

    seen: which keys each query attends to.
    """
    scores = final_scores(tl.dot(query, tl.trans(keys), input_precision="ieee"), scale, cap)
    scores = tl.where(seen, scores, -float("inf"))
    larger = tl.maximum(max_score, tl.max(scores, axis=1))  # finite, like `max_score`, because −∞ − −∞ is NaN
    rescale = tl.exp2(max_score - larger)
    probs = tl.exp2(scores - larger[:, None])
    exp_sum = exp_sum * rescale + tl.sum(probs, axis=1)
    acc = tl.dot(probs.to(values.dtype), values, acc * rescale[:, None], input_precision="ieee")
    return larger, exp_sum, acc


@triton.jit
def keys_outside(token, cached, window):
    """The number of the row's `cached` keys that lie before the window of a causal query."""
    return cached + token - (window - 1)


@triton.jit
def causal_tokens(tile, prefix, row, length, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """A tile of stacked queries that may be causal → its first token, the end of the own tokens that it attends to, and
    the number of causal tokens of the row.

    A tile with a token that is not causal attends to the whole block; its first token is then 0, that of the window.
    """
    first = tile * ROWS // GROUPS
    end = tl.minimum(length, (tile * ROWS + ROWS - 1) // GROUPS + 1)
    causal = length
    if prefix is not None:
        causal = tl.load(prefix + row).to(tl.int32)
        first = tl.where(end > causal, 0, first)
        end = tl.where(end > causal, length, end)
    return first, end, causal


@triton.jit
def own_seen(token, other, prefix, causal, window, CAUSAL: tl.constexpr):
    """Which `other` tokens of its block each token attends to, without itself. causal: of `causal_tokens`."""
    if CAUSAL:
        seen = other[None, :] < token[:, None]
        if window is not None:
            seen = seen & (other[None, :] > token[:, None] - window)
        if prefix is not None:
            seen = seen | ((token >= causal)[:, None] & (other[None, :] != token[:, None]))
    else:
        seen = other[None, :] != token[:, None]
    return seen
