"""The blocks that the denoiser fills: one for each slot, each at its own pass.

With asynchronous scheduling a pass is launched before the pass before it is collected. A block that the earlier pass
finished then has an idle pass: no token of it counts, nothing is committed, and `collect` skips the sequence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower.cache.pools import ContextView
from twotower.decoding.block_rule import noise_level
from twotower.decoding.output import StepEvent
from twotower.decoding.sampling import DIFFUSION_CANDIDATE, NoiseKeys, all_greedy, sample_rows
from twotower.decoding.unmasking import Pass
from twotower.engine import changed_logits
from twotower.engine.commit import commit_rows
from twotower.engine.row_constants import RowConstants
from twotower.engine.sequence import Phase, RunningSequence
from twotower.engine.slots import at, slots_of, stored
from twotower.engine.towers import Towers
from twotower.model.draft_head import draw
from twotower.ops.host_transfer import AsyncHostCopy, to_device_async
from twotower.ops.precision import accumulation_dtype

# Called as callback(step, steps, block, t=, logits=, block_idx=): see `TwoTowerForCausalLM.generate_mask_diffusion`.
StepCallback = Callable[..., None]


class OpenBlocks:
    """Open blocks of R slots with up to S positions, on the denoiser's device.

    tokens, masked, committed_at, confidence (R, S); step, steps (R, 1): passes done and allowed; before (R, 1): the
    text's last token when the block opened. callback: called for every block and every pass; the blocks must then run
    in lockstep. passes: denoiser passes so far.
    """

    def __init__(self, constants: RowConstants, size: int, callback: StepCallback | None, dtype: torch.dtype) -> None:
        rows, device = constants.rows, constants.device
        self.constants = constants
        self.size = size
        self.callback = callback
        self.device = device
        self.dtype = dtype
        self.passes = 0
        self.tokens = torch.zeros(rows, size, dtype=torch.long, device=device)
        self.committed_at = torch.zeros_like(self.tokens)
        self.masked = torch.zeros(rows, size, dtype=torch.bool, device=device)
        self.confidence = torch.zeros(rows, size, dtype=dtype, device=device)
        self.step = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self.steps = torch.zeros_like(self.step)
        self.before = torch.zeros_like(self.step)

    def open(self, sequences: Sequence[RunningSequence]) -> None:
        """Opens a block for each sequence. The pending token, if a block begins with it, is not masked."""
        if not sequences:
            return
        slots = slots_of(sequences, self.constants.rows, self.device)
        mask, sizes = at(self.constants.mask_token, slots), at(self.constants.block_size, slots)
        tokens = mask.repeat(1, self.size)
        masked = torch.arange(self.size, device=self.device) < sizes
        facts = [(s.max_passes, s.begins_with_text, s.pending, s.last_token) for s in sequences]
        allowed, known, pending, last = to_device_async(facts, self.device).unbind(1)
        if any(text for _, text, *_ in facts):
            decided = known.bool()
            tokens[:, 0] = torch.where(decided, pending, tokens[:, 0])
            masked[:, 0] &= ~decided
        self.tokens, self.masked = stored(self.tokens, slots, tokens), stored(self.masked, slots, masked)
        self.committed_at = stored(self.committed_at, slots, torch.zeros_like(tokens))
        self.confidence = stored(
            self.confidence, slots, torch.zeros(tokens.shape, dtype=self.dtype, device=self.device)
        )
        self.step = stored(self.step, slots, torch.zeros_like(mask))
        self.steps = stored(self.steps, slots, allowed[:, None].clone())
        self.before = stored(self.before, slots, last[:, None].clone())
        for sequence in sequences:
            sequence.policy_memory = None
            sequence.has_masks = sequence.open_predictions > 0
        if self.callback is not None:
            first = sequences[0]
            self.callback(0, first.max_passes, tokens.clone(), t=1.0, logits=None, block_idx=first.output.blocks)

    def launch(
        self, model: Towers, sequences: Sequence[RunningSequence], view: ContextView, may_be_done: bool, catch: bool
    ) -> PendingDenoise:
        """Launches a denoiser pass over the sequences' blocks. Outputs 0 … L − 1 − shift predict inputs shift … L − 1.

        model: with the denoiser of all these sequences. may_be_done: a pass that is not collected yet may have finished
        blocks. catch: an exception of a commit policy ends its own sequence; otherwise the exception is raised.
        """
        constants, slots = self.constants, slots_of(sequences, self.constants.rows, self.device)
        shift = sequences[0].block_rule.shift
        width = sequences[0].params.block_size if sequences[0].params.deterministic else self.size
        tokens, masked = at(self.tokens, slots)[:, :width], at(self.masked, slots)[:, :width]
        step = at(self.step, slots)
        sizes, steps = at(constants.block_size, slots), at(self.steps, slots)
        lengths = None
        if may_be_done:
            lengths = sizes[:, 0] * masked.any(1)
        elif any(sequence.params.block_size < width for sequence in sequences):
            lengths = sizes[:, 0]
        t = noise_level(masked.sum(1).to(self.dtype), sizes[:, 0], shift)
        denoise = model.denoise
        if (
            model.config.denoiser.block_attention == "prefix_causal"
        ):  # requests may have other mask tokens than the model
            denoise = partial(denoise, prefix=(~masked).long().cumprod(1).sum(1))
        logits = denoise(tokens, t, view, lengths=lengths, upcast_logits=False)
        if self.callback is not None:
            self._tell(sequences[0], tokens, t, logits)
        logits = _without_mask_token(sequences, logits[:, : width - shift], constants, slots)
        logits = changed_logits.for_blocks(sequences, logits, tokens, masked, shift)

        def keys() -> NoiseKeys:
            positions = view.lengths[:, None] + torch.arange(shift, width, device=self.device)
            purpose = at(constants.purpose, slots)
            noise_step = torch.where(purpose == DIFFUSION_CANDIDATE, step, 0)
            return NoiseKeys(at(constants.seeds, slots), positions, purpose, noise_step)

        candidate, sure = _chosen(model, sequences, logits, (tokens, masked, at(self.before, slots)), keys)
        values = at(constants.policy_value, slots)
        seen = Pass(logits, candidate, sure, masked[:, shift:], step, steps)
        chosen, memories, errors = commit_rows(sequences, seen, values, catch)
        if shift:  # no output predicts the first input
            candidate, sure, chosen = (F.pad(part, (shift, 0)) for part in (candidate, sure, chosen))
        tokens, masked = torch.where(chosen, candidate, tokens), masked & ~chosen
        committed_at = torch.where(chosen, step, at(self.committed_at, slots)[:, :width])
        confidence = torch.where(chosen, sure, at(self.confidence, slots)[:, :width])
        proposed = (candidate, sure) if any(sequence.request.watched for sequence in sequences) else ()
        pending = PendingDenoise(
            sequences=list(sequences),
            opened=[sequence.blocks_opened for sequence in sequences],
            steps=[sequence.passes_launched for sequence in sequences],
            errors=errors,
            blocks=AsyncHostCopy(masked, tokens, committed_at, confidence, *proposed),
        )
        pools = self.tokens, self.masked, self.committed_at, self.confidence, self.step
        values_of = tokens, masked, committed_at, confidence, step + 1
        # Last and together, so that a failed pass changes nothing.
        self.tokens, self.masked, self.committed_at, self.confidence, self.step = (
            stored(pool, slots, part) for pool, part in zip(pools, values_of, strict=True)
        )
        for sequence, memory in zip(sequences, memories, strict=True):
            sequence.policy_memory = memory
            sequence.passes_launched += 1
        return pending

    def _tell(self, first: RunningSequence, tokens: Tensor, t: Tensor, logits: Tensor) -> None:
        """Calls the callback with copies of the block and the logits, before the pass commits positions."""
        assert self.callback is not None
        level = float(t[0]) if len(t) == 1 else t
        own = logits.to(self.dtype, copy=True)
        self.callback(
            first.passes_launched, first.max_passes, tokens.clone(), t=level, logits=own, block_idx=first.output.blocks
        )

    def collect(self, pending: PendingDenoise) -> list[RunningSequence]:
        """Waits for a pass and records it → the sequences whose blocks are finished."""
        masked, tokens, committed_at, confidence, *proposed = pending.blocks.wait()
        live = pending.live()
        self.passes += bool(live)
        open_ = masked.any(1).tolist()
        for place in live:
            sequence = pending.sequences[place]
            sequence.output.denoiser_passes += sequence.has_masks
            sequence.has_masks = open_[place]
        if proposed:
            candidate, sure = proposed
            filled, believed = torch.where(masked, candidate, tokens), torch.where(masked, sure, confidence)
            for place in live:
                pending.show(place, masked, filled, believed)
        waits = self.callback is not None and any(open_)  # in lockstep all blocks end together
        places = [place for place in live if not (open_[place] or waits or place in pending.errors)]
        if not places:
            return []
        done = [pending.sequences[place] for place in places]
        every = len(places) == len(open_)
        columns = ((part if every else part[places]).tolist() for part in (tokens, committed_at, confidence))
        for sequence, block, steps, sure in zip(done, *columns, strict=True):
            size = sequence.params.block_size
            sequence.block, sequence.committed_at, sequence.confidence = block[:size], steps[:size], sure[:size]
        return done


class PendingDenoise(NamedTuple):
    """A launched pass.

    blocks: masked, tokens, committed_at, confidence (n, S) after the pass, with the candidates and their
    confidences if a sequence is watched. opened: the number of each sequence's block; steps: its earlier passes.
    errors: exceptions of commit policies, by the sequence's index.
    """

    sequences: Sequence[RunningSequence]
    opened: Sequence[int]
    steps: Sequence[int]
    errors: dict[int, Exception]
    blocks: AsyncHostCopy

    def live(self) -> list[int]:
        """Indices of the sequences that are still at this block; others have finished it, ended or been aborted."""
        both = enumerate(zip(self.sequences, self.opened, strict=True))
        return [place for place, (s, opened) in both if s.phase is Phase.DENOISE and s.blocks_opened == opened]

    def show(self, place: int, masked: Tensor, tokens: Tensor, confidence: Tensor) -> None:
        """Adds a `StepEvent` to a watched sequence. masked, tokens, confidence (n, S) are on the host."""
        sequence = self.sequences[place]
        if not sequence.request.watched:
            return
        own = slice(sequence.params.block_size)
        event = StepEvent(
            row=sequence.output.row,
            start=len(sequence.output.progress.tokens) - sequence.begins_with_text,
            step=self.steps[place],
            steps=sequence.max_passes,
            tokens=tokens[place, own].tolist(),
            masked=masked[place, own].tolist(),
            confidence=confidence[place, own].tolist(),
        )
        finite = math.isfinite(sum(event.confidence))
        if finite and (event.start, event.step) > sequence.output.shown:  # after a recovery, passes are repeated
            sequence.step_events.append(event)


def _chosen(
    model: Towers,
    sequences: Sequence[RunningSequence],
    logits: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor],
    keys: Callable[[], NoiseKeys],
) -> tuple[Tensor, Tensor]:
    """The candidates of a pass and their confidences (n, L): of each output alone, or drawn by a draft head.

    logits (n, L, V): of the last L inputs; a draft head adds its terms to them. inputs: the tokens of the blocks and
    which of them are masked (n, S), and the token before each block (n, 1).
    """
    rules = [sequence.rule for sequence in sequences]
    if model.draft_head is None:
        return sample_rows(logits, rules, keys)

    def choose(logits: Tensor, place: int) -> tuple[Tensor, Tensor]:
        return sample_rows(logits, rules, lambda: keys().at(place))

    (tokens, masked, last), (_, count, _) = inputs, logits.shape
    before = torch.cat([last, tokens], 1)[:, -count - 1]
    tokens, masked = tokens[:, -count:], masked[:, -count:]
    known = tokens, torch.zeros(tokens.shape, dtype=accumulation_dtype(logits.dtype), device=logits.device)
    return draw(model.draft_head, logits, known, masked, before, choose, greedy=all_greedy(rules))


def _without_mask_token(
    sequences: Sequence[RunningSequence], logits: Tensor, constants: RowConstants, slots: Tensor | None
) -> Tensor:
    """The logits (n, S, V), in which the logit of each row's mask token is now −∞."""
    tokens = {sequence.params.mask_token_id for sequence in sequences}
    if len(tokens) == 1:
        logits[..., tokens.pop()] = -torch.inf
    else:
        index: Any = at(constants.mask_token, slots)[..., None].expand(-1, logits.shape[1], -1)
        logits.scatter_(2, index, -torch.inf)
    return logits
