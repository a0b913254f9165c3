"""The draft head: the tokens of a pass depend on the token just before each.

A pass predicts all its masks at once, each without the tokens at the others. The draft head adds to the logits of a
mask a term of rank r of the token before it, so that the tokens are drawn from left to right without another pass:

    logits_i += W₂ · W₁[token_{i−1}],    W₁, W₂ (V, r)

(a first-order Markov head, as in DSpark). The confidence of a token is its probability with this term. The token before
the first mask is known: with adapters at masks the AR model's own next token, else the text's last token, or one that
an earlier pass has committed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from twotower.ops.reference.draft_sweep import sweep
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

    @property
    def weights(self) -> tuple[Tensor, Tensor]:
        """W₁ and W₂."""
        return self.previous, self.following

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (…), each before a mask → what it adds to the logits of the mask (…, V)."""
        before = self.previous[tokens]
        out: Tensor = select("linear", before.device, before.dtype).function(before, self.following, None, None)
        return out


def draw(
    head: DraftHead,
    logits: Tensor,
    known: tuple[Tensor, Tensor],
    masked: Tensor,
    before: Tensor,
    choose: Callable[[Tensor, int], tuple[Tensor, Tensor]],
    first: int = 0,
    greedy: bool = False,
) -> tuple[Tensor, Tensor]:
    """Draws the tokens at masks from left to right with the draft head → tokens and confidences (B, L).

    logits (B, L, V), to which the terms are added; known: tokens and confidences (B, L), which are kept where there is
    no mask; masked (B, L): no mask is before `first`. before (B,): the token before the first position.
    choose(logits (B, 1, V), i): the tokens and confidences (B, 1) of position i. greedy: it takes the largest logits,
    for which `draft_sweep` may have a kernel.
    """
    kernel = select("draft_sweep", logits.device, logits.dtype)
    if greedy and kernel.name != "torch":
        drawn: tuple[Tensor, Tensor] = kernel.function(logits, known, masked, before, head.weights, first)
        return drawn
    return sweep(logits, known, masked, before, head, choose, first)
