"""`Admitter`: starts waiting requests in free slots and memory, first come, first served, so that none starves."""

from __future__ import annotations

from collections.abc import Sequence

from twotower.cache.hybrid_cache import TowerState
from twotower.cache.prefix_cache import PrefixCache
from twotower.decoding.output import BlockEvent
from twotower.decoding.sequence_output import SequenceOutput
from twotower.engine.admission import kv_slots_needed
from twotower.engine.engine_options import EngineOptions
from twotower.engine.mode_choice import resolve
from twotower.engine.rounds import can_run_in_lockstep
from twotower.engine.row_constants import RowConstants
from twotower.engine.scheduler import Scheduler
from twotower.engine.sequence import Request, RunningSequence
from twotower.engine.towers import Towers, block_rule, denoiser_name, model_for
from twotower.ops.host_transfer import to_device_async


class Admitter:
    """Moves requests from `scheduler.waiting` to `scheduler.running`.

    models: the model with each denoiser that sequences use, by its name (`engine.towers`). constants: of the rows, on
    the device of each tower. block_size: the engine's longest block.
    """

    def __init__(
        self,
        model: Towers,
        options: EngineOptions,
        state: TowerState,
        prefixes: PrefixCache,
        constants: Sequence[RowConstants],
        scheduler: Scheduler,
        block_size: int,
    ) -> None:
        self.model, self.options = model, options
        self.models: dict[str | None, Towers] = {None: model}
        self.state, self.prefixes, self.constants = state, prefixes, constants
        self.scheduler, self.block_size = scheduler, block_size

    def admit(self) -> tuple[list[RunningSequence], list[BlockEvent]]:
        """Returns the new sequences, and the events of requests that end without a pass."""
        admitted: list[RunningSequence] = []
        events: list[BlockEvent] = []
        waiting, free = self.scheduler.waiting, self.scheduler.free
        if self.options.lockstep and self.scheduler.running:
            return admitted, events
        together = min(len(self.scheduler.running) + len(waiting), self.state.rows)
        while waiting and free:
            number, request = waiting[0]
            if self.options.lockstep and admitted and not can_run_in_lockstep(admitted[0].params, request.params):
                break
            kv_slots = kv_slots_needed(request, self.block_size)
            idle = request.params.max_new_tokens == 0 and not request.prompt_logprobs
            if not idle and not self.state.has_room_for(kv_slots):
                break
            waiting.popleft()
            try:
                sequence = self._sequence(number, request, free[-1], together)
                if not idle:
                    self.state.allocate(sequence.slot, kv_slots)
            except Exception as error:
                if self.options.raise_errors:
                    raise
                output = SequenceOutput.of(number, request.params, len(request.prompt), None)
                events.append(output.fail(error))
                continue
            if idle:
                events.append(sequence.output.final_event())
                continue
            free.pop()
            self.scheduler.start(sequence)
            admitted.append(sequence)
        if admitted:
            self._prepare_slots(admitted)
        return admitted, events

    def _sequence(self, number: int, request: Request, slot: int, together: int) -> RunningSequence:
        """together: the number of sequences that will run together."""
        params, reason = resolve(self.model, request.params, 1)
        reason = reason or request.mode_reason
        output = SequenceOutput.of(number, params, len(request.prompt), self.model.tokenizer, reason)
        name, own = denoiser_name(self.model, request.params), model_for(self.model, request.params)
        self.models[name] = own
        rule = block_rule(own)
        controller = own.workspace.draft_controller(request.params, together, len(request.prompt), rule.one_pass)
        return RunningSequence.of(request, output, slot, controller, rule, name)

    def _prepare_slots(self, sequences: Sequence[RunningSequence]) -> None:
        for constants in self.constants:
            constants.admit(sequences)
        self.state.reset(to_device_async([sequence.slot for sequence in sequences], self.state.lengths.device))
        for sequence in sequences:
            self._restore_prefix(sequence)

    def _restore_prefix(self, sequence: RunningSequence) -> None:
        """Copies the cached prefix of the prompt into the sequence's slot."""
        request, output = sequence.request, sequence.output
        if request.prompt_logprobs:  # the prefix cache holds no log-probabilities
            output.prompt_logprobs.append(None)
        elif self.options.prefix_cache and not request.params.deterministic:
            found = self.prefixes.restore(self.state, sequence.slot, request.prompt)
            sequence.read = output.cached_tokens = found
