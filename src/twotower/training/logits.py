"""Logits of many positions, in chunks of limited memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower.model.tower import Tower
from twotower.training.layer_pair import run_unit

MAX_LOGITS = 2**26  # 256 MB in fp32; more logits are computed in chunks, and recomputed in the backward pass


def negative_log_likelihood(tower: Tower, hidden: Tensor, tokens: Tensor) -> Tensor:
    """Final hidden states (N, H) of a tower, tokens (N,) → −ln p (N,) in nats, at least fp32.

    More than MAX_LOGITS logits are computed in chunks, which are recomputed in the backward pass.
    """
    chunks = list(in_chunks(tower, hidden, tokens))
    if len(chunks) == 1:
        return _nll(tower, hidden, tokens)
    return torch.cat([run_unit(_nll, True, tower, h, y) for h, y in chunks])


def in_chunks(tower: Tower, *parts: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Splits tensors of N positions, such as hidden (N, H), into chunks, at least one, of at most MAX_LOGITS logits."""
    at_once = positions_at_once(tower.spec.vocab_size)
    yield from zip(*(part.split(at_once) for part in parts), strict=True)


def positions_at_once(vocab_size: int) -> int:
    """The number of positions whose logits are in memory at once."""
    return max(MAX_LOGITS // vocab_size, 1)


def _nll(tower: Tower, hidden: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(tower.logits(hidden), tokens, reduction="none")
