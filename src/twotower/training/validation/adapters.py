"""Validation of adapters: how often a draft is what AR says, and verified decoding of held-out prompts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.distributed.fsdp import register_fsdp_forward_method

from twotower.decoding.params import GenerationParams
from twotower.errors import ArgumentError
from twotower.modeling_twotower import TwoTowerForCausalLM
from twotower.training.adapter_objective import AdapterObjective
from twotower.training.data.batch import Batch
from twotower.training.fsdp import World, sharded
from twotower.training.log_schema import Validation
from twotower.training.noise import Corruption
from twotower.training.validation.kept import TextsKept
from twotower.training.validation.samples import shared_prompts, unsharded, write_samples


class AdapterValidation:
    """Validation of adapters in training.

    masked_nll: the loss per trained column, with the first masks of training (`AdapterObjective`).
    agreement: share of columns after a single token where the adapters' most likely token is that of the AR model
        after the true text.
    draft_tokens: 1 + the mean number of columns from the left that agree: tokens of a round with such a draft.
    tokens_per_pass, sample: verified decoding of the prompts, one pass a round.
    free_tokens, texts_kept, ar_accuracy, accuracy_kept: free diffusion of held-out prompts (`kept.TextsKept`).

    Args: see `DenoisingValidation`.

    Raises:
        ArgumentError: no held-out document has a block to denoise; prompts and new tokens beyond the context window.
    """

    def __init__(
        self,
        model: TwoTowerForCausalLM,
        objective: AdapterObjective,
        held_out: Mapping[str, Iterable[Batch]],
        world: World,
        *,
        block_size: int,
        eos_token_id: int | Sequence[int] | None,
        prompts: int = 8,
        max_new_tokens: int = 128,
    ) -> None:
        self.model, self.objective, self.world, self.block_size = model, objective, world, block_size
        sources = [list(batches) for batches in held_out.values()]
        self.batches = [batch for batches in sources for batch in batches]
        if not world.total(sum(int(batch.denoised.sum()) for batch in self.batches)):
            raise ArgumentError(
                f"no held-out document has a whole block of {block_size} tokens; give longer documents or validation "
                "data, or train without validation (--held-out 0)"
            )
        self._registered = False
        self.params = GenerationParams.of(
            mode="verified",
            draft_steps=1,
            block_size=block_size,
            mask_token_id=objective.options.mask_token_id,
            max_new_tokens=max_new_tokens,
            eos_token_id=eos_token_id,
            seed=0,
        )
        self.prompts = shared_prompts(model, sources, prompts, self.params, world, shift=1)
        self.kept = TextsKept(model, sources, self.params, world, shift=1) if prompts else None

    @torch.no_grad()
    def __call__(self, step: int) -> Validation:
        """Computes all figures, for a log record."""
        if not self._registered:
            register_fsdp_forward_method(self.objective, "agreement")
            self._registered = True
        sums = torch.zeros(6, dtype=torch.float64)
        try:
            for batch in self.batches:
                sums += self._compare(batch)
        finally:
            for module in sharded(self.objective):
                module.reshard()
        nats, targets, agreed, compared, run, blocks = map(self.world.total, sums.tolist())
        record: Validation = {
            "masked_nll": nats / max(targets, 1.0),
            "agreement": agreed / max(compared, 1.0),
            "draft_tokens": 1 + run / max(blocks, 1.0),
        }
        if self.prompts:
            with unsharded(self.objective.modules()):
                record |= write_samples(self.model, self.prompts, self.params, self.world)
                record |= {} if self.kept is None else self.kept.measure()
        return record

    def _compare(self, batch: Batch) -> Tensor:
        """(6,): summed loss, its columns; agreements after a single token, their columns; runs, their blocks."""
        noise = self.objective.draw_noise(batch, self.block_size)
        here, device = batch.to(self.world.device), self.world.device
        loss = self.objective(here, noise.to(device), self.block_size)
        single = torch.arange(batch.tokens.shape[1]) % self.block_size >= 1
        draft = Corruption(torch.ones_like(noise.t), batch.denoised & single).to(device)
        agrees, wanted = self.objective.agreement(here, draft, self.block_size)
        blocks = [part.unflatten(1, (-1, self.block_size))[..., 1:] for part in (agrees, wanted)]
        run = (blocks[0] | ~blocks[1]).long().cumprod(-1) * blocks[1]
        counts = [self.objective.targets(batch, noise), agrees.sum(), wanted.sum(), run.sum(), blocks[1].any(-1).sum()]
        return torch.tensor([float(value) for value in (loss, *counts)], dtype=torch.float64)
