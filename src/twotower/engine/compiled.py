"""Passes of the engine as one compiled call each, several in a row where nothing needs the engine in between.

A call embeds, runs the layers and the head, chooses tokens at temperature 0, appends to the state and commits it
(`runners/decode_pass.py`). The results are those of `context_step` and `denoiser_step`, whose passes run wherever a
method here returns None: other devices and dtypes, temperatures above 0, log-probabilities, grammars, rules
for logits, other policies.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from twotower.cache.hybrid_cache import TowerState
from twotower.decoding.draft_controller import AR_STEPS
from twotower.decoding.output import BlockEvent
from twotower.decoding.unmasking import POLICIES, span, threshold
from twotower.engine import context_step, one_pass
from twotower.engine.burst_records import record_rounds, record_steps
from twotower.engine.context_step import PendingContext
from twotower.engine.denoiser_step import OpenBlocks, PendingDenoise
from twotower.engine.modulations import Modulations
from twotower.engine.scheduled import ScheduledTokens
from twotower.engine.scheduler import Scheduler
from twotower.engine.sequence import Phase, RunningSequence
from twotower.engine.slots import at, slots_of
from twotower.engine.towers import Towers
from twotower.model.tower import Tower
from twotower.model.towers import TwoTowerModel
from twotower.ops.host_transfer import AsyncHostCopy
from twotower.runners.decode_pass import BlockRow, Blocks, DecodePass, RowTokens, StateRows
from twotower.runners.fused_cpu import FusedCPURunner
from twotower.runners.pass_tables import PassShape

MOST_STEPS = 64  # AR steps of a call
MOST_STEPS_BEFORE_STOP = 8  # if a stop string may end a row, because the steps after it are lost
MOST_ROUNDS_BEFORE_STOP = 2

CollectEvents = Callable[[], list[BlockEvent]]


class _Lent(NamedTuple):
    """Prepared passes, and the runner that takes them back."""

    own: DecodePass
    runner: FusedCPURunner


class CompiledPasses:
    """Launches passes of the engine's sequences, or returns None.

    seconds: the most time of several passes in one call; 0: one pass a call. usable: False: never.
    """

    def __init__(self, state: TowerState, blocks: OpenBlocks, scheduler: Scheduler, usable: bool) -> None:
        plain_head = state.spec.logit_factor == 1.0 and state.spec.logit_softcap is None
        self.usable = usable and plain_head and state.texts is None and state.longest_pass is None
        self.state, self.blocks, self.scheduler = state, blocks, scheduler
        self.seconds = 0.0
        self._durations: dict[tuple[str, int], float] = {}  # of a pass: by kind and number of rows
        self._committed: Tensor | None = None  # the state's lengths when all its tokens were committed
        self._modulations: dict[str | None, Modulations] = {}  # by the name of the denoiser

    # --- the context tower ----------------------------------------------------------------------------------------

    def launch_context(self, towers: Towers, scheduled: Sequence[ScheduledTokens]) -> CollectEvents | None:
        """Launches one context pass, or several AR steps → the function that records the results.

        towers: the model with the denoiser of these sequences, here and in the other methods.
        """
        model = self._model(towers, "extend")
        if model is None or not _fits(scheduled):
            return None
        if all(entry.sequence.phase is Phase.STEP for entry in scheduled):
            return self._launch_steps(model, scheduled)
        length = max(entry.width for entry in scheduled)
        sequences = [entry.sequence for entry in scheduled]
        most = self._most_rounds(scheduled)
        if most > 1:
            return self._launch_rounds(model, scheduled, length, most)
        lent = self._pass_of(model.context, self._reading(sequences, length), sequences)
        if lent is None:
            return None
        sampled = scheduled[0].sampled
        rows = [RowTokens(e.tokens, e.masks, e.sequence.keeps_draft, e.sequence.acceptance) for e in scheduled]
        started = time.perf_counter()
        chosen, sure, accepted = lent.own.read(rows, sampled)
        if sequences[0].one_pass and not any(sequence.phase is Phase.PROMPT for sequence in sequences):
            self._time("round", sequences, started, 1, _mean_width(scheduled))
        self._note_appended(sequences, (accepted + 1).tolist(), length)
        lent.runner.keep(lent.own)
        for entry in scheduled:
            entry.sequence.read += len(entry.tokens)
            entry.sequence.output.context_passes += entry.sequence.phase is not Phase.PROMPT
        choice = AsyncHostCopy(chosen, sure, accepted) if sampled else None
        return partial(context_step.collect, PendingContext(list(scheduled) if sampled else [], choice, [], None))

    def _launch_steps(self, model: TwoTowerModel, scheduled: Sequence[ScheduledTokens]) -> CollectEvents | None:
        sequences = [entry.sequence for entry in scheduled]
        steps = self._most_steps(sequences)
        lent = self._pass_of(model.context, self._reading(sequences, 1), sequences, steps)
        if lent is None:
            return None
        started = time.perf_counter()
        ends = [tuple(sequence.output.progress.eos) for sequence in sequences]
        chosen, sure = lent.own.ar_steps([sequence.pending for sequence in sequences], ends, steps)
        self._time("step", sequences, started, len(chosen), width=1)
        self._note_appended(sequences, [len(chosen)] * len(sequences), len(chosen))
        lent.runner.keep(lent.own)
        return partial(record_steps, scheduled, chosen, sure)

    def _launch_rounds(
        self, model: TwoTowerModel, scheduled: Sequence[ScheduledTokens], length: int, most: int
    ) -> CollectEvents | None:
        sequences = [entry.sequence for entry in scheduled]
        length = max(length, *(min(s.params.block_size, s.room) for s in sequences))
        most_tokens = min(most * length, max(s.room for s in sequences) + length)
        lent = self._pass_of(model.context, self._reading(sequences, length), sequences, most_tokens)
        if lent is None:
            return None
        rows = [one_pass.round_row(s) for s in sequences]
        started = time.perf_counter()
        ends = [tuple(s.output.progress.eos) for s in sequences]
        chosen, sure, accepted, plans = lent.own.one_pass_rounds(rows, [s.block for s in sequences], ends, most)
        widths = [_mean_width(scheduled), *plans[:-1, :, 1].double().mean(1).tolist()]
        self._time("round", sequences, started, len(widths), sum(widths) / len(widths))
        appended = torch.tensor(lent.own.lengths) - torch.tensor([s.read for s in sequences])
        self._note_appended(sequences, appended.tolist(), int(appended.max()))
        lent.runner.keep(lent.own)
        return partial(record_rounds, scheduled, *(part.tolist() for part in (chosen, sure, accepted, plans)))

    def _most_rounds(self, scheduled: Sequence[ScheduledTokens]) -> int:
        """Rounds of a model with adapters until the engine may be needed; 1 for other passes."""
        sequences = [entry.sequence for entry in scheduled]
        if not all(s.one_pass and s.drafting and not s.request.watched for s in sequences):
            return 1
        if not self._undisturbed(sequences):
            return 1
        return self._most_in_room("round", sequences, MOST_ROUNDS_BEFORE_STOP)

    def _most_steps(self, sequences: Sequence[RunningSequence]) -> int:
        """AR steps until a row ends or the engine may be needed."""
        if not self._undisturbed(sequences):
            return 1
        most = self._most_in_room("step", sequences, MOST_STEPS_BEFORE_STOP)
        return min(most, AR_STEPS) if any(s.mode == "verified" for s in sequences) else most

    # --- the denoiser ---------------------------------------------------------------------------------------------

    def fills(self, towers: Towers, sequences: Sequence[RunningSequence]) -> bool:
        """Whether `launch_blocks` supports these sequences; it may still return None."""
        model = self._model(towers, "denoise")
        if model is None or model.denoiser is None:
            return False
        own_rules = POLICIES["threshold"].rule is threshold and POLICIES["span"].rule is span
        return own_rules and all(
            s.policy in ("threshold", "span")
            and s.rule.temperature <= 0
            and not s.request.watched
            and not s.changes_logits
            for s in sequences
        )

    def launch_blocks(
        self, towers: Towers, sequences: Sequence[RunningSequence], opening: Sequence[RunningSequence]
    ) -> PendingDenoise | None:
        """Launches passes over blocks, until one is finished, and opens those of `opening`."""
        model, blocks, first = self._model(towers, "denoise"), self.blocks, sequences[0]
        assert model is not None
        assert model.denoiser is not None
        known = self._modulations.setdefault(first.denoiser, Modulations())
        choices, sizes = model.config.denoiser, {s.params.block_size for s in sequences}
        modulations = known.of(model.time, sizes, choices.prediction_shift, blocks.dtype)
        width = first.params.block_size if first.deterministic else blocks.size
        shape = PassShape(len(sequences), width, self.state.dtype, True, model.time is not None, False, False)
        lent = None if modulations is None else self._pass_of(model.denoiser, shape, sequences)
        if lent is None or modulations is None:
            return None
        rows = [
            BlockRow(
                size=s.params.block_size,
                mask_token=s.params.mask_token_id,
                steps=s.max_passes,
                opens=s in opening,
                pending=s.pending if s.begins_with_text else -1,
                before=s.last_token,
                span=s.policy == "span",
                modulations=modulations.get(s.params.block_size),
                threshold=s.policy_value,
            )
            for s in sequences
        ]
        started, steps = time.perf_counter(), [s.passes_launched for s in sequences]
        most = self._most_passes("block", sequences) if self._undisturbed(sequences) else 1
        pools = blocks.tokens, blocks.committed_at, blocks.step, blocks.steps, blocks.masked, blocks.confidence
        form = blocks.size, choices.prediction_shift, choices.block_attention == "prefix_causal"
        done = lent.own.fill_blocks(Blocks(*(pool.data_ptr() for pool in pools), *form), rows, most)
        lent.runner.keep(lent.own)
        self._time("block", sequences, started, done)
        for s in opening:
            s.policy_memory, s.has_masks = None, s.open_predictions > 0
        for s in sequences:
            s.passes_launched += done
            s.output.denoiser_passes += (done - 1) * s.has_masks  # `OpenBlocks.collect` counts the last pass
            s.visible_length = s.read
        blocks.passes += done - 1
        slots = slots_of(sequences, self.state.rows, blocks.device)
        parts = blocks.masked, blocks.tokens, blocks.committed_at, blocks.confidence
        results = AsyncHostCopy(*(at(part, slots)[:, :width] for part in parts))
        return PendingDenoise(list(sequences), [s.blocks_opened for s in sequences], steps, {}, results)

    # --- both -----------------------------------------------------------------------------------------------------

    def _model(self, towers: Towers, method: str) -> TwoTowerModel | None:
        """The model, if compiled passes can stand in the place of its method."""
        return towers if self.usable and isinstance(towers, TwoTowerModel) and _is_own(towers, method) else None

    def _pass_of(
        self, tower: Tower, shape: PassShape, sequences: Sequence[RunningSequence], steps: int = 1
    ) -> _Lent | None:
        """The prepared passes of a shape. steps: passes in a row that append tokens."""
        runner = next((runner for runner in tower.runners if isinstance(runner, FusedCPURunner)), None)
        if runner is None:
            return None
        if self.state.lengths is not self._committed:
            self.state.commit_state()
            self._committed = self.state.lengths
        rows = StateRows(self.state, [s.slot for s in sequences], [s.read for s in sequences], steps)
        own = runner.decode_pass(tower, shape, rows)
        return None if own is None else _Lent(own, runner)

    def _reading(self, sequences: Sequence[RunningSequence], length: int) -> PassShape:
        """The shape of a context pass over `length` tokens of each sequence, which stores keys and values itself."""
        return PassShape(len(sequences), length, self.state.dtype, True, False, True, True)

    def _note_appended(self, sequences: Sequence[RunningSequence], counts: Sequence[int], width: int) -> None:
        """Records in the state the tokens that a pass has appended and committed."""
        state = self.state
        lengths = torch.tensor([s.read + count for s, count in zip(sequences, counts, strict=True)])
        slots = slots_of(sequences, state.rows, lengths.device)
        state.lengths = lengths if slots is None else state.lengths.index_copy(0, slots, lengths)
        state.max_seq_len = max(s.read for s in sequences) + width
        state.total_appended += width
        self._committed = state.lengths

    def _undisturbed(self, sequences: Sequence[RunningSequence]) -> bool:
        """Whether only these sequences run, and none of them on trial after an exception."""
        return self.seconds > 0 and self.scheduler.alone is None and len(sequences) == len(self.scheduler.running)

    def _most_passes(self, kind: str, sequences: Sequence[RunningSequence]) -> int:
        """Passes in the time that a call may take; 1 if their time is not known yet."""
        duration = self._durations.get((kind, len(sequences)))
        return 1 if duration is None else max(int(self.seconds / duration), 1)

    def _most_in_room(self, kind: str, sequences: Sequence[RunningSequence], before_stop: int) -> int:
        """Passes in a row that each bring a token. before_stop: the most of them if a stop string may end a row."""
        stops = any(sequence.params.stop for sequence in sequences)
        most = min(self._most_passes(kind, sequences), before_stop if stops else MOST_STEPS)
        return max(min([most, *(sequence.output.room for sequence in sequences)]), 1)

    def _time(
        self, kind: str, sequences: Sequence[RunningSequence], started: float, passes: int, width: float | None = None
    ) -> None:
        """Measures passes. width: the mean number of positions of a row, in reading passes."""
        seconds = self._durations[kind, len(sequences)] = (time.perf_counter() - started) / passes
        if width is not None:
            one_pass.note_cost(sequences, width, seconds)


def _fits(scheduled: Sequence[ScheduledTokens]) -> bool:
    """Whether the results of these entries are a choice of the most probable tokens, or nothing."""
    sampled = scheduled[0].sampled
    return all(entry.sampled == sampled and not entry.wants_logprobs for entry in scheduled) and (
        not sampled
        or all(
            s.rule.temperature <= 0 and s.matcher is None and not s.changes_logits
            for s in (entry.sequence for entry in scheduled)
        )
    )


def _mean_width(scheduled: Sequence[ScheduledTokens]) -> float:
    """The mean number of tokens of a row; compiled passes compute no padding."""
    return sum(entry.width for entry in scheduled) / len(scheduled)


def _is_own(model: TwoTowerModel, name: str) -> bool:
    """Whether a method is that of `TwoTowerModel`."""
    return getattr(type(model), name) is getattr(TwoTowerModel, name) and name not in model.__dict__
