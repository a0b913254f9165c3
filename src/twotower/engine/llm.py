"""`LLM`: requests in, events and results out. `step` is one pass of each tower for every sequence that needs it.

A sequence goes PROMPT → its mode's cycle → out:

    ar         STEP → STEP → …
    diffusion  DENOISE (its passes) → COMMIT → DENOISE → …
    verified   DENOISE (the draft) → CHECK → DENOISE → …, or STEP where a draft would not pay
    mock_ar    DENOISER_AR → COMMIT → DENOISER_AR → …

Sequences that need the same tower share its pass, whatever cycle they are in and however long their texts are. The
output of a sequence does not depend on its neighbours.

Every pass is launched first and collected later. `launch` gives the device its work without waiting; `collect` waits
for the results, books them, and says what the sequence needs next. With the towers on two devices a step launches both
towers' passes before it collects any. On one device the context tower's passes are collected first: a sequence that has
been read then denoises in the same step.

On an accelerator the passes of a block are scheduled asynchronously: the denoiser's next pass is launched before the
last one is collected. The host then learns one pass late that a block is finished; that block has an idle pass, whose
tokens do not count, so the pass reads no expert for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from twotower.cache.hybrid_cache import ContextView
from twotower.cache.prefix_cache import Prefixes
from twotower.cache.replica import Fresh, Mirror
from twotower.decoding.modes import AUTO
from twotower.decoding.output import BlockEvent, Event, Generation
from twotower.decoding.sequence_output import SequenceOutput
from twotower.engine import admission, context_step, denoiser_ar, drafting
from twotower.engine.budget import memory_for, shares
from twotower.engine.context_step import grouped
from twotower.engine.denoiser_step import OpenBlocks, StepCallback
from twotower.engine.drafting import Drafter
from twotower.engine.mode_choice import resolve
from twotower.engine.oom import in_parts, out_of_memory
from twotower.engine.row_constants import RowConstants
from twotower.engine.scheduled import ScheduledTokens
from twotower.engine.scheduler import PROMPT_CHUNK, Scheduler
from twotower.engine.sequence import Phase, Request, RunningSequence
from twotower.engine.slots import slots_of
from twotower.engine.stats import EngineStats
from twotower.engine.towers import Towers
from twotower.errors import ArgumentError
from twotower.ops.host_transfer import placed
from twotower.ops.precision import accumulation_dtype

Item = TypeVar("Item", ScheduledTokens, RunningSequence)
Collect = Callable[[], Sequence[Event]]  # waits for a pass that was launched, and books it


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How an engine works, beside its sizes.

    prefix_cache: whether prompts that begin alike are read once. prompt_budget: prompt tokens read in one step, of all
    sequences together (None: no limit). step_callback: told of every denoiser pass; the blocks of all sequences then
    run in lockstep, and all requests must be added before the first step. raise_errors: what commit policies and
    allocations raise leaves `step` unchanged; otherwise each ends its own request with finish_reason "error".
    drafter: drafts for verified decoding in place of the denoiser.
    """

    prefix_cache: bool = True
    prompt_budget: int | None = 512
    step_callback: StepCallback | None = None
    raise_errors: bool = False
    drafter: Drafter | None = None


class LLM:
    """Runs requests on a model.

    rows: sequences that run at once; length: tokens of the longest text with its answer (None: the model's window);
    block_size: the longest block. memory: bytes for what the texts keep, a fifth of it for the prefix cache (None: for
    `rows` texts of that length, and a fifth more). A text takes as much as its request can need.

    Raises:
        ArgumentError: a size is less than 1; the memory holds no text at all.
    """

    def __init__(
        self,
        model: Towers,
        *,
        rows: int = 16,
        length: int | None = None,
        block_size: int = 16,
        memory: int | None = None,
        options: EngineOptions | None = None,
    ) -> None:
        for name, value in (("rows", rows), ("length", length), ("block_size", block_size)):
            if value is not None and value < 1:
                raise ArgumentError(f"{name} is {value}; it must be at least 1", param=name)
        window = model.config.backbone.max_position_embeddings
        self.model = model
        self.options = options = options or EngineOptions()
        self.length = min(length or window, window)
        rows, columns, spare = shares(model, rows, self.length + block_size, PROMPT_CHUNK, memory)
        self.state = model.workspace.borrow_state(rows, columns, lambda: model.new_state(rows, 0, columns))
        self._state_bytes = self.state.nbytes  # constant: the pools are allocated once
        self.prefixes = Prefixes(PROMPT_CHUNK, spare)
        self.reader = model.reader(self.state) if model.denoiser is not None else None
        self.two_devices = isinstance(self.reader, Mirror)
        device = model.device if model.denoiser is None else model.denoiser.device
        lockstep = options.step_callback is not None
        self.async_scheduling = device.type == "cuda" and not lockstep  # on a CPU a launched pass is done
        dtype = accumulation_dtype(model.dtype)
        self.constants = RowConstants(rows, model.device, dtype)
        there = RowConstants(rows, device, dtype) if self.two_devices else self.constants
        self.blocks = OpenBlocks(model, there, block_size, options.step_callback, dtype)
        chunk = PROMPT_CHUNK if options.prefix_cache else None
        self.scheduler = Scheduler(rows, options.prompt_budget, chunk)
        self._opening: list[RunningSequence] = []  # that need a new block before the denoiser's next pass
        self._ready: list[RunningSequence] = []  # in lockstep: sequences that wait for the others to begin a round
        self._late: list[Collect] = []  # of the denoiser's last pass, where the next is launched first
        self._unseen: list[Event] = []  # of requests that whoever last ran steps did not ask about
        self._next_number = 0

    @staticmethod
    def memory_for(model: Towers, rows: int, length: int, block_size: int = 16) -> int:
        """Bytes in which so many texts of up to `length` tokens fit at once; twice with the towers on two devices."""
        return memory_for(model, rows, length + block_size)

    @classmethod
    def fitting(
        cls,
        model: Towers,
        requests: Sequence[Request],
        rows: int,
        memory: int | None = None,
        options: EngineOptions | None = None,
    ) -> LLM:
        """An engine that all of these requests fit, with at most `rows` running at once, in so much memory.

        Raises:
            ArgumentError: the longest does not fit the memory; says how much it needs.
        """
        length = max((len(request.prompt) + request.params.max_new_tokens for request in requests), default=1)
        block = max((request.params.block_size for request in requests), default=1)
        if memory is not None and memory < (least := cls.memory_for(model, 1, length, block)):
            raise ArgumentError(
                f"a text of {length} tokens takes {least / 2**20:.1f} MiB of state, more than the "
                f"{memory / 2**20:.1f} MiB allowed; allow more or ask for shorter texts",
                param="memory",
            )
        rows = min(rows, max(len(requests), 1))
        return cls(model, rows=rows, length=length, block_size=block, memory=memory, options=options)

    # --- requests -------------------------------------------------------------------------------------------------

    def add_request(self, request: Request) -> int:
        """Queues it → its number, which its events carry as `row`; numbers count from 0.

        Raises:
            ArgumentError: it can never run here; says why.
        """
        self.check(request)
        number = self._next_number
        self._next_number += 1
        self.scheduler.waiting.append((number, request))
        return number

    def check(self, request: Request) -> None:
        """Raises ArgumentError where a request can never run here; says why. From any thread."""
        admission.check(self.model, request, self.length, self.blocks.size, self.state.segments.columns)

    def abort(self, number: int) -> None:
        """Forgets a request, waiting or running: no event of it comes any more, and its slot is free at once. Unknown
        numbers are ignored."""
        self._unseen = [event for event in self._unseen if event.row != number]
        self._opening = [sequence for sequence in self._opening if sequence.output.row != number]
        self._release(number)

    def _release(self, number: int) -> RunningSequence | None:
        """Takes a sequence's slot and columns back."""
        sequence = self.scheduler.forget(number)
        if sequence is not None:
            self.state.close(sequence.slot)
        return sequence

    def close(self) -> None:
        """Aborts every request and returns the state to the model's workspace; the engine must not be used again."""
        for number in list(self.scheduler.running):
            self._release(number)
        self.scheduler.waiting.clear()
        self.model.workspace.return_state(self.state)

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do or to tell."""
        return bool(self.scheduler.waiting or self.scheduler.running or self._unseen)

    def stats(self) -> EngineStats:
        """A snapshot of the engine's load. Call this only from the thread that runs `step`."""
        return EngineStats(
            slots=self.state.rows,
            free_slots=len(self.scheduler.free),
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting),
            max_seq_len=self.length,
            max_block_size=self.blocks.size,
            state_bytes=self._state_bytes,
            prefix_bytes=self.prefixes.nbytes,
            prefix_tokens=len(self.prefixes.nodes) * self.prefixes.chunk,
            prompt_tokens=self.prefixes.asked,
            reused_tokens=self.prefixes.found,
        )

    def generate(
        self, requests: Sequence[Request], progress: Callable[[int], object] | None = None
    ) -> list[Generation]:
        """Runs all of them → results in their order; progress is told how many have ended."""
        numbers = [self.add_request(request) for request in requests]
        wanted = set(numbers)
        results: dict[int, Generation] = {}
        while len(results) < len(numbers):
            for event in self._step_for(wanted):
                if event.result is not None:
                    results[event.row] = event.result
                    if progress is not None:
                        progress(len(results))
        return [results[number] for number in numbers]

    def stream(self, request: Request) -> Iterator[Event]:
        """Events of one request; others that wait or run go on meanwhile, and the next `step` returns their events.
        Closing the iterator aborts the request."""
        number = self.add_request(request)
        try:
            while True:
                for event in self._step_for({number}):
                    yield event
                    if event.result is not None:
                        return
        finally:
            self.abort(number)

    def _step_for(self, numbers: set[int]) -> list[Event]:
        """A step → the events of these requests; those of others are kept for the next `step`."""
        before, self._unseen = self._unseen, []
        events = self.step()
        self._unseen = before + [event for event in events if event.row not in numbers]
        return [event for event in events if event.row in numbers]

    # --- a step ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self) -> list[Event]:
        """One pass of each tower for every sequence that needs it → what became final since the last step."""
        unseen, self._unseen = self._unseen, []
        events: list[Event] = [*self._admit()]
        denoiser = (self._launch_denoiser, self._launch_denoiser_ar)
        self._draft()
        if self.two_devices:
            for collect in [collect for launch in (*denoiser, self._launch_context) for collect in launch()]:
                events += collect()
        else:
            for launch in (self._launch_context, *denoiser):
                for collect in launch():
                    events += collect()
        for event in events:
            if event.result is not None:
                self._leave(event)
        return unseen + events

    def _admit(self) -> list[BlockEvent]:
        """Waiting requests take free slots and memory, first come, first served: none starves."""
        events: list[BlockEvent] = []
        waiting, free = self.scheduler.waiting, self.scheduler.free
        if not waiting or not free:
            return events
        together = min(len(self.scheduler.running) + len(waiting), self.state.rows)
        admitted = []
        while waiting and free:
            number, request = waiting[0]
            columns = admission.columns(request, self.blocks.size)
            idle = request.params.max_new_tokens == 0 and not request.prompt_logprobs
            if not idle and self.state.segments.room_for(columns) is None:
                break
            waiting.popleft()
            params, why = resolve(self.model, request.params, 1)
            why = why or request.mode_reason
            output = SequenceOutput.of(number, params, len(request.prompt), self.model.tokenizer, why)
            if idle:
                events.append(output.nothing())
                continue
            sequence = self._sequence(request, output, free.pop(), together)
            self.state.open(sequence.slot, columns)
            self.scheduler.start(sequence)
            admitted.append(sequence)
        if admitted:
            self.constants.admit(admitted)
            if self.two_devices:
                self.blocks.constants.admit(admitted)
            self.state.reset(placed([sequence.slot for sequence in admitted], self.model.device))
            for sequence in admitted:
                self._restore_prefix(sequence)
            events += self._prompts_read([s for s in admitted if s.read == s.prompt_end])
        return events

    def _sequence(self, request: Request, output: SequenceOutput, slot: int, together: int) -> RunningSequence:
        params = request.params
        (policy,), (policy_value,) = params.row_policies(1)
        (seed,) = params.row_seeds(1)
        controller = self.model.workspace.draft_controller(params, together, len(request.prompt))
        matcher = None if request.constraint is None else request.constraint.matcher(params.eos_token_id)
        return RunningSequence(request, output, slot, seed, policy, policy_value, controller, matcher)

    def _restore_prefix(self, sequence: RunningSequence) -> None:
        """Puts the known beginning of the prompt into the sequence's slot."""
        request, output = sequence.request, sequence.output
        if request.prompt_logprobs:  # what is known of a prompt is not how likely it is
            output.prompt_logprobs.append(None)
        elif self.options.prefix_cache:
            found = self.prefixes.restore(self.state, sequence.slot, request.prompt)
            sequence.read = output.cached_tokens = found

    # --- the context tower ----------------------------------------------------------------------------------------

    def _launch_context(self) -> list[Collect]:
        works = self.scheduler.context_works(self.model.prompt_piece)
        return [collect for group in grouped(works) for collect in self._in_parts(self._launch_works, group)]

    def _launch_works(self, works: Sequence[ScheduledTokens]) -> list[Collect]:
        """One pass of the context tower, and what each sequence does next."""
        sequences = [work.sequence for work in works]
        started = time.perf_counter()
        pending = context_step.launch(self.model, self.state, self.constants, works)
        _charge(sequences, started)

        def collect() -> list[BlockEvent]:
            started = time.perf_counter()
            events = context_step.collect(pending)
            _charge(sequences, started)
            return events + self._after_reading(works, events)

        return [collect]

    def _after_reading(self, works: Sequence[ScheduledTokens], events: Sequence[BlockEvent]) -> list[BlockEvent]:
        """Says what the sequences of a pass need next → the ends of those that asked only about their prompts."""
        tokens = {event.row: len(event.tokens) for event in events}
        ready, read = [], []
        for work in works:
            sequence = work.sequence
            if work.scored and sequence.mode == "verified":
                brought = tokens[sequence.output.row]
                sequence.controller.record(sequence.allowed, brought, sequence.accepted, sequence.seconds)
            if sequence.phase is not Phase.PROMPT:
                ready.append(sequence)
                continue
            self._keep_prefix(sequence)
            if sequence.read == sequence.prompt_end:
                read.append(sequence)
        self._begin(ready)
        return self._prompts_read(read)

    def _keep_prefix(self, sequence: RunningSequence) -> None:
        if not self.options.prefix_cache:
            return
        try:
            self.prefixes.keep(self.state, sequence.slot, sequence.request.prompt, sequence.read)
        except Exception as error:
            if not out_of_memory(error):
                raise
            self._relieve()

    def _prompts_read(self, sequences: Sequence[RunningSequence]) -> list[BlockEvent]:
        """Their prompts are read → the ends of those where nothing but the prompt was asked about."""
        for sequence in sequences:
            sequence.output.prefilled = time.perf_counter()
            sequence.pending = sequence.request.prompt[-1]
        self._begin(sequences)
        return [sequence.output.nothing() for sequence in sequences if not sequence.output.running]

    def _begin(self, ready: Sequence[RunningSequence]) -> None:
        """Begins the next round of these sequences. In lockstep a round begins when all sequences are ready."""
        if self.options.step_callback is None:
            for sequence in ready:
                if sequence.output.running:
                    self._begin_round(sequence, sequence.controller.passes(), sequence.output.room)
            return
        self._ready += ready
        if len(self._ready) == len(self.scheduler.running):
            rows = [sequence for sequence in self._ready if sequence.output.running]
            self._ready.clear()
            if rows:
                passes, room = rows[0].controller.passes(), max(sequence.output.room for sequence in rows)
                for sequence in rows:
                    self._begin_round(sequence, passes, room)

    def _begin_round(self, sequence: RunningSequence, draft_passes: int, room: int) -> None:
        """draft_passes: the draft controller's choice; room: new tokens that may still be written."""
        params = sequence.params
        sequence.room, sequence.allowed, sequence.launched, sequence.seconds = room, 0, 0, 0.0
        match sequence.mode:
            case "ar":
                sequence.phase = Phase.STEP
            case "mock_ar":
                sequence.phase = Phase.DENOISER_AR
            case "diffusion":
                sequence.allowed = params.steps_per_block
            case "verified":
                sequence.phase = Phase.STEP
                if min(params.block_size, room) > 1:  # else there is nothing to draft
                    sequence.allowed = draft_passes
        if not sequence.allowed:
            return
        if sequence.mode == "verified" and self.options.drafter is not None:
            sequence.phase = Phase.DRAFT
            return
        sequence.phase = Phase.DENOISE
        sequence.opened += 1
        self._opening.append(sequence)

    def _draft(self) -> None:
        """Drafts of the engine's drafter, if there is one."""
        if self.options.drafter is not None:
            sequences = self.scheduler.of_phase(Phase.DRAFT)
            if sequences:
                started = time.perf_counter()
                drafting.fill(self.options.drafter, sequences)
                _charge(sequences, started)

    # --- the denoiser ---------------------------------------------------------------------------------------------

    def _launch_denoiser(self) -> list[Collect]:
        """The denoiser's pass over open blocks."""
        sequences = self._denoising(Phase.DENOISE)
        launched: list[Collect] = []
        if sequences:
            self.blocks.open(sorted(self._opening, key=lambda sequence: sequence.slot))
            self._opening.clear()
            launched = self._in_parts(self._launch_blocks, sequences)
        if self.async_scheduling and any(sequence.needs_denoiser for sequence in sequences):
            launched, self._late = self._late, launched  # there is another pass to launch before this one is collected
        else:
            launched, self._late = self._late + launched, []
        return launched

    def _denoising(self, phase: Phase) -> list[RunningSequence]:
        lockstep = self.options.step_callback is not None
        sequences = self.scheduler.denoiser_sequences(self.two_devices and not lockstep, lockstep)
        return [sequence for sequence in sequences if sequence.phase is phase]

    def _launch_blocks(self, sequences: Sequence[RunningSequence]) -> list[Collect]:
        started = time.perf_counter()
        view = self._view(sequences)
        pending = self.blocks.launch(sequences, view, self.async_scheduling, not self.options.raise_errors)
        _charge(sequences, started)

        def collect() -> list[Event]:
            live = [pending.sequences[place] for place in pending.live()]
            started = time.perf_counter()
            done = self.blocks.collect(pending)
            _charge(live, started)
            events: list[Event] = []
            for sequence in live:
                events += sequence.step_events
                sequence.step_events.clear()
            for place, error in pending.errors.items():
                if pending.sequences[place] in live:
                    events.append(pending.sequences[place].fail(error))
            for sequence in done:
                events += self._block_done(sequence)
            return events

        return [collect]

    def _block_done(self, sequence: RunningSequence) -> list[BlockEvent]:
        """A finished block or draft goes to the context tower."""
        if sequence.mode == "verified":
            sequence.phase = Phase.CHECK
            sequence.block = sequence.block[: sequence.draft_length]
            return []
        sequence.phase = Phase.COMMIT
        if sequence.request.logprobs is not None:  # the context tower has yet to say how likely the block is
            sequence.held = sequence.block = sequence.block[: sequence.output.room]
            return []
        return [sequence.output.take(sequence.block, sequence.committed_at, sequence.confidence)]

    def _launch_denoiser_ar(self) -> list[Collect]:
        """The denoiser's pass over pending tokens."""
        return self._in_parts(self._launch_pending, self._denoising(Phase.DENOISER_AR))

    def _launch_pending(self, sequences: Sequence[RunningSequence]) -> list[Collect]:
        pending = denoiser_ar.launch(self.model, self.blocks.constants, sequences, self._view(sequences))
        self.blocks.passes += 1
        return [lambda: denoiser_ar.collect(sequences, pending)]

    def _view(self, sequences: Sequence[RunningSequence]) -> ContextView:
        """What the denoiser sees of the sequences' texts, brought to its device as far as it is new there."""
        assert self.reader is not None
        self.state.bound = max(sequence.read for sequence in sequences)
        fresh = [Fresh(s.slot, max(s.seen, 0), s.read) for s in sequences if s.seen < s.read]
        view = self.reader.view(slots_of(sequences, self.state.rows, self.blocks.device), fresh)
        for sequence in sequences:
            sequence.seen = sequence.read
        return view

    # --- errors, memory, ends -------------------------------------------------------------------------------------

    def _in_parts(self, launch: Callable[[Sequence[Item]], list[Collect]], items: Sequence[Item]) -> list[Collect]:
        return in_parts(launch, items, self._relieve, self._fail) if items else []

    def _fail(self, item: ScheduledTokens | RunningSequence, error: Exception) -> list[Collect]:
        """The end of a sequence whose pass does not fit the memory even alone."""
        if self.options.raise_errors:
            raise error
        sequence = item.sequence if isinstance(item, ScheduledTokens) else item
        then = sequence.phase, sequence.opened
        return [lambda: [sequence.fail(error)] if then == (sequence.phase, sequence.opened) else []]

    def _relieve(self) -> None:
        """Gives back memory that nobody's answer needs."""
        self.prefixes.clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _leave(self, event: Event) -> None:
        """An ended sequence's slot is free; mode "auto" learns from what it wrote."""
        sequence = self._release(event.row)
        if sequence is not None and sequence.params.mode == AUTO and event.result is not None:
            self.model.workspace.mode_chooser.recent.learn([event.result], sequence.params.block_size)


def _charge(sequences: Sequence[RunningSequence], started: float) -> None:
    """Gives each sequence its share of the time since `started`: of a launch, or of the wait for its results."""
    seconds = (time.perf_counter() - started) / max(len(sequences), 1)
    for sequence in sequences:
        sequence.seconds += seconds
