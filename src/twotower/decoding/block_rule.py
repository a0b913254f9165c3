"""The inputs of a block, its open predictions and what its commit brings, as the checkpoint chooses them.

Let p be the position of the last token of the text, and S the block size.

released           the state holds the text; S masks; output i predicts the token at input i, p + 1 + i
prediction shift 1 the state holds the tokens before p; the token at p and S − 1 masks; output i predicts the token
                   after input i, p + 1 + i. The outputs 0 … S − 2 fill the masks. The context tower's pass over the S
                   inputs chooses the token at p + S, which begins the next block.
first_from_ar      as released, but the context tower has chosen the first token, which is text before the block opens

Verified decoding begins a block with the token at p in every case.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from twotower.denoiser_fields import DenoiserConfig

Count = TypeVar("Count", float, Tensor)


@dataclass(frozen=True)
class BlockRule:
    """The rule of a model's blocks.

    shift: the output at an input predicts the token so many positions later. first_from_ar: in diffusion the AR model
    chooses the first token of each block. one_pass: one pass checks a draft and makes the next (`engine.one_pass`).
    draft_head: the tokens of a pass are drawn from left to right (`model.draft_head`).
    """

    shift: int = 0
    first_from_ar: bool = False
    one_pass: bool = False
    draft_head: bool = False

    @classmethod
    def of(cls, denoiser: DenoiserConfig) -> BlockRule:
        """The rule that a checkpoint chooses."""
        head = denoiser.draft_head is not None
        return cls(denoiser.prediction_shift, denoiser.first_from_ar, denoiser.acts_at_masks, head)

    @property
    def commits_from_left(self) -> bool:
        """Whether diffusion has the commit policy `span` alone, which `threshold` then stands for too."""
        return self.one_pass or self.draft_head

    def begins_with_text(self, mode: str) -> bool:
        """Whether the first input of a block is the pending token: the last of the text, not yet in the state."""
        if mode == "diffusion":
            return bool(self.shift) or self.first_from_ar or self.one_pass
        return mode == "verified"

    def predictions(self, size: int, mode: str) -> int:
        """Open predictions of a new block of `size` inputs."""
        return size - self.begins_with_text(mode)


RELEASED = BlockRule()


def noise_level(open_predictions: Count, size: Count, shift: int) -> Count:
    """t, the share of a block's predictions that are open, in generation and in training.

    size: inputs of the block. With shift 1 the first input is always known, so there are size − 1 predictions.
    """
    return open_predictions / (size - shift)
