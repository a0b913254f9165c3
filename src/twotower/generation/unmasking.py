"""Commit policies: which masked positions of a block become final after a pass. Pure functions of tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def commit_confident(confidence: Tensor, masked: Tensor, step: int, steps: int, threshold: float) -> Tensor:
    """The released rule → bool (B, L), the positions to commit.

    Of each row's masked positions the k most confident, where
    k = min(#masked, max(#{confidence > threshold}, 1, ⌈#masked / (steps − step)⌉)); the last step commits all.
    Equal confidences: the leftmost position first.

    confidence (B, L); masked (B, L) bool; step counts from 0.
    """
    left = masked.sum(1)
    sure = (masked & (confidence > threshold)).sum(1)
    due = -(-left // (steps - step))
    count = torch.minimum(left, torch.maximum(sure, due.clamp(min=1)))
    order = confidence.masked_fill(~masked, -1.0).argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(dim=1)
    return masked & (rank < count[:, None])
