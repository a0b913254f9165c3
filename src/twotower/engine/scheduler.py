"""Waiting and running requests, and the sequences of the next pass of each tower."""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Callable

from twotower.engine.context_step import known_next
from twotower.engine.scheduled import ScheduledTokens
from twotower.engine.sequence import Phase, Request, RunningSequence

PROMPT_CHUNK = 256  # with a prefix cache, prompts are read in chunks of this many tokens


class Scheduler:
    """Schedules sequences on `rows` slots.

    prompt_budget: the most prompt tokens that one step reads, over all sequences (None: no limit). chunk: prompt tokens
    between two states that the prefix cache may keep (None: no prefix cache). alone: the only sequence that takes part
    in passes (None: all do).
    """

    def __init__(self, rows: int, prompt_budget: int | None, chunk: int | None) -> None:
        self.prompt_budget = prompt_budget
        self.chunk = chunk
        self.waiting: deque[tuple[int, Request]] = deque()
        self.running: dict[int, RunningSequence] = {}  # by the request's number, oldest first
        self.free = list(range(rows))[::-1]
        self.alone: RunningSequence | None = None
        self._by_slot: list[RunningSequence] = []

    @property
    def active(self) -> list[RunningSequence]:
        """The sequences that take part in passes, oldest first."""
        return list(self.running.values()) if self.alone is None else [self.alone]

    @property
    def block_sizes(self) -> set[int]:
        """The block sizes of the running sequences."""
        return {sequence.params.block_size for sequence in self._by_slot}

    @property
    def _active_by_slot(self) -> list[RunningSequence]:
        return self._by_slot if self.alone is None else [self.alone]

    def start(self, sequence: RunningSequence) -> None:
        """Adds an admitted sequence."""
        self.running[sequence.output.row] = sequence
        insort(self._by_slot, sequence, key=lambda other: other.slot)

    def replace(self, old: RunningSequence, new: RunningSequence) -> None:
        """Puts a sequence in the place of another one of the same request and slot."""
        old.phase = Phase.FINISHED
        self.running[old.output.row] = new
        self._by_slot[self._by_slot.index(old)] = new

    def has(self, number: int) -> bool:
        """Whether a request waits or runs."""
        return number in self.running or any(waiting == number for waiting, _ in self.waiting)

    def forget(self, number: int) -> RunningSequence | None:
        """Removes a waiting or running request → the sequence that ran; its slot is free."""
        self.waiting = deque(entry for entry in self.waiting if entry[0] != number)
        sequence = self.running.pop(number, None)
        if sequence is not None:
            sequence.phase = Phase.FINISHED
            self._by_slot.remove(sequence)
            self.free.append(sequence.slot)
        return sequence

    def of_phase(self, phase: Phase) -> list[RunningSequence]:
        """Sequences of one phase, in the order of their slots."""
        return [sequence for sequence in self._active_by_slot if sequence.phase is phase]

    def schedule_context(self, prefill_chunk: Callable[[], int]) -> list[ScheduledTokens]:
        """The tokens that the context tower reads next: of prompts, pending tokens, drafts and finished blocks.

        prefill_chunk: returns the best number of prompt tokens for one pass; called only if there are prompts to read.
        """
        scheduled: list[ScheduledTokens] = []
        prompts = False
        for sequence in self._active_by_slot:
            match sequence.phase:
                case Phase.PROMPT:
                    prompts = True
                case Phase.STEP:
                    scheduled.append(ScheduledTokens(sequence, [sequence.pending], sampled=True))
                case Phase.CHECK:
                    scheduled.append(ScheduledTokens(sequence, sequence.block, sampled=True, masks=sequence.masks))
                case Phase.COMMIT:
                    scheduled.append(_finished_block(sequence))
                case _:
                    pass
        if prompts:
            scheduled += self._schedule_prompts(prefill_chunk())
            scheduled.sort(key=lambda entry: entry.sequence.slot)
        return scheduled

    def _schedule_prompts(self, prefill_chunk: int) -> list[ScheduledTokens]:
        """Pieces of prompts, oldest request first, within the budget.

        The pieces of a deterministic request do not depend on the budget that others left: the last one may exceed it.
        """
        scheduled, budget = [], self.prompt_budget
        for sequence in self.active:
            if sequence.phase is not Phase.PROMPT:
                continue
            if budget is not None and budget <= 0:
                break
            end = min(sequence.read + prefill_chunk, sequence.prompt_end)
            if not sequence.params.deterministic:
                if self.chunk is not None:
                    end = min(end, sequence.read - sequence.read % self.chunk + self.chunk)
                if budget is not None:
                    end = min(end, sequence.read + budget)
            tokens = list(sequence.text[sequence.read : end])
            if tokens:
                scheduled.append(ScheduledTokens(sequence, tokens, False, known_next(sequence, len(tokens))))
                budget = None if budget is None else budget - len(tokens)
        return scheduled

    def denoiser_sequences(self, halves: bool, lockstep: bool) -> list[RunningSequence]:
        """The sequences of the next denoiser pass, in the order of their slots.

        halves: the towers are on two devices. If all sequences would need the context tower at the same time, the newer
        half waits for one step; then one half denoises while the context tower reads the other. lockstep: no sequence,
        until all running sequences are at a block.
        """
        found = [sequence for sequence in self._active_by_slot if sequence.needs_denoiser]
        if not found or not (halves or lockstep):
            return found
        everyone = len(found) == len(self.active)
        if lockstep:
            return found if everyone else []
        if everyone and all(sequence.in_last_pass for sequence in found):
            older = [s for s in self.active if s.needs_denoiser][: (len(found) + 1) // 2]
            return sorted(older, key=lambda sequence: sequence.slot)
        return found


def _finished_block(sequence: RunningSequence) -> ScheduledTokens:
    """The tokens of a finished block.

    If they wait for log-probabilities, each token is known after the one before it. The first follows the token read
    before the block; its log-probability comes from the logits kept there, if any.
    """
    if not sequence.held_tokens:
        return ScheduledTokens(sequence, sequence.block, sampled=False)
    first = sequence.last_logits is not None
    return ScheduledTokens(sequence, sequence.block, sampled=False, known_next=sequence.held_tokens[first:])
