"""The objective of adapters (`model.adapters`): predict, at the masks of a block, what the frozen AR model says there.

Column c of a block predicts token c + 1 of the document, across the edge of the block too. The tokens before the first
mask are computed as AR computes them, so only the columns from the first mask on are trained. Their target is a mixture
of AR's own distribution on the clean text, at the same column, and the text's token (`targets`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from twotower.model.adapters import train_adapters_only
from twotower.model.tower import Tower
from twotower.training.alignment import misalignment
from twotower.training.columns import before_masks, blocks_with_masks, position_weights, wanted_columns
from twotower.training.data.batch import Batch
from twotower.training.layer_pair import LayerPair, run_unit
from twotower.training.logits import in_chunks
from twotower.training.noise import Corruption
from twotower.training.patterns import draw_masks
from twotower.training.recipe import ADAPTER_RECIPE, Recipe
from twotower.training.targets import Examples, log_probabilities, loss_of, target_losses
from twotower.training.training_inputs import TrainingInputs


@dataclass(frozen=True, kw_only=True)
class AdapterOptions:
    """How adapters are trained."""

    mask_token_id: int
    seed: int = 0
    recipe: Recipe = ADAPTER_RECIPE
    activation_checkpointing: bool = False


class AdapterObjective(nn.Module):
    """Sets which parameters of a tower with adapters require gradients: these, the mask's embedding, the draft head."""

    def __init__(self, tower: Tower, options: AdapterOptions) -> None:
        super().__init__()
        assert tower.mask_embedding is not None
        train_adapters_only(tower)
        self.embeddings, self.norm_f, self.head = tower.embeddings, tower.norm_f, tower.head
        self.mask_embedding, self.draft_head = tower.mask_embedding, tower.draft_head
        layers = list(tower.all_layers())
        self.units = nn.ModuleList(LayerPair(own, own, train_context=False, runs_context=True) for own in layers)
        self.options = options
        self._tower = (tower,)  # a tuple: not a submodule, so that each weight has one name

    @property
    def tower(self) -> Tower:
        """The tower, while its parts are unsharded."""
        return self._tower[0]

    def draw_noise(self, batch: Batch, block_size: int) -> Corruption:
        """Draws the masks of each block, on the CPU."""
        return draw_masks(batch, block_size, self.options.recipe.patterns, seed=self.options.seed, shift=1)

    def targets(self, batch: Batch, noise: Corruption | None) -> float:
        assert noise is not None
        block_size = batch.tokens.shape[1] // noise.t.shape[1]
        wanted = wanted_columns(batch, noise, block_size, 1, gated=True)
        decay = 0.0 if noise.on_policy else self.options.recipe.position_decay
        return float(position_weights(wanted, block_size, decay).sum())

    def ar_targets(self, batch: Batch) -> int:
        return 0

    def forward(self, batch: Batch, noise: Corruption | None, block_size: int, ratio: float | None = None) -> Tensor:
        """Summed loss in nats, a scalar. The batch and the noise may be on the host."""
        assert noise is not None
        inputs = self._inputs(batch, noise, block_size)
        columns = inputs.columns
        hidden, clean, apart = self.hidden(inputs)
        recipe, mask_token = self.options.recipe, self.options.mask_token_id
        examples = Examples(hidden, clean, columns.token, columns.known, columns.before)
        losses = target_losses(loss_of(recipe.targets, noise), self.tower, self.tower, mask_token, examples)
        if noise.on_policy:
            return losses.sum()
        if apart is not None:
            losses = losses + recipe.alignment * apart
        if recipe.position_decay:
            losses = losses * inputs.weights.to(losses.dtype)
        return losses.sum()

    def _inputs(self, batch: Batch, noise: Corruption, block_size: int) -> TrainingInputs:
        masks, wanted = noise.stacked, wanted_columns(batch, noise, block_size, 1, gated=True)
        chosen = blocks_with_masks(masks, block_size)
        return TrainingInputs.of(
            batch,
            noise,
            chosen,
            before_masks(masks, chosen, block_size),
            wanted,
            position_weights(wanted, block_size, self.options.recipe.position_decay),
            shift=1,
            mask_token=self.options.mask_token_id,
            device=self.embeddings.weight.device,
        )

    def hidden(self, inputs: TrainingInputs) -> tuple[Tensor, Tensor, Tensor | None]:
        """→ final hidden states at the trained columns (n, H), of the adapted and of the plain tower; and with
        alignment the mean 1 − cosine (n,) of all layers."""
        layout, columns = inputs.layout, inputs.columns
        with torch.no_grad():
            clean = self.tower.embed(inputs.tokens)
        noisy = self.tower.embed(inputs.noisy, layout.adapted)
        apart = []
        for unit in self.units:
            read, noisy = run_unit(unit, self.options.activation_checkpointing, clean, noisy, None, layout)
            clean = read if read is not None else clean
            if self.options.recipe.alignment:
                apart.append(misalignment(noisy, clean, layout, columns))
        own = self.norm_f(layout.to_rows(noisy).flatten(0, 1)[columns.at])
        plain = self.norm_f(clean.flatten(0, 1)[columns.clean_at])
        return own, plain, torch.stack(apart).mean(0) if apart else None

    def agreement(self, batch: Batch, noise: Corruption, block_size: int) -> tuple[Tensor, Tensor]:
        """→ (B, S) trained columns whose most likely token is that of the AR model, and (B, S) all trained columns.

        Register this method with `register_fsdp_forward_method`: FSDP then treats it as a forward pass.
        """
        inputs = self._inputs(batch, noise, block_size)
        hidden, clean, _ = self.hidden(inputs)
        agrees, wanted = (torch.zeros(noise.stacked.masked.shape, dtype=torch.bool, device=clean.device) for _ in "ab")
        pieces = in_chunks(self.tower, hidden, clean, inputs.columns.before)
        found = torch.cat([self._choice(own, token) == self._choice(plain) for own, plain, token in pieces])
        agrees.view(-1)[inputs.columns.at], wanted.view(-1)[inputs.columns.at] = found, True
        return agrees, wanted

    def _choice(self, hidden: Tensor, before: Tensor | None = None) -> Tensor:
        return log_probabilities(self.tower, hidden, self.options.mask_token_id, before).argmax(-1)
