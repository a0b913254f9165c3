"""The most probable token of each position and its probability, without an upcast copy of all logits."""

from __future__ import annotations

import torch
from torch import Tensor

from twotower.ops.precision import accumulation_dtype, upcast

TILE_BYTES = 8 << 20  # bytes of upcast logits at a time


def argmax(logits: Tensor, excluded: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The most probable token of each position, and its probability.

    logits (B, L, V); excluded (B,): one token id per row that is left out (−1 or None: none). Returns tokens (B, L)
    int64 and confidence (B, L) in at least fp32: the token's probability among the tokens that are not left out.

    Of equal logits the lowest id wins. At least one logit of each position must be finite. Upcasts one tile of
    positions at a time.
    """
    acc = accumulation_dtype(logits.dtype)
    flat = logits.flatten(0, 1)  # (B·L, V)
    if excluded is None:
        excluded = torch.full((len(logits),), -1, device=logits.device)
    left_out = excluded.repeat_interleave(logits.shape[1])[:, None]
    ids = torch.arange(logits.shape[2], device=logits.device)
    step = max(TILE_BYTES // (logits.shape[2] * acc.itemsize), 1)
    parts = []
    for start in range(0, len(flat), step):
        tile = upcast(flat[start : start + step])
        tile = tile.masked_fill(ids == left_out[start : start + step], -torch.inf)
        tokens = tile.argmax(-1, keepdim=True)  # the first of equal logits
        confidence = (tile.gather(-1, tokens)[:, 0] - tile.logsumexp(-1)).exp()
        parts.append((tokens[:, 0], confidence))
    if not parts:
        return excluded.new_zeros(logits.shape[:2]), logits.new_zeros(logits.shape[:2], dtype=acc)
    every_token, every_confidence = (torch.cat(values).view(logits.shape[:2]) for values in zip(*parts, strict=True))
    return every_token, every_confidence
