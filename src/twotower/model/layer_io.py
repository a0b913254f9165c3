"""What passes between a context layer and its denoiser layer, and between one pass of a tower and the next.

Mixers are pure: (hidden, read-only past) → (output, what this pass adds). Only `state.py` keeps anything.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from twotower.ops.reference.attention import Cached
from twotower.ops.reference.mamba_block import MambaTrace


class KeyValue(NamedTuple):
    """Attention: keys and values, each (B, Hkv, T, D)."""

    k: Tensor
    v: Tensor


class MambaPast(NamedTuple):
    """Mamba-2 at one point of the text: the last K−1 raw convolution inputs (B, K−1, C), oldest first,
    and the SSM state (B, H, P, N)."""

    conv_window: Tensor
    ssm_state: Tensor


Past = KeyValue | Cached | MambaPast | None  # KeyValue in training, over whole sequences
Added = KeyValue | MambaTrace | None


@dataclass(frozen=True, kw_only=True)
class Visibility:
    """What the L tokens of one pass may see; the same for every layer.

    valid:        (B, L) False at padding, or None: every token counts.
    causal:       whether a token sees later tokens of its own pass (the denoiser's block does).
    start:        (B,) the first token's absolute position. Nemotron-H has no positional encoding; backbones with one
                  read it here.
    counting:     (1,) place of a token that counts, among all B·L; None: not looked for (`with_counting`).
    """

    valid: Tensor | None = None
    causal: bool = True
    start: Tensor | None = None
    counting: Tensor | None = None

    def with_counting(self) -> Visibility:
        """The same with `counting`, where there may be padding. Formed anew in each pass: recorded ones repeat it."""
        if self.valid is None:
            return self
        return replace(self, counting=self.valid.flatten().byte().argmax(0, keepdim=True))

    def visited(self, choice: Tensor) -> Tensor:
        """choice (B·L, k), the experts of each token → those that are visited: padding goes where a token goes that
        counts, so that no expert's weights are read for it alone."""
        if self.valid is None or self.counting is None:
            return choice
        return torch.where(self.valid.flatten()[:, None], choice, choice.index_select(0, self.counting))


def context_visible(key_positions: Tensor, block_start: Tensor) -> Tensor:
    """The rule of the coupling, for generation and training alike: a block sees the context strictly before it.

    key_positions (T,), block_start (N,) → bool (N, T).
    """
    return key_positions < block_start[:, None]
