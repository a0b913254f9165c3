"""The next phase of each sequence after a pass. A round is one cycle of a mode's phases.

ar         STEP → STEP → …
diffusion  DENOISE (its passes) → COMMIT → DENOISE → …
           or, if a block begins with the text's last token, DENOISE → CHECK → DENOISE → …
verified   DENOISE or DRAFT → CHECK → DENOISE → …, or STEP if the draft depth is 0
mock_ar    DENOISER_AR → COMMIT → DENOISER_AR → …

With adapters (`engine/one_pass.py`), rounds of verified decoding and of diffusion are one CHECK, or a STEP.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from twotower.decoding.modes import AUTO
from twotower.decoding.output import BlockEvent
from twotower.decoding.params import GenerationParams
from twotower.engine import one_pass
from twotower.engine.engine_options import EngineOptions
from twotower.engine.scheduler import Scheduler
from twotower.engine.sequence import Phase, RunningSequence


def can_run_in_lockstep(one: GenerationParams, other: GenerationParams) -> bool:
    """Whether the rounds of two sequences can begin and end together."""
    sizes = [
        (params.mode, params.block_size, params.steps_per_block, params.fixed_draft_depth) for params in (one, other)
    ]
    return sizes[0] == sizes[1] and one.mode != AUTO and one.denoiser == other.denoiser


def record_round(sequences: Sequence[RunningSequence], events: Sequence[BlockEvent]) -> None:
    """Tells the controllers of verified decoding what a pass has brought: the means of the sequences that share one.

    AR steps do not count in a pass that checks or makes drafts too, because most of its time is for these.
    """
    groups: dict[tuple[int, int], list[tuple[RunningSequence, int]]] = {}
    brought = {event.row: len(event.tokens) for event in events}
    for s in sequences:
        if s.mode == "verified":
            groups.setdefault((id(s.controller), s.max_passes), []).append((s, brought[s.output.row]))
    drafts = any(s.one_pass and s.max_passes for s in sequences)
    for (_, depth), group in groups.items():
        if drafts and not depth:
            continue
        tokens, seconds = (sum(values) / len(group) for values in zip(*((n, s.seconds) for s, n in group), strict=True))
        group[0][0].controller.record(depth, tokens, max(s.accepted for s, _ in group), seconds)


class Rounds:
    """Begins the rounds of sequences.

    original_length: see `TowerSpec`. opening: sequences that need a new block before the next denoiser pass.
    """

    def __init__(self, scheduler: Scheduler, options: EngineOptions, original_length: int | None = None) -> None:
        self.scheduler = scheduler
        self.options = options
        self.original_length = original_length
        self.opening: list[RunningSequence] = []
        self._ready: list[RunningSequence] = []  # in lockstep: sequences that wait for the others

    def forget(self, number: int) -> None:
        """Removes a request. In lockstep the other sequences then no longer wait for it."""
        self.opening = [sequence for sequence in self.opening if sequence.output.row != number]
        self._ready = [sequence for sequence in self._ready if sequence.output.row != number]
        if self._ready:
            self.begin(())

    def clear(self) -> None:
        """Forgets all sequences."""
        self.opening.clear()
        self._ready.clear()

    def finish_prefill(self, sequences: Sequence[RunningSequence]) -> list[BlockEvent]:
        """Begins the first round after the prompts → the last events of requests without new tokens."""
        for sequence in sequences:
            sequence.output.prefilled = sequence.output.prefilled or time.perf_counter()
            sequence.pending, *sequence.draft = sequence.text[sequence.prompt_end :] or sequence.text[-1:]
        self.begin(sequences)
        return [sequence.output.final_event() for sequence in sequences if not sequence.output.running]

    def begin(self, ready: Sequence[RunningSequence]) -> None:
        """Begins the next round of these sequences. In lockstep a round begins when all sequences are ready."""
        if not self.options.lockstep:
            running = [sequence for sequence in ready if sequence.output.running]
            for sequence in running:
                sequence.controller = sequence.controller.of_rows(len(self.scheduler.running))
            shared = {id(s.controller): s.controller for s in running if s.mode == "verified"}
            depths = {key: controller.choose_depth() for key, controller in shared.items()}
            for sequence in running:  # those that share a controller have passes of one kind
                self._begin(sequence, self._room([sequence]), depths.get(id(sequence.controller)))
            return
        self._ready += ready
        if len(self._ready) < len(self.scheduler.active):
            return
        sequences = [sequence for sequence in self._ready if sequence.output.running]
        self._ready.clear()
        if sequences:
            room = self._room(sequences)
            passes = sequences[0].controller.choose_depth() if sequences[0].mode == "verified" else None
            for sequence in sequences:
                self._begin(sequence, room, passes)

    def _room(self, sequences: Sequence[RunningSequence]) -> int:
        """New tokens that may still follow in a round that these sequences begin together.

        With LongRoPE a draft ends before the original length: a rollback across it would read the row again.
        """
        room = max(sequence.output.room for sequence in sequences)
        if self.original_length is None:
            return room
        left = [self.original_length - 1 - sequence.read for sequence in sequences]
        return min([room, *(max(tokens, 1) for tokens in left if tokens >= 0)])

    def _begin(self, sequence: RunningSequence, room: int, draft_passes: int | None = None) -> None:
        """room: new tokens that may still follow. draft_passes: the draft depth (None: the controller chooses)."""
        params = sequence.params
        if sequence.one_pass:
            one_pass.begin(sequence, room, draft_passes)
            return
        sequence.room, sequence.max_passes, sequence.passes_launched, sequence.seconds = room, 0, 0, 0.0
        match sequence.mode:
            case "ar":
                sequence.phase = Phase.STEP
            case "mock_ar":
                sequence.phase = Phase.DENOISER_AR
            case "diffusion":
                sequence.phase = Phase.STEP
                if sequence.open_predictions:
                    sequence.max_passes = params.steps_per_block
            case "verified":
                sequence.phase = Phase.STEP
                passes = sequence.controller.choose_depth() if draft_passes is None else draft_passes
                if min(params.block_size, room) > 1:  # else no position is left to draft
                    sequence.max_passes = passes
        if sequence.max_passes and sequence.mode == "verified" and self.options.drafter is not None:
            sequence.phase = Phase.DRAFT
        elif sequence.max_passes:
            sequence.phase = Phase.DENOISE
            sequence.blocks_opened += 1
            self.opening.append(sequence)

    @staticmethod
    def block_done(sequence: RunningSequence) -> list[BlockEvent]:
        """Hands a finished block or draft to the context tower → the event of a finished block.

        There is no event yet if the block waits for its log-probabilities.
        """
        failed = sequence.fail_if_not_finite(sequence.confidence, "denoiser")
        if failed is not None:
            return [failed]
        if sequence.mode == "verified":
            sequence.phase = Phase.CHECK
            sequence.block = sequence.block[: sequence.draft_length]
            return []
        if sequence.final_block:
            return _block_after_text(sequence)
        sequence.phase = Phase.COMMIT
        if sequence.request.logprobs is not None:
            sequence.held_tokens = sequence.block = sequence.block[: sequence.output.room]
            return []
        return [sequence.output.take(sequence.block, sequence.committed_at, sequence.confidence)]


def _block_after_text(sequence: RunningSequence) -> list[BlockEvent]:
    """Hands a finished block, whose first input is text, to the context tower, which chooses the token after it.

    If the denoiser's tokens certainly end the text, this pass is left out, unless log-probabilities need it.
    """
    room, ends = sequence.output.room, sequence.output.progress.eos
    drafted = sequence.block[1:]
    if sequence.request.logprobs is None and (room <= len(drafted) or not ends.isdisjoint(drafted)):
        return [sequence.output.take(drafted, sequence.committed_at[1:], sequence.confidence[1:])]
    sequence.phase, sequence.block = Phase.CHECK, sequence.block[: room + 1]
    return []
