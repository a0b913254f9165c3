"""`EngineCore`: a step runs one pass of each tower, for every sequence that needs it.

Every pass is launched first and collected later. A launch queues the pass on the device without waiting. A collection
waits for the results, records them, and sets the next phase of the sequences. With the towers on two devices, a step
launches the passes of both towers before it collects any. On one device, the context tower's passes are collected
first, so that their sequences can denoise in the same step.

On an accelerator the passes of a block are scheduled asynchronously: the next denoiser pass is launched before the last
one is collected. The host then learns one pass late that a block is finished. That block has an idle pass, whose tokens
do not count, so the pass loads no expert for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

from twotower.cache.pools import ContextView
from twotower.cache.prefix_cache import PrefixCache
from twotower.cache.replica import PendingTransfer, Replica
from twotower.cache.sliding_window import longest_pass_of, widest_window
from twotower.decoding.modes import AUTO
from twotower.decoding.output import BlockEvent, Event
from twotower.engine import captured_step, context_step, denoiser_ar, drafting, one_pass
from twotower.engine.admitter import Admitter
from twotower.engine.budget import divide_memory
from twotower.engine.compiled import CompiledPasses
from twotower.engine.context_step import group_by_width
from twotower.engine.denoiser_step import OpenBlocks
from twotower.engine.engine_options import EngineOptions
from twotower.engine.oom import out_of_memory, split_on_oom
from twotower.engine.recovery import Recovery
from twotower.engine.rounds import Rounds, record_round
from twotower.engine.row_constants import RowConstants
from twotower.engine.scheduled import Item, ScheduledTokens, denoiser_of, passes
from twotower.engine.scheduler import PROMPT_CHUNK, Scheduler
from twotower.engine.sequence import Phase, RunningSequence, charge
from twotower.engine.slots import slots_of
from twotower.engine.stats import EngineStats
from twotower.engine.towers import Towers
from twotower.engine.workspace import StateShape
from twotower.errors import NonFiniteLogitsError
from twotower.ops.precision import accumulation_dtype

Collect = Callable[[], Sequence[Event]]  # waits for a launched pass and records it


class EngineCore:
    """Runs sequences on a model. length: tokens of the longest text; block_size: positions of the longest block; rows,
    memory: see `LLM`.

    Raises:
        ArgumentError: the memory is too small for one text.
    """

    def __init__(
        self, model: Towers, rows: int, length: int, block_size: int, memory: int | None, options: EngineOptions
    ) -> None:
        self.model = model
        self.options = options
        rows, kv_slots, spare = divide_memory(model, rows, length, block_size, PROMPT_CHUNK, memory)
        longest_pass = longest_pass_of(model.spec, block_size) if widest_window(model.spec) else None
        shape = StateShape(rows, kv_slots, model.dtype, model.device, longest_pass)
        self.state = model.workspace.borrow_state(shape, lambda: model.new_state(rows, 0, kv_slots, longest_pass))
        self._state_bytes = self.state.nbytes  # constant, because the pools are allocated once
        self.prefixes = PrefixCache(PROMPT_CHUNK, spare)
        self.reader = model.reader(self.state) if model.has_denoiser else None
        self.two_devices = isinstance(self.reader, Replica)
        device, dtype = model.denoiser_device, accumulation_dtype(model.dtype)
        self.async_scheduling = device.type == "cuda" and not options.lockstep  # a CPU pass is complete at its launch
        self.constants = RowConstants(rows, model.device, dtype)
        there = RowConstants(rows, device, dtype) if self.two_devices else self.constants
        self.blocks = OpenBlocks(there, block_size, options.step_callback, dtype)
        self.scheduler = Scheduler(rows, options.prompt_budget, PROMPT_CHUNK if options.prefix_cache else None)
        usable = not (self.two_devices or self.async_scheduling or options.lockstep)
        self.compiled = CompiledPasses(self.state, self.blocks, self.scheduler, usable)
        self.rounds = Rounds(self.scheduler, options, model.spec.original_length)
        constants = [self.constants, there] if self.two_devices else [self.constants]
        self.admitter = Admitter(model, options, self.state, self.prefixes, constants, self.scheduler, block_size)
        self.recovery = Recovery(self.state, self.prefixes, constants, self.scheduler, self.rounds)
        self.closed = False  # the state may belong to another engine
        self.uncollected: list[Collect] = []  # of the last denoiser pass, with asynchronous scheduling

    def step(self, seconds: float = 0.0) -> list[Event]:
        """Runs one pass of each tower for every sequence that needs it → events. See `Recovery` for exceptions.

        seconds: the most time of several passes in a row, where nothing needs the engine in between.
        """
        if self.recovery.lost is not None:
            raise self.recovery.lost
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self.step(seconds)
        self.compiled.seconds = seconds
        events: list[Event] = []
        try:
            self._run_passes(events)
        except Exception as error:
            if self.options.raise_errors:
                raise
            self._deliver(events)
            self.uncollected.clear()
            failed = self.recovery.recover(error)
            self._deliver(failed)
            return events + failed
        self._deliver(events)
        return events

    def _run_passes(self, events: list[Event]) -> None:
        """Runs the passes of a step and adds their events to `events`, one pass after the other."""
        events += self.recovery.choose_trial()
        events += self._admit()
        if self.options.drafter is not None:
            drafting.draft(self.options.drafter, self.scheduler.of_phase(Phase.DRAFT))
        if self.two_devices:
            for collect in [*self._launch_denoiser(), *self._launch_context()]:
                events += collect()
            return
        for launch in (self._launch_context, self._launch_denoiser):
            for collect in launch():
                events += collect()
            if events and self.options.lockstep:
                break  # the caller has a block's events before the callback of the next block

    def release(self, number: int) -> RunningSequence | None:
        """Removes a waiting or running request → the sequence that ran; its slot and KV slots are free at once."""
        sequence = self.scheduler.forget(number)
        self.rounds.forget(number)
        if sequence is not None:
            self.state.free(sequence.slot)
        return sequence

    def close(self) -> None:
        """Removes every request and returns the state to the model's workspace. Further calls do nothing."""
        if self.closed:
            return
        self.closed = True
        for number in list(self.scheduler.running):
            self.release(number)
        self.scheduler.waiting.clear()
        if self.recovery.lost is None:
            self.model.workspace.return_state(self.state)

    def stats(self, length: int) -> EngineStats:
        """A snapshot of the load. length: tokens of the longest text."""
        return EngineStats(
            slots=self.state.rows,
            free_slots=len(self.scheduler.free),
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting),
            max_seq_len=length,
            max_block_size=self.blocks.size,
            state_bytes=self._state_bytes,
            prefix_bytes=self.prefixes.nbytes,
            prefix_tokens=len(self.prefixes.nodes) * self.prefixes.chunk,
            prompt_tokens=self.prefixes.query_tokens,
            reused_tokens=self.prefixes.hit_tokens,
            failures=self.recovery.failures,
            last_failure=self.recovery.last_failure,
        )

    # --- the beginning and the end of requests --------------------------------------------------------------------

    def _admit(self) -> list[BlockEvent]:
        """Starts waiting requests, if there are slots and memory for them."""
        if self.scheduler.alone is not None or not self.scheduler.waiting or not self.scheduler.free:
            return []
        admitted, events = self.admitter.admit()
        return events + self.rounds.finish_prefill([s for s in admitted if s.read == s.prompt_end])

    def _deliver(self, events: Sequence[Event]) -> None:
        """Records what the caller gets, and frees the slots of finished sequences."""
        for event in events:
            sequence = self.scheduler.running.get(event.row)
            if sequence is not None:
                sequence.output.note_delivery(event)
            if event.result is not None:
                self.recovery.count(event.result)
                self._leave(event)

    def _leave(self, event: Event) -> None:
        """Frees the slot of a finished sequence, and updates the averages of mode "auto"."""
        sequence = self.release(event.row)
        if sequence is not None and isinstance(sequence.error, NonFiniteLogitsError):
            self.prefixes.clear()  # may hold values of the same passes
        if sequence is not None and sequence.params.mode == AUTO and event.result is not None:
            workspace = self._model_of([sequence]).workspace
            workspace.mode_chooser.recent.add_outputs([event.result], sequence.params.block_size)

    # --- the context tower ----------------------------------------------------------------------------------------

    def _launch_context(self) -> list[Collect]:
        scheduled = self.scheduler.schedule_context(lambda: self.model.prefill_chunk)
        groups = group_by_width(scheduled)
        return [collect for group in groups for collect in self._in_parts(self._launch_scheduled, group)]

    def _launch_scheduled(self, scheduled: Sequence[ScheduledTokens]) -> list[Collect]:
        """Launches one pass of the context tower."""
        model, sequences = self._model_of(scheduled), [entry.sequence for entry in scheduled]
        started = time.perf_counter()
        record = self.compiled.launch_context(model, scheduled) or captured_step.launch(model, self.state, scheduled)
        if record is None:
            pending = context_step.launch(model, self.state, self.constants, scheduled)
            record = partial(context_step.collect, pending)
        charge(sequences, started)

        def collect() -> list[Event]:
            started = time.perf_counter()
            events = record()
            charge(sequences, started)
            return one_pass.with_steps(sequences, events + self._after_reading(scheduled, events))

        return [collect]

    def _after_reading(self, scheduled: Sequence[ScheduledTokens], events: Sequence[BlockEvent]) -> list[BlockEvent]:
        """Begins the next rounds of the sequences of a pass → last events of requests without new tokens."""
        if not any(entry.sequence.phase is Phase.PROMPT for entry in scheduled):  # else the time is that of prompts
            record_round([entry.sequence for entry in scheduled], events)
        ready, read = [], []
        for sequence in [entry.sequence for entry in scheduled]:
            if sequence.phase is not Phase.PROMPT:
                ready.append(sequence)
                continue
            self._keep_prefix(sequence)
            if sequence.read == sequence.prompt_end:
                read.append(sequence)
        self.rounds.begin(ready)
        return self.rounds.finish_prefill(read) if read else []

    def _keep_prefix(self, sequence: RunningSequence) -> None:
        if not self.options.prefix_cache or sequence.params.deterministic:
            return
        try:
            self.prefixes.insert(self.state, sequence.slot, sequence.text, sequence.read)
        except Exception as error:
            if not out_of_memory(error):
                raise
            self._free_memory()

    # --- the denoiser ---------------------------------------------------------------------------------------------

    def _launch_denoiser(self) -> list[Collect]:
        """Launches the denoiser passes over open blocks and over the pending tokens of mock-AR."""
        lockstep = self.options.lockstep
        sequences = self.scheduler.denoiser_sequences(self.two_devices and not lockstep, lockstep)
        if not sequences and not self.uncollected:
            return []
        pending = [sequence for sequence in sequences if sequence.phase is Phase.DENOISER_AR]
        open_ = [sequence for sequence in sequences if sequence.phase is Phase.DENOISE] if pending else sequences
        return self._launch_open(open_) + self._in_parts(self._launch_pending, pending)

    def _launch_open(self, sequences: Sequence[RunningSequence]) -> list[Collect]:
        """Launches a pass over open blocks. With asynchronous scheduling, returns the collection of the pass before."""
        launched: list[Collect] = []
        if sequences:
            opening = sorted(self.rounds.opening, key=lambda sequence: sequence.slot)
            if opening and self.two_devices and self.options.lockstep:
                self._view(opening)  # before the callback: between two calls no data crosses
            launched = self._in_parts(self._launch_blocks, sequences)
        overlap = self.async_scheduling and self.scheduler.alone is None
        if overlap and any(sequence.needs_denoiser for sequence in sequences):
            launched, self.uncollected = self.uncollected, launched  # launch the next pass before collecting this one
        else:
            launched, self.uncollected = self.uncollected + launched, []
        return launched

    def _launch_blocks(self, sequences: Sequence[RunningSequence]) -> list[Collect]:
        started, model = time.perf_counter(), self._model_of(sequences)
        opening = [sequence for sequence in sequences if sequence in self.rounds.opening]
        fills = self.compiled.fills(model, sequences)
        pending = self.compiled.launch_blocks(model, sequences, opening) if fills else None
        if pending is None:
            self.blocks.open(opening)
        self.rounds.opening = [sequence for sequence in self.rounds.opening if sequence not in opening]
        if pending is None:
            view = self._view(sequences)
            pending = self.blocks.launch(model, sequences, view, self.async_scheduling, not self.options.raise_errors)
        charge(sequences, started)

        def collect() -> list[Event]:
            live = [pending.sequences[place] for place in pending.live()]
            started = time.perf_counter()
            done = self.blocks.collect(pending)
            charge(live, started)
            events: list[Event] = []
            for sequence in live:
                events += sequence.step_events
                sequence.step_events.clear()
            failed = [(pending.sequences[place], error) for place, error in pending.errors.items()]
            events += [sequence.fail(error) for sequence, error in failed if sequence in live]
            for sequence in done:
                events += self.rounds.block_done(sequence)
            return events

        return [collect]

    def _launch_pending(self, sequences: Sequence[RunningSequence]) -> list[Collect]:
        """Launches the denoiser pass over pending tokens."""
        model, view = self._model_of(sequences), self._view(sequences)
        pending = denoiser_ar.launch(model, self.blocks.constants, sequences, view)
        self.blocks.passes += 1
        return [lambda: denoiser_ar.collect(sequences, pending)]

    def _model_of(self, items: Sequence[Item]) -> Towers:
        """The model with the denoiser of a part of a pass."""
        return self.admitter.models[denoiser_of(items)]

    def _view(self, sequences: Sequence[RunningSequence]) -> ContextView:
        """The denoiser's view of the sequences' texts. New parts are copied to its device."""
        assert self.reader is not None
        self.state.max_seq_len = max(sequence.read for sequence in sequences)
        stale = [sequence for sequence in sequences if sequence.visible_length < sequence.read]
        pending = [PendingTransfer(s.slot, max(s.visible_length, 0), s.read) for s in stale]
        view = self.reader.view(slots_of(sequences, self.state.rows, self.blocks.device), pending)
        for sequence in sequences:
            sequence.visible_length = sequence.read
        return view

    # --- out of memory --------------------------------------------------------------------------------------------

    def _in_parts(self, launch: Callable[[Sequence[Item]], list[Collect]], items: Sequence[Item]) -> list[Collect]:
        if self.options.lockstep:  # the callback sees whole batches, and each pass once
            return launch(items) if items else []
        return [each for part in passes(items) for each in split_on_oom(launch, part, self._free_memory, self._fail)]

    def _fail(self, item: ScheduledTokens | RunningSequence, error: Exception) -> list[Collect]:
        """Ends a sequence whose pass does not fit the memory alone."""
        if self.options.raise_errors:
            raise error
        sequence = item.sequence if isinstance(item, ScheduledTokens) else item
        then = sequence.phase, sequence.blocks_opened
        return [lambda: [sequence.fail(error)] if then == (sequence.phase, sequence.blocks_opened) else []]

    def _free_memory(self) -> None:
        """Frees memory that no request needs."""
        self.prefixes.clear()
        self.model.workspace.free_memory()
