"""Greedy choice of the tokens at the masks of a pass, each given the token before it (`model.draft_head`)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower.ops.reference.argmax import argmax


def draft_sweep(
    logits: Tensor,
    known: tuple[Tensor, Tensor],
    masked: Tensor,
    before: Tensor,
    weights: tuple[Tensor, Tensor],
    first: int = 0,
) -> tuple[Tensor, Tensor]:
    """Chooses from left to right the token with the largest logit plus term → tokens and confidences (B, L).

    logits (B, L, V), to which the terms are added; known: tokens and confidences (B, L), which are kept where there is
    no mask; masked (B, L): no mask is before `first`; before (B,): the token before the first position; weights: those
    of the term W₂·W₁[token before], W₁ and W₂ (V, r).
    """
    tokens, sure = (part.clone() for part in known)
    previous, following = weights
    for i in range(first, logits.shape[1]):
        own = masked[:, i]
        term = F.linear(previous[tokens[:, i - 1] if i else before], following).to(logits.dtype)
        logits[:, i] = torch.where(own[:, None], logits[:, i] + term, logits[:, i])
        token, confidence = argmax(logits[:, i : i + 1])
        tokens[:, i] = torch.where(own, token[:, 0], tokens[:, i])
        sure[:, i] = torch.where(own, confidence[:, 0].to(sure.dtype), sure[:, i])
    return tokens, sure
