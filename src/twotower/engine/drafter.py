"""Drafts of verified decoding that come from elsewhere than the denoiser."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Drafter(Protocol):
    """Proposes the tokens that follow a text. Whatever it proposes, the text that is written stays the AR model's."""

    def __call__(self, text: Sequence[int], length: int) -> Sequence[int]:
        """text: prompt and new tokens, the pending one last → at most `length` drafted token ids."""
