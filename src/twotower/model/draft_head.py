"""The draft head: drafted tokens depend on the token drafted just before.

A pass predicts all its masks at once, each without the tokens at the others. The draft head adds to the logits of a
mask a term of rank r of the token before it, so that a draft is drawn from left to right without another pass:

    logits_i += W₂ · W₁[token_{i−1}],    W₁, W₂ (V, r)

(a first-order Markov head, as in DSpark). The token before the first mask is the AR model's own next token. The
confidence of a drafted token is its probability with this term.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from twotower.ops.registry import select


class DraftHead(nn.Module):
    """previous: W₁ (V, r); following: W₂ (V, r)."""

    __call__: Callable[..., Tensor]

    def __init__(self, vocab_size: int, rank: int) -> None:
        super().__init__()
        self.previous = nn.Parameter(torch.empty(vocab_size, rank))
        self.following = nn.Parameter(torch.empty(vocab_size, rank))

    def reset_parameters(self) -> None:
        """previous ~ N(0, 1 / r), following = 0: no effect."""
        nn.init.normal_(self.previous, std=self.previous.shape[1] ** -0.5)
        nn.init.zeros_(self.following)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (…), each before a mask → what it adds to the logits of the mask (…, V)."""
        before = self.previous[tokens]
        out: Tensor = select("linear", before.device, before.dtype).function(before, self.following, None, None)
        return out


def draw(
    head: DraftHead,
    logits: Tensor,
    drawn: tuple[Tensor, Tensor],
    prefix: Tensor,
    first: int,
    choose: Callable[[Tensor, int], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    """Draws the tokens at masks again, from left to right, with the draft head → tokens and confidences (B, L).

    logits (B, L, V), to which the terms are added; drawn: tokens and confidences (B, L) without the head; prefix (B,):
    the first mask of each row, none before `first`. choose(logits (B, 1, V), i): the tokens and confidences (B, 1) of
    position i.
    """
    tokens, sure = (part.clone() for part in drawn)
    for i in range(first, logits.shape[1]):
        masked = i >= prefix
        term = head(tokens[:, i - 1]).to(logits.dtype)
        logits[:, i] = torch.where(masked[:, None], logits[:, i] + term, logits[:, i])
        token, confidence = choose(logits[:, i : i + 1], i)
        tokens[:, i], sure[:, i] = token[:, 0], confidence[:, 0]
    return tokens, sure
