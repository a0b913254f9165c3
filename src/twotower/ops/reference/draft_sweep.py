"""Greedy choice of the tokens at the masks of a pass, each given the token before it (`model.draft_head`)."""

from __future__ import annotations

from collections.abc import Callable

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
    previous, following = weights

    def term(tokens: Tensor) -> Tensor:
        return F.linear(previous[tokens], following)

    return sweep(logits, known, masked, before, term, lambda row, _: argmax(row), first)


def sweep(
    logits: Tensor,
    known: tuple[Tensor, Tensor],
    masked: Tensor,
    before: Tensor,
    term: Callable[[Tensor], Tensor],
    choose: Callable[[Tensor, int], tuple[Tensor, Tensor]],
    first: int,
) -> tuple[Tensor, Tensor]:
    """The same with another choice: choose(logits (B, 1, V), i) → tokens and confidences (B, 1) of position i.

    term: of the tokens (B,) before a position, what is added to its logits (B, V).
    """
    tokens, sure = (part.clone() for part in known)
    for i in range(first, logits.shape[1]):
        own, added = masked[:, i], term(tokens[:, i - 1] if i else before).to(logits.dtype)
        logits[:, i] = torch.where(own[:, None], logits[:, i] + added, logits[:, i])
        token, confidence = choose(logits[:, i : i + 1], i)
        tokens[:, i] = torch.where(own, token[:, 0], tokens[:, i])
        sure[:, i] = torch.where(own, confidence[:, 0].to(sure.dtype), sure[:, i])
    return tokens, sure
