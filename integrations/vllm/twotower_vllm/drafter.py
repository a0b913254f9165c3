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

        Each pass keeps the predictions above the threshold and the surest one, the last pass keeps all.
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
            candidate, sure = self._candidates(logits)
            if shift:  # the output at an input predicts the token after it
                candidate, sure = F.pad(candidate[:, :-1], (1, 0)), F.pad(sure[:, :-1], (1, 0))
            best = sure.masked_fill(~masked, -1).amax(1, keepdim=True)
            kept = masked & ((sure > self.settings.threshold) | (sure == best) | (left == 1))
            block, masked = torch.where(kept, candidate, block), masked & ~kept
        return block[:, 1:]

    def _candidates(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The best token at each output (B, L), and its probability."""
        mask = self.model.config.mask_token

        def choose(own: Tensor, place: int = 0) -> tuple[Tensor, Tensor]:
            own[..., mask] = -torch.inf
            sure, candidate = own.softmax(-1).max(-1)
            return candidate, sure

        drawn, head = choose(logits), self.model.draft_head
        if head is None:
            return drawn
        return draw(head, logits, drawn, torch.ones(len(logits), device=logits.device), 1, choose)
