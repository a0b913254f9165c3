"""An AR step, a denoising pass and a commit after texts of any length. Each can be repeated."""

from __future__ import annotations

import torch

from common.models import BLOCK, Texts, random_tokens
from common.timing import TimedCall
from twotower import TwoTowerForCausalLM
from twotower.cache.pools import ContextView


class PassRuns:
    """The passes over texts of up to `longest` tokens. `before` of a timed call restores the texts' length."""

    def __init__(self, model: TwoTowerForCausalLM, longest: int, rows: int = 1) -> None:
        self.model = model
        self.texts = Texts.random(model, rows, longest + 2 * BLOCK)
        self.reader = None if model.denoiser is None else model.reader(self.texts.state)
        self.block, self.t = random_tokens(model, rows, BLOCK), torch.full((rows,), 0.5, device=model.device)
        self.view: ContextView

    def after(self, length: int) -> dict[str, TimedCall]:
        """The passes after texts of a given length; of a model without a denoiser, those of the context tower."""
        runs = {
            "AR step": TimedCall(self._step, lambda: self._before_step(length)),
            "denoiser pass": TimedCall(self.denoise, lambda: self.look(length)),
            "commit": TimedCall(self._commit, lambda: self.texts.set_length(length)),
        }
        if self.reader is None:
            del runs["denoiser pass"]
        return runs

    def look(self, length: int) -> ContextView:
        """The denoiser's view of texts of a given length, valid until the next step or commit."""
        assert self.reader is not None
        self.texts.set_length(length)
        self.view = self.reader.view()
        return self.view

    def denoise(self) -> torch.Tensor:
        return self.model.denoise(self.block, self.t, self.view)

    def _step(self) -> None:
        self.model.extend(self.block[:, :1], self.texts.state)

    def _before_step(self, length: int) -> None:
        """As in decoding, a step also adds the token of the last step to the Mamba states."""
        self.texts.set_length(length - 1)
        self._step()

    def _commit(self) -> None:
        """The commit, with the work that remains until a denoiser can read the text."""
        self.model.extend(self.block, self.texts.state, logits=False)
        self.texts.state.commit_state()
