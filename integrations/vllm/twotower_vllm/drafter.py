"""Drafts of the denoiser from the states of a context tower that another engine runs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower.cache.pools import ContextView
from twotower.decoding.block_rule import noise_level
from twotower.model.draft_head import draw
from twotower.model.towers import TwoTowerModel
from twotower_vllm.draft_settings import DraftSettings


@dataclass
class DenoiserDrafter:
    """Drafts `length` tokens for each text. The context tower of the model is not used, except by adapters on it."""

    model: TwoTowerModel
    length: int
    settings: DraftSettings

    def draft(self, pending: Tensor, view: ContextView) -> Tensor:
        """Drafts (B, length) that follow the pending tokens (B,), which are not in the view yet.

        Each pass keeps the predictions above the threshold and the surest one, the last pass keeps all. With a draft
        head it keeps predictions from the left: those up to the first below the threshold, and at least one.
        """
        choices, mask = self.model.config.denoiser, self.model.config.mask_token
        shift, size = choices.prediction_shift, self.length + 1
        block = torch.full((len(pending), size), mask, device=pending.device)
        block[:, 0] = pending
        masked = torch.ones_like(block, dtype=torch.bool)
        masked[:, 0] = False
        for left in range(self.settings.draft_passes, 0, -1):
            denoise = self.model.denoise
            if choices.block_attention == "prefix_causal":
                denoise = partial(denoise, prefix=(~masked).long().cumprod(1).sum(1))
            open_predictions = masked.sum(1).to(self.model.dtype)
            t = noise_level(open_predictions, torch.full_like(open_predictions, size), shift)
            logits = denoise(block, t, view)
            # The outputs that predict the inputs after the first: with shift 1, each predicts the token after it.
            candidate, sure = self._candidates(logits[:, 1 - shift : size - shift], block, masked)
            above = sure > self.settings.threshold
            if self.model.draft_head is None:
                best = sure == sure.masked_fill(~masked, -1).amax(1, keepdim=True)
            else:
                unsure = masked & ~above
                above, best = unsure.cumsum(1) == 0, masked & (masked.cumsum(1) == 1)
            kept = masked & (above | best | (left == 1))
            block, masked = torch.where(kept, candidate, block), masked & ~kept
        return block[:, 1:]

    def _candidates(self, logits: Tensor, block: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
        """The best token for each input (B, L) of a block, and its probability.

        logits (B, L − 1, V) predict the inputs after the first, which is known.
        """
        mask, head = self.model.config.mask_token, self.model.draft_head

        def choose(own: Tensor, place: int = 0) -> tuple[Tensor, Tensor]:
            own[..., mask] = -torch.inf
            sure, candidate = own.softmax(-1).max(-1)
            return candidate, sure

        found = choose(logits)
        if head is not None:
            open_, first = masked[:, 1:].clone(), 0
            if self.model.config.denoiser.acts_at_masks:  # the first output is that of AR
                open_[:, 0], first = False, 1
            known = torch.where(masked[:, 1:], found[0], block[:, 1:]), found[1]
            found = draw(head, logits, known, open_, block[:, 0], choose, first)
        candidate, sure = (F.pad(part, (1, 0)) for part in found)
        return candidate, sure
