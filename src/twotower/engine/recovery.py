"""`Recovery`: after an exception in a step, its sequences are tried again one by one, and only those that raise end.

The exception may have left the state half written. Every sequence is therefore reset and read again: its prompt and the
new tokens that its events have delivered. Noise is keyed by position, so in fp32 the text does not change, and no event
comes twice.
"""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Sequence

from twotower.cache.hybrid_cache import TowerState
from twotower.cache.prefix_cache import PrefixCache
from twotower.decoding.output import BlockEvent, Generation
from twotower.engine.rounds import Rounds
from twotower.engine.row_constants import RowConstants
from twotower.engine.scheduler import Scheduler
from twotower.engine.sequence import Phase, RunningSequence
from twotower.errors import TwoTowerError
from twotower.ops.host_transfer import to_device_async

LOGGER = logging.getLogger(__name__)
TRIAL_GROWTH, MOST_STRIKES = 4, 8  # a trial lasts 1 new token; after each further exception 4 times as many


class Recovery:
    """Tries sequences again after an exception.

    state, prefixes, constants: what a reset writes. lost: why the engine cannot continue (None: it can).
    failures: requests that ended with an error since the last one that did not. last_failure: the last of these errors.
    """

    def __init__(
        self,
        state: TowerState,
        prefixes: PrefixCache,
        constants: Sequence[RowConstants],
        scheduler: Scheduler,
        rounds: Rounds,
    ) -> None:
        self.state, self.prefixes, self.constants = state, prefixes, constants
        self.scheduler, self.rounds = scheduler, rounds
        self.lost: TwoTowerError | None = None
        self.failures, self.last_failure = 0, ""
        self._active = False  # from an exception to the end of the last trial
        self._suspects: deque[int] = deque()  # numbers of the requests that are tried alone, in order

    def recover(self, error: Exception) -> list[BlockEvent]:
        """Resets all sequences after an exception → the last events of those that ended.

        Raises:
            TwoTowerError: the engine cannot continue.
        """
        alone, running = self.scheduler.alone, list(self.scheduler.running.values())
        problem = error.with_traceback(None)  # the frames hold the tensors of the pass
        failed = []
        if alone is not None and alone in running:
            running.remove(alone)
            failed.append(_end(alone, problem))
        else:
            words = "an exception in a step of %d requests: %s; they are tried again one by one"
            LOGGER.warning(words, len(running), _named(error))
            self._suspects = deque(sequence.output.row for sequence in running)
            for sequence in running:
                sequence.trial_end = sequence.output.delivered[0] + TRIAL_GROWTH**sequence.strikes
                sequence.strikes = min(sequence.strikes + 1, MOST_STRIKES)
        try:
            if not running and not failed:
                raise error
            return failed + self._reset(running)
        except Exception as reason:
            words = f"the state could not be reset ({_named(reason)}) after {_named(error)}; restart the program"
            self.lost = TwoTowerError(words)
            raise self.lost from error

    def choose_trial(self) -> list[BlockEvent]:
        """Chooses the sequence that runs alone in the next step, if any → last events of sequences that ended."""
        if not self._active:
            return []
        scheduler, lockstep = self.scheduler, self.rounds.options.lockstep
        last, failed = scheduler.alone, []
        scheduler.alone = None
        while self._suspects and scheduler.alone is None:
            sequence = scheduler.running.get(self._suspects[0])
            if sequence is not None and sequence.output.delivered[0] < sequence.trial_end:
                scheduler.alone = sequence
            else:
                self._suspects.popleft()
        if lockstep and scheduler.alone is not last:
            self.rounds.clear()
            if scheduler.alone is None:  # the blocks of all sequences begin together, so all are read again
                failed = self._reset(list(scheduler.running.values()))
        self._active = scheduler.alone is not None
        read = [s for s in scheduler.active if s.phase is Phase.PROMPT and s.read == s.prompt_end]
        return failed + (self.rounds.finish_prefill(read) if read else [])

    def count(self, result: Generation) -> None:
        """Counts the failures in a row. An error that the request itself caused (`error_param`) does not count."""
        if result.finish_reason != "error":
            self.failures = 0
        elif not result.error_param:
            self.failures, self.last_failure = self.failures + 1, result.error

    def _reset(self, sequences: Sequence[RunningSequence]) -> list[BlockEvent]:
        """Starts these sequences, which are all that run, from the beginning → last events of those that cannot."""
        self.scheduler.alone, self._active = None, True
        self.rounds.clear()
        self.prefixes.clear()
        self.state.drop_step_inputs()
        if sequences:
            slots = [sequence.slot for sequence in sequences]
            self.state.reset(to_device_async(slots, self.state.lengths.device))
        failed = []
        for sequence in sequences:
            try:
                again = sequence.restarted()
                for constants in self.constants:
                    constants.admit([again])
            except Exception as error:
                failed.append(_end(sequence, error))
            else:
                self.scheduler.replace(sequence, again)
        return failed


def _end(sequence: RunningSequence, error: Exception) -> BlockEvent:
    with contextlib.suppress(Exception):  # the detokenizer may be what raises
        sequence.output.rewind()
    return sequence.fail(error)


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
