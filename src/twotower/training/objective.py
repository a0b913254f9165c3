"""The two objectives as modules that can be sharded: next-token prediction and masked diffusion.

Both return summed losses. The trainer divides by the number of targets over all processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from twotower.model.adapters import train_adapters_only
from twotower.model.conditioning import Modulation, TimeConditioning
from twotower.model.packed_layout import Layout
from twotower.model.tower import Tower
from twotower.ops.host_transfer import send
from twotower.training.alignment import misalignment
from twotower.training.columns import (
    TrainedColumns,
    before_masks,
    blocks_with_masks,
    inside_blocks,
    next_tokens,
    position_weights,
    wanted_columns,
)
from twotower.training.data.batch import Batch
from twotower.training.layer_pair import AutoregressiveLayer, LayerPair, pair_layers, run_pair, run_unit
from twotower.training.logits import negative_log_likelihood
from twotower.training.noise import Corruption, NoiseScope
from twotower.training.patterns import draw_masks
from twotower.training.recipe import AS_RELEASED, Recipe
from twotower.training.targets import Examples, Targets, loss_of, target_losses
from twotower.training.training_inputs import NextTokens, TrainingInputs

Result = TypeVar("Result")


class Objective(Protocol):
    """What the trainer needs of an objective, which is also an `nn.Module`."""

    units: nn.ModuleList  # sharded one by one, in the order in which they run

    def draw_noise(self, batch: Batch, block_size: int) -> Corruption | None:
        """Draws the noise of a batch, on the CPU."""

    def targets(self, batch: Batch, noise: Corruption | None) -> float:
        """The number of targets, or the sum of their weights, by which the trainer divides the summed loss."""

    def ar_targets(self, batch: Batch) -> int:
        """The number of targets of the additional next-token loss; 0: there is no such loss."""

    def __call__(self, batch: Batch, noise: Corruption | None, block_size: int, ratio: float | None = None) -> Tensor:
        """The summed loss. ratio: targets / AR targets of the global batch, over all processes; None: of this batch."""


class AutoregressiveObjective(nn.Module):
    """Next-token cross-entropy over the tokens of each document after its first.

    prompt_loss: False leaves out the tokens of prompts.
    """

    def __init__(self, tower: Tower, *, activation_checkpointing: bool = False, prompt_loss: bool = True) -> None:
        super().__init__()
        self._tower = (tower,)  # a tuple: not a submodule, so that each weight has one name
        self.embeddings, self.norm_f, self.head = tower.embeddings, tower.norm_f, tower.head
        self.units = nn.ModuleList(AutoregressiveLayer(layer) for layer in tower.all_layers())
        self.activation_checkpointing, self.prompt_loss = activation_checkpointing, prompt_loss

    @property
    def tower(self) -> Tower:
        """The tower that is trained, while its parts are unsharded."""
        return self._tower[0]

    def draw_noise(self, batch: Batch, block_size: int) -> None:
        return None

    def targets(self, batch: Batch, noise: Corruption | None = None) -> int:
        return int(next_tokens(batch, self.prompt_loss).sum())

    def ar_targets(self, batch: Batch) -> int:
        return 0

    def forward(self, batch: Batch, noise: Corruption | None, block_size: int, ratio: float | None = None) -> Tensor:
        """Summed loss in nats, a scalar."""
        device = self.embeddings.weight.device
        layout, wanted = Layout(batch.document, block_size).to(device), NextTokens.of(batch, self.prompt_loss, device)
        x = self.tower.embed(send(batch.tokens, device))
        for unit in self.units:
            x = run_unit(unit, self.activation_checkpointing, x, layout)
        hidden = self.norm_f(x.flatten(0, 1)[wanted.at])
        return negative_log_likelihood(self.tower, hidden, wanted.token).sum()


@dataclass(frozen=True, kw_only=True)
class DenoisingOptions:
    """How the denoiser is trained.

    scope: what shares a noise level. elbo: weight the loss by 1/t and divide by all trained tokens; this is the
    bound on −ln p instead of the mean over masked positions. train_context: the context tower is trained too, through
    its keys, values and Mamba states. ar_weight: with train_context, weight of the context tower's next-token loss.
    activation_checkpointing: keep only the two residual streams of each layer. time: the denoiser is conditioned on t.
    shift: column c of a block predicts token c + shift. prefix_causal: see `DenoiserConfig.block_attention`. on_policy:
    stored states are trained too (`on_policy`).
    """

    mask_token_id: int
    scope: NoiseScope = "document"
    seed: int = 0
    elbo: bool = False
    train_context: bool = False
    ar_weight: float = 0.0
    activation_checkpointing: bool = False
    time: bool = True
    shift: int = 0
    prefix_causal: bool = False
    on_policy: bool = False
    recipe: Recipe = AS_RELEASED

    def __post_init__(self) -> None:
        if self.elbo:
            assert not self.on_policy
            self.recipe.check_likelihood_bound()


class DenoisingObjective(nn.Module):
    """Cross-entropy of the true tokens at masked positions, over all blocks at once; or another recipe's loss.

    The context tower reads the clean rows, without its head and, if frozen, without gradients. context and denoiser
    may be the same tower; then train_context must be set, or the tower has adapters, which act at every position of a
    block and are trained alone. Sets which parameters require gradients.
    """

    def __init__(
        self, context: Tower, denoiser: Tower, time: TimeConditioning | None, options: DenoisingOptions
    ) -> None:
        super().__init__()
        self.mask_embedding = denoiser.mask_embedding
        if self.mask_embedding is not None:
            assert context is denoiser
            assert not options.train_context
            train_adapters_only(denoiser)
        else:
            assert options.train_context or (context is not denoiser and not options.ar_weight)
            context.requires_grad_(options.train_context)
            for part in (context.norm_f, context.head):  # only the next-token loss and validation use them
                part.requires_grad_(options.ar_weight > 0)  # a tied head has no weight of its own
            denoiser.requires_grad_(True)
        if time is not None:
            time.requires_grad_(options.time)
        self.context_embeddings, self.context_norm_f, self.context_head = (
            context.embeddings,
            context.norm_f,
            context.head,
        )
        self.embeddings, self.norm_f, self.head, self.time = denoiser.embeddings, denoiser.norm_f, denoiser.head, time
        self.draft_head = denoiser.draft_head
        pairs = pair_layers(
            context,
            denoiser,
            train_context=options.train_context,
            all_context_layers=options.ar_weight > 0 or options.recipe.teacher or options.on_policy,
        )
        self.units = nn.ModuleList(pairs)
        self.options = options
        self._towers = context, denoiser  # a tuple: not submodules, so that each weight has one name

    @property
    def context(self) -> Tower:
        """The context tower. Under FSDP its parts are sharded outside of a forward pass."""
        return self._towers[0]

    @property
    def denoiser(self) -> Tower:
        """The denoiser tower, likewise."""
        return self._towers[1]

    def draw_noise(self, batch: Batch, block_size: int) -> Corruption:
        own = self.options
        return draw_masks(batch, block_size, own.recipe.patterns, seed=own.seed, scope=own.scope, shift=own.shift)

    def targets(self, batch: Batch, noise: Corruption | None) -> float:
        assert noise is not None
        if self.options.elbo:
            positions = torch.arange(batch.tokens.shape[1], device=batch.denoised.device)
            return int((batch.denoised & (positions % self._block_size(noise) >= self.options.shift)).sum())
        block_size = self._block_size(noise)
        wanted = self._wanted(batch, noise, block_size)
        return float(wanted.sum() if noise.on_policy else self._weights(wanted, block_size).sum())

    def ar_targets(self, batch: Batch) -> int:
        return int(next_tokens(batch).sum()) if self.options.ar_weight else 0

    def forward(self, batch: Batch, noise: Corruption | None, block_size: int, ratio: float | None = None) -> Tensor:
        """Summed loss in nats, a scalar. The batch and the noise may be on the host."""
        assert noise is not None
        inputs = self._inputs(batch, noise, block_size)
        hidden, clean, apart = self._streams(inputs, aligned=True)
        own = hidden.flatten(0, 1)[inputs.columns.at]
        losses = self._losses(loss_of(self.options.recipe.targets, noise), own, clean, inputs.columns)
        if noise.on_policy:
            return losses.sum()
        if apart is not None:
            losses = losses + self.options.recipe.alignment * apart
        if self.options.elbo:
            losses = losses / inputs.levels
        if self.options.recipe.position_decay:
            losses = losses * inputs.weights.to(losses.dtype)
        loss = losses.sum()
        if self.options.ar_weight:
            # The ratio makes the weight relative to the mean denoising loss, however many positions are masked.
            if ratio is None:
                ratio = self.targets(batch, noise) / max(self.ar_targets(batch), 1)
            loss = loss + self.options.ar_weight * ratio * self._next_token_loss(batch, clean)
        return loss

    def denoise(self, batch: Batch, noise: Corruption, block_size: int) -> tuple[Tensor, Tensor]:
        """→ −ln p (N,) of the true tokens at trained columns, row by row; and the context tower's residual stream."""
        inputs = self._inputs(batch, noise, block_size)
        hidden, clean, _ = self._streams(inputs)
        own = hidden.flatten(0, 1)[inputs.columns.at]
        return negative_log_likelihood(self.denoiser, own, inputs.columns.token, inputs.columns.before), clean

    def hidden(self, batch: Batch, noise: Corruption, block_size: int) -> tuple[Tensor, Tensor]:
        """→ the denoiser's final hidden states (copies·B, S, H), and the context tower's residual stream (B, S, H).

        The hidden states of blocks without a masked position are 0.
        """
        return self._streams(self._inputs(batch, noise, block_size))[:2]

    def with_hidden(
        self, batch: Batch, noise: Corruption, block_size: int, function: Callable[[Tensor, Tensor], Result]
    ) -> Result:
        """Returns function(hidden, clean) of the results of `hidden`, while norms and heads are unsharded.

        Register this method with `register_fsdp_forward_method`: FSDP then treats it as a forward pass.
        """
        return function(*self.hidden(batch, noise, block_size))

    def _inputs(self, batch: Batch, noise: Corruption, block_size: int) -> TrainingInputs:
        masks, wanted = noise.stacked, self._wanted(batch, noise, block_size)
        chosen = blocks_with_masks(masks, block_size)
        return TrainingInputs.of(
            batch,
            noise,
            chosen,
            self._prefix(masks, chosen, block_size),
            wanted,
            self._weights(wanted, block_size),
            shift=self.options.shift,
            mask_token=self.options.mask_token_id,
            device=self.embeddings.weight.device,
        )

    def _streams(self, inputs: TrainingInputs, aligned: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
        """→ the results of `hidden`; and if `aligned`, with alignment the mean 1 − cosine (n,) of all layers."""
        layout = inputs.layout
        change = self._modulations(inputs.t)
        # The embeddings have no name here, so that they are freed as soon as no layer needs them.
        columns = inputs.columns if aligned else None
        clean, noisy, apart = self._run_units(self._embed(inputs), change, layout, columns)
        return layout.to_rows(self.norm_f(noisy)), clean, torch.stack(apart).mean(0) if apart else None

    def _embed(self, inputs: TrainingInputs) -> tuple[Tensor, Tensor]:
        """Both residual streams before the first layer."""
        with torch.set_grad_enabled(self.options.train_context and torch.is_grad_enabled()):
            clean = self.context.embed(inputs.tokens)
        return clean, self.denoiser.embed(inputs.noisy, inputs.layout.adapted)

    def _run_units(
        self,
        streams: tuple[Tensor, Tensor],
        changes: Sequence[Modulation | None],
        layout: Layout,
        columns: TrainedColumns | None,
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """→ both residual streams after all units, and with alignment 1 − cosine (n,) after each denoiser layer."""
        apart = []
        for unit in self.units:
            assert isinstance(unit, LayerPair)
            streams = run_pair(unit, self.options.activation_checkpointing, streams, changes, layout)
            if unit.denoiser is not None and columns is not None and self.options.recipe.alignment:
                apart.append(misalignment(streams[1], streams[0], layout, columns))
        return *streams, apart

    def _losses(self, targets: Targets, hidden: Tensor, clean: Tensor, columns: TrainedColumns) -> Tensor:
        """Final hidden states (n, H) of the denoiser, residual stream (B, S, H) of the context tower → losses (n,)."""
        if not targets.teacher:
            return negative_log_likelihood(self.denoiser, hidden, columns.token, columns.before)
        with torch.no_grad():
            known = self.context_norm_f(clean.flatten(0, 1)[columns.clean_at])
        examples = Examples(hidden, known, columns.token, columns.known, columns.before)
        mask_token = self.options.mask_token_id
        return target_losses(targets, self.denoiser, self.context, mask_token, examples)

    def _next_token_loss(self, batch: Batch, clean: Tensor) -> Tensor:
        wanted = NextTokens.of(batch, True, clean.device)
        hidden = self.context_norm_f(clean.flatten(0, 1)[wanted.at])
        return negative_log_likelihood(self.context, hidden, wanted.token).sum()

    def _wanted(self, batch: Batch, noise: Corruption, block_size: int) -> Tensor:
        wanted = wanted_columns(batch, noise, block_size, self.options.shift)
        own_blocks = self.options.elbo or noise.on_policy  # what the denoiser decides in generation
        return inside_blocks(wanted, block_size, self.options.shift) if own_blocks else wanted

    def _prefix(self, masks: Corruption, chosen: Tensor, block_size: int) -> Tensor | None:
        """(N,), how many positions of each chosen block attend causally and have no adapters; None: as in a tower."""
        if self.mask_embedding is not None:
            return torch.zeros_like(chosen)
        return before_masks(masks, chosen, block_size) if self.options.prefix_causal else None

    @staticmethod
    def _block_size(noise: Corruption) -> int:
        return noise.masked.shape[1] // noise.t.shape[1]

    def _weights(self, wanted: Tensor, block_size: int) -> Tensor:
        return position_weights(wanted, block_size, self.options.recipe.position_decay)

    def _modulations(self, t: Tensor) -> Sequence[Modulation | None]:
        if self.time is None or not self.options.time:
            return [None] * self.denoiser.spec.num_layers
        changes: Sequence[Modulation | None] = self.time(t)
        return changes
