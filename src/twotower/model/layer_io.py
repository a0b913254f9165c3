"""What the tokens of one pass may see: of each other, and of the text before them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class AttentionMetadata:
    """What the L tokens of one pass may see; the same for every layer.

    valid:        (B, L) False at padding, or None: every token counts.
    causal:       whether a token sees later tokens of its own pass (the denoiser's block does).
    start:        (B,) the first token's absolute position. Nemotron-H has no positional encoding; backbones with one
                  read it here.
    representative:     (1,) place of a token that counts, among all B·L; None: not looked for (`with_representative`).
    """

    valid: Tensor | None = None
    causal: bool = True
    start: Tensor | None = None
    representative: Tensor | None = None

    def with_representative(self) -> AttentionMetadata:
        """The same with `counting`, where there may be padding. Formed anew in each pass: recorded ones repeat it."""
        if self.valid is None:
            return self
        return replace(self, representative=self.valid.flatten().byte().argmax(0, keepdim=True))

    def route_padding(self, choice: Tensor) -> Tensor:
        """choice (B·L, k), the experts of each token → those that are visited: padding goes where a token goes that
        counts, so that no expert's weights are read for it alone."""
        if self.valid is None or self.representative is None:
            return choice
        return torch.where(self.valid.flatten()[:, None], choice, choice.index_select(0, self.representative))


def context_visible(key_positions: Tensor, block_start: Tensor) -> Tensor:
    """The rule of the coupling, for generation and training alike: a block sees the context strictly before it.

    key_positions (T,), block_start (N,) → bool (N, T).
    """
    return key_positions < block_start[:, None]
