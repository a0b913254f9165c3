"""Logits of many positions, in chunks of limited memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower.model.tower import Tower
from twotower.ops.precision import upcast
from twotower.training.layer_pair import run_unit

MAX_LOGITS = 2**26  # 256 MB in fp32; more logits are computed in chunks, and recomputed in the backward pass


def negative_log_likelihood(tower: Tower, hidden: Tensor, tokens: Tensor, before: Tensor | None = None) -> Tensor:
    """Final hidden states (N, H) of a tower, tokens (N,) → −ln p (N,) in nats, at least fp32. before: see `logits_of`.

    More than MAX_LOGITS logits are computed in chunks, which are recomputed in the backward pass.
    """
    parts = (hidden, tokens) if before is None else (hidden, tokens, before)
    chunks = list(in_chunks(tower, *parts))
    if len(chunks) == 1:
        return _nll(tower, *parts)
    return torch.cat([run_unit(_nll, True, tower, *chunk) for chunk in chunks])


def logits_of(tower: Tower, hidden: Tensor, before: Tensor | None = None) -> Tensor:
    """Final hidden states (N, H) of a tower → logits (N, V) in at least fp32.

    before: the token (N,) before each predicted one, for the tower's draft head, if it has one; −1: there is none, so
    the head adds nothing. None: without the head.
    """
    logits = tower.logits(hidden)
    if tower.draft_head is None or before is None:
        return logits
    term = upcast(tower.draft_head(before.clamp(min=0)))
    return logits + torch.where((before >= 0)[:, None], term, 0.0)


def in_chunks(tower: Tower, *parts: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Splits tensors of N positions, such as hidden (N, H), into chunks, at least one, of at most MAX_LOGITS logits."""
    at_once = positions_at_once(tower.spec.vocab_size)
    yield from zip(*(part.split(at_once) for part in parts), strict=True)


def positions_at_once(vocab_size: int) -> int:
    """The number of positions whose logits are in memory at once."""
    return max(MAX_LOGITS // vocab_size, 1)


def _nll(tower: Tower, hidden: Tensor, tokens: Tensor, before: Tensor | None = None) -> Tensor:
    return F.cross_entropy(logits_of(tower, hidden, before), tokens, reduction="none")
