"""Validation of a denoiser: likelihood by noise level, agreement with the context tower, and greedy diffusion."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.fsdp import register_fsdp_forward_method

from twotower.decoding.params import GenerationParams
from twotower.errors import ArgumentError
from twotower.model.packed_forward import read_layer
from twotower.model.packed_layout import Layout
from twotower.model.tower import Tower
from twotower.modeling_twotower import TwoTowerForCausalLM
from twotower.training.columns import TrainedColumns, inside_blocks, next_tokens, trained_columns, wanted_columns
from twotower.training.data.batch import Batch
from twotower.training.fsdp import World, sharded
from twotower.training.layer_pair import LayerPair
from twotower.training.log_schema import Validation
from twotower.training.logits import in_chunks, logits_of
from twotower.training.noise import Corruption
from twotower.training.objective import DenoisingObjective
from twotower.training.validation.kept import TextsKept
from twotower.training.validation.samples import shared_prompts, unsharded, write_samples

# Noise levels. All but the last are the middles of equal parts of (0, 1], so together they estimate the training loss.
# The last is the noise level of the first denoising pass over a block.
LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
CONFIDENCE = 0.8  # the threshold of the published figures


class DenoisingValidation:
    """Validation of a denoiser in training.

    masked_nll: −ln p of the true token in nats, over all masked positions of the levels below 1, with repeated EOS as
        in training. masked_nll_by_t: for each level, also for wholly masked blocks ("1.0").
    ar_nll: −ln p of the context tower in nats per token, over the tokens of the same blocks, without repeated EOS.
    agreement: share of masked positions of the levels below 1 where the denoiser's most likely token (other than the
        mask token) is the context tower's most likely token after the true text; without repeated EOS.
    tokens_per_pass, sample: greedy diffusion at threshold 0.8 (`samples.write_samples`).
    With prediction shift 1 also draft_tokens: 1 + the mean number of predictions from the left of a wholly masked block
        that agree, and the figures of `kept.TextsKept`.

    Masks are a function of (seed, row number). A frozen context tower is scored once, and its figures are reused.

    Args:
        model: the model whose towers the objective trains.
        held_out: for each source, this process's batches, equally many on each process, in blocks of block_size
            (`data.held_out_batches`).
        prompts: number of documents to continue; 0: none. Then parameters are never unsharded on one process, which a
            large model needs.
        max_new_tokens: for each prompt; rounded up to whole blocks.

    Raises:
        ArgumentError: no held-out document has a block to denoise; prompts and new tokens beyond the context window.
    """

    def __init__(
        self,
        model: TwoTowerForCausalLM,
        objective: DenoisingObjective,
        held_out: Mapping[str, Iterable[Batch]],
        world: World,
        *,
        block_size: int,
        eos_token_id: int | Sequence[int] | None,
        prompts: int = 8,
        max_new_tokens: int = 128,
        seed: int = 0,
    ) -> None:
        self.model, self.objective, self.world = model, objective, world
        sources = [list(batches) for batches in held_out.values()]
        self.batches = [batch for batches in sources for batch in batches]
        self.block_size, self.seed = block_size, seed
        if not world.total(sum(int(batch.denoised.sum()) for batch in self.batches)):
            raise ArgumentError(
                f"no held-out document has a whole block of {block_size} tokens to denoise; give longer documents "
                "or validation data, or train without validation (--held-out 0)"
            )
        self._greedy: list[Tensor] = []  # for each batch (B, S): the context tower's greedy token; −1 where none
        self._context_sums, self._ar_nll = [0.0, 0.0], 0.0  # sum of −ln p and tokens on this process; nats per token
        self._registered = False
        self.params = GenerationParams.of(
            mode="diffusion",
            block_size=block_size,
            steps_per_block=block_size,
            mask_token_id=objective.options.mask_token_id,
            confidence_threshold=CONFIDENCE,
            max_new_tokens=-(-max_new_tokens // block_size) * block_size,
            eos_token_id=eos_token_id,
            seed=0,
        )
        shift = objective.options.shift
        self.prompts = shared_prompts(model, sources, prompts, self.params, world, shift)
        self.kept = TextsKept(model, sources, self.params, world, shift) if prompts and shift else None

    @torch.no_grad()
    def __call__(self, step: int) -> Validation:
        """Computes all figures, for a log record."""
        if not self._registered:
            register_fsdp_forward_method(self.objective, "with_hidden")
            self._registered = True
        try:
            record = self._likelihood()
        finally:
            for module in sharded(self.objective):
                module.reshard()
        if self.prompts:
            with unsharded(self.objective.modules()):
                record |= write_samples(self.model, self.prompts, self.params, self.world)
                record |= {} if self.kept is None else self.kept.measure()
        return record

    def _likelihood(self) -> Validation:
        if self.objective.options.train_context:
            self._greedy.clear()
        if context_unknown := not self._greedy:
            self._context_sums = [0.0, 0.0]
        found = torch.zeros(len(LEVELS), 6, dtype=torch.float64)  # a row for each level, from `_compare`
        for number, batch in enumerate(self.batches):
            uniform = _uniform(batch, self.seed)
            on_device = batch.to(self.world.device)
            for i, level in enumerate(LEVELS):
                noise = _at_level(level, batch, uniform, self.block_size, self.objective.options.shift)
                noise = noise.to(self.world.device)
                score = partial(self._score_pass, number, on_device, self._columns(on_device, noise))
                found[i] += self.objective.with_hidden(on_device, noise, self.block_size, score).cpu()
        totals = [[self.world.total(value) for value in row] for row in found]
        if context_unknown:
            ar_nats, ar_tokens = map(self.world.total, self._context_sums)
            self._ar_nll = ar_nats / max(ar_tokens, 1.0)
        nats, masked, agreed, compared, *_ = (sum(column) for column in zip(*totals[:-1], strict=True))
        record: Validation = {
            "masked_nll": nats / max(masked, 1.0),
            "masked_nll_by_t": {
                str(level): row[0] / row[1] for level, row in zip(LEVELS, totals, strict=True) if row[1]
            },
            "ar_nll": self._ar_nll,
            "agreement": agreed / max(compared, 1.0),
        }
        if self.objective.options.shift:
            *_, run, blocks = totals[-1]
            record["draft_tokens"] = 1 + run / max(blocks, 1.0)
        return record

    def _columns(self, batch: Batch, noise: Corruption) -> TrainedColumns:
        """The columns that predict masked positions of their block."""
        shift = self.objective.options.shift
        wanted = wanted_columns(batch, noise, self.block_size, shift)
        return trained_columns(batch, inside_blocks(wanted, self.block_size, shift), shift)

    def _score_pass(self, number: int, batch: Batch, columns: TrainedColumns, hidden: Tensor, clean: Tensor) -> Tensor:
        """Scores one pass over batch `number`, while the heads are unsharded."""
        if len(self._greedy) == number:
            self._greedy.append(self._context_choices(batch, clean))
        return self._compare(columns, hidden, self._greedy[number])

    def _context_choices(self, batch: Batch, clean: Tensor) -> Tensor:
        """The context tower's residual stream (B, S, H) → its greedy tokens (B, S), −1 at positions without one.

        Adds the −ln p of the true tokens to `_context_sums`.
        """
        objective, layout = self.objective, Layout(batch.document, self.block_size, filler=batch.filler)
        for unit in objective.units:
            assert isinstance(unit, LayerPair)
            if not unit.runs_context:  # layers after the last one that the denoiser needs are run here
                with unsharded([unit]):
                    clean, _ = read_layer(unit.context, clean, layout)
        asked = next_tokens(batch) & batch.denoised[:, 1:]
        hidden = objective.context_norm_f(clean)[:, :-1][asked]
        nll, choice = _score(objective.context, hidden, batch.tokens[:, 1:][asked])
        self._context_sums[0] += float(nll.double().sum())
        self._context_sums[1] += len(choice)
        greedy = torch.full_like(batch.tokens, -1)
        greedy[:, 1:][asked] = choice
        return greedy

    def _compare(self, columns: TrainedColumns, hidden: Tensor, greedy: Tensor) -> Tensor:
        """(6,): sum of −ln p over masked positions, their number, agreements with greedy (B, S), comparisons; columns
        that agree from the left of a block, and blocks with masks."""
        mask_token = self.objective.options.mask_token_id
        denoiser, own = self.objective.denoiser, hidden.flatten(0, 1)[columns.at]
        nll, choice = _score(denoiser, own, columns.token, columns.before, barred=mask_token)
        wanted = greedy.flatten()[columns.at + self.objective.options.shift]
        agrees, drafted = (torch.zeros_like(greedy, dtype=torch.bool).flatten() for _ in range(2))
        agrees[columns.at], drafted[columns.at] = choice == wanted, True
        size = self.block_size - self.objective.options.shift
        agrees, drafted = (part.unflatten(0, (-1, self.block_size))[:, :size] for part in (agrees, drafted))
        sums = agrees.sum(), (wanted >= 0).sum(), agrees.long().cumprod(-1).sum(), drafted.any(-1).sum()
        counts = (torch.ones_like(choice).sum(), *sums)
        return torch.stack([nll.double().sum(), *(count.double() for count in counts)])


def _uniform(batch: Batch, seed: int) -> Tensor:
    """(B, S) in [0, 1), keyed by row number: a position masked at one level is masked at all higher levels."""
    generators = [torch.Generator().manual_seed((seed << 40) + index) for index in batch.index.tolist()]
    return torch.stack([torch.rand(batch.tokens.shape[1], generator=generator) for generator in generators])


def _at_level(level: float, batch: Batch, uniform: Tensor, block_size: int, shift: int) -> Corruption:
    t = torch.full((len(batch), batch.tokens.shape[1] // block_size), level)
    open_ = torch.arange(batch.tokens.shape[1]) % block_size >= shift
    return Corruption(t, batch.denoised & open_ & (uniform < level))


def _score(
    tower: Tower, hidden: Tensor, tokens: Tensor, *before: Tensor, barred: int | None = None
) -> tuple[Tensor, Tensor]:
    """hidden (N, H), tokens (N,) → −ln p (N,) in nats, and the most likely token (N,) other than `barred`.

    before: the tokens (N,) before these, for a draft head.
    """
    parts = []
    for part, true, *known in in_chunks(tower, hidden, tokens, *before):
        logits = logits_of(tower, part, *known)
        nll = F.cross_entropy(logits, true, reduction="none")
        if barred is not None:
            logits[:, barred] = -torch.inf
        parts.append((nll, logits.argmax(-1)))
    nll, choice = (torch.cat(column) for column in zip(*parts, strict=True))
    return nll, choice
