"""`LLM`: requests in, events and results out; `step` is one pass of each tower for whoever needs it.

A row goes PROMPT → its mode's cycle → out:

    ar         STEP → STEP → …
    diffusion  DENOISE (its passes) → COMMIT → DENOISE → …
    verified   DENOISE (the draft) → CHECK → DENOISE → …, or STEP where a draft would not pay
    mock_ar    MOCK → COMMIT → MOCK → …

Rows that need the same tower share its pass, whatever cycle they are in and however long their texts are. What a row
writes is what it would write alone.

Every pass is launched first and collected later: `launch` gives the device its work without waiting for it, `collect`
waits for the results, books them and says what the row needs next. With a device for each tower a step launches both
towers' passes before it collects any, so half the rows denoise while the texts of the others are read. On one device
passes take turns in any case, so the context tower's are collected first: a row that has been read then denoises in
the same step, its block takes a step less, and the passes are fuller.

An accelerator would wait for the host between the passes of a block. There the denoiser's passes are launched one
`ahead`: the next is on its way before the last one is collected. The host then learns a pass late that a block is
finished, which costs that block an idle pass; it has no tokens (`Blocks.launch`), so it reads no expert of its own.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from twotower.cache.prefix_cache import Prefixes
from twotower.cache.replica import Fresh, Mirror
from twotower.decoding.auto_mode import chooser_of, resolve
from twotower.decoding.draft_controller import Pace, begun
from twotower.decoding.modes import AUTO
from twotower.decoding.output import BlockEvent, Event, Generation
from twotower.decoding.sequence_output import RowRecord
from twotower.engine import admission, context_step, denoiser_ar, drafting
from twotower.engine.budget import memory_for, shares
from twotower.engine.context_step import Work, following, grouped, some
from twotower.engine.denoiser_step import Blocks
from twotower.engine.drafting import Drafter
from twotower.engine.oom import in_parts, out_of_memory
from twotower.engine.sequence import Phase, Request, Row
from twotower.errors import ArgumentError
from twotower.ops.host_transfer import placed

if TYPE_CHECKING:
    from twotower.cache.hybrid_cache import ContextView
    from twotower.modeling_twotower import TwoTowerForCausalLM

Collect = Callable[[], Sequence[Event]]  # waits for a pass that was launched, and books it
PROMPT_CHUNK = 256  # a prompt is read up to multiples of this, where its state can serve another prompt
PROMPT_BUDGET = 512  # prompt tokens read in one step, of all rows together


class LLM:
    """Runs requests on a model.

    rows: texts at work at once; length: tokens of the longest text with its answer (None: the model's window);
    block_size: the longest block. memory: bytes for what the texts keep, a fifth of it for prompts' beginnings (None:
    for `rows` texts of that length, and a fifth more). A text takes as much as its request can need. drafter: proposes
    what verified decoding checks (None: the denoiser).

    Raises:
        ArgumentError: a size is less than 1; the memory holds no text at all.
    """

    def __init__(
        self,
        model: TwoTowerForCausalLM,
        *,
        rows: int = 16,
        length: int | None = None,
        block_size: int = 16,
        memory: int | None = None,
        drafter: Drafter | None = None,
    ) -> None:
        for name, value in (("rows", rows), ("length", length), ("block_size", block_size)):
            if value is not None and value < 1:
                raise ArgumentError(f"{name} is {value}; it must be at least 1")
        window = model.config.backbone.max_position_embeddings
        self.model = model
        self.drafter = drafter
        self.length = min(length or window, window)
        rows, columns, spare = shares(model, rows, self.length + block_size, PROMPT_CHUNK, memory)
        self.state = model.new_state(rows, 0, columns)
        self.prefixes = Prefixes(PROMPT_CHUNK, spare)
        self.reader = model.reader(self.state) if model.denoiser is not None else None
        self.apart = isinstance(self.reader, Mirror)  # each tower on a device of its own
        device = model.device if model.denoiser is None else model.denoiser.device
        self.ahead = device.type == "cuda"  # on a processor a pass is done when it has been launched
        self.blocks = Blocks(model, rows, block_size, device)
        self.waiting: deque[tuple[int, Request]] = deque()
        self.rows: dict[int, Row] = {}  # by the request's number, oldest first
        self.free = list(range(rows))[::-1]
        self.paces: dict[tuple[int, ...], Pace] = {}  # by how many rows are at work, to a factor of two
        self._opening: list[Row] = []  # that need a new block before the denoiser's next pass
        self._late: list[Collect] = []  # of the denoiser's last pass, where the next is launched first
        self._unseen: list[Event] = []  # of requests that whoever last ran steps did not ask about
        self._number = 0

    @staticmethod
    def memory_for(model: TwoTowerForCausalLM, rows: int, length: int, block_size: int = 16) -> int:
        """Bytes in which so many texts of up to `length` tokens fit at once; twice with the towers on two devices."""
        return memory_for(model, rows, length + block_size)

    @classmethod
    def fitting(
        cls, model: TwoTowerForCausalLM, requests: Sequence[Request], rows: int, memory: int | None = None
    ) -> LLM:
        """One that all of these requests fit, with at most `rows` at work at once, in so much memory.

        Raises:
            ArgumentError: the longest does not fit the memory; says how much it needs.
        """
        length = max((len(request.prompt) + request.params.max_new_tokens for request in requests), default=1)
        block = max((request.params.block_size for request in requests), default=1)
        if memory is not None and memory < (least := cls.memory_for(model, 1, length, block)):
            raise ArgumentError(
                f"a text of {length} tokens takes {least / 2**20:.1f} MiB of state, more than the "
                f"{memory / 2**20:.1f} MiB allowed; allow more or ask for shorter texts"
            )
        return cls(model, rows=min(rows, max(len(requests), 1)), length=length, block_size=block, memory=memory)

    # --- requests -------------------------------------------------------------------------------------------------

    def add_request(self, request: Request) -> int:
        """Queues it → its number, which its events carry as `row`.

        Raises:
            ArgumentError: it can never run here; says why.
        """
        self.check(request)
        self._number += 1
        self.waiting.append((self._number, request))
        return self._number

    def check(self, request: Request) -> None:
        """Raises ArgumentError where a request can never run here; says why. From any thread."""
        admission.check(self.model, request, self.length, self.blocks.size, self.state.segments.columns)

    def abort(self, number: int) -> None:
        """Forgets a request, waiting or running: no event of it comes any more, and its slot is free at once. Unknown
        numbers are ignored."""
        self._unseen = [event for event in self._unseen if event.row != number]
        self.waiting = deque(entry for entry in self.waiting if entry[0] != number)
        self._opening = [row for row in self._opening if row.record.row != number]
        self._release(number)

    def _release(self, number: int) -> Row | None:
        """Takes a row's slot and columns back."""
        row = self.rows.pop(number, None)
        if row is not None:
            row.phase = Phase.GONE
            self.free.append(row.slot)
            self.state.close(row.slot)
        return row

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do or to tell."""
        return bool(self.waiting or self.rows or self._unseen)

    def generate(
        self, requests: Sequence[Request], progress: Callable[[int], object] | None = None
    ) -> list[Generation]:
        """Runs all of them → results in their order; progress is told how many have ended."""
        numbers = [self.add_request(request) for request in requests]
        results: dict[int, Generation] = {}
        while len(results) < len(numbers):
            for event in self._step_for(set(numbers)):
                if event.result is not None:
                    results[event.row] = event.result
                    if progress is not None:
                        progress(len(results))
        return [results[number] for number in numbers]

    def stream(self, request: Request) -> Iterator[Event]:
        """Events of one request; others that wait or run go on meanwhile, and the next `step` returns their events.
        Closing the iterator gives the request up."""
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
        """One pass of each tower for every row that needs it → what became final since the last step."""
        unseen, self._unseen = self._unseen, []
        events: list[Event] = [*self._admit()]
        if self.apart:
            for collect in [*self._draft(), *self._denoise(), *self._mock(), *self._read()]:
                events += collect()
        else:
            for launch in (self._read, self._draft, self._denoise, self._mock):
                for collect in launch():
                    events += collect()
        for event in events:
            if event.result is not None:
                self._leave(event)
        return unseen + events

    def _admit(self) -> list[BlockEvent]:
        """Waiting requests take free slots and memory, first come, first served: none starves."""
        events = []
        while self.waiting and self.free:
            number, request = self.waiting[0]
            columns = admission.columns(request, self.blocks.size)
            idle = request.params.max_new_tokens == 0 and not request.prompt_logprobs
            if not idle and self.state.segments.room_for(columns) is None:
                break
            self.waiting.popleft()
            params, why = resolve(self.model, request.params, 1)
            record = RowRecord.of(number, params, len(request.prompt), self.model.tokenizer, why)
            if idle:
                events.append(record.nothing())
                continue
            (policy,), (knob,) = params.row_policies(1)
            (seed,) = params.row_seeds(1)
            row = Row(request, record, self.free.pop(), seed, policy, knob, self._pace(request))
            self.rows[number] = row
            if request.constraint is not None:
                row.matcher = request.constraint.matcher(params.eos_token_id)
            self.state.open(row.slot, columns)
            self.state.reset(placed([row.slot], self.model.device))
            if request.prompt_logprobs:  # what is known of a prompt is not how likely it is
                record.prompt_logprobs.append(None)
            else:
                row.read = record.cached_tokens = self.prefixes.restore(self.state, row.slot, request.prompt)
            if row.read == row.prompt_end:
                events += self._written(row)
        return events

    def _pace(self, request: Request) -> Pace:
        return begun(self.paces, request.params, (len(self.rows).bit_length(),))

    def _of(self, *phases: Phase) -> list[Row]:
        """In the order of their slots."""
        return sorted((row for row in self.rows.values() if row.phase in phases), key=lambda row: row.slot)

    def _read(self) -> list[Collect]:
        """The context tower's passes."""
        works, budget = [], PROMPT_BUDGET
        for row in [row for row in self.rows.values() if row.phase is Phase.PROMPT]:  # oldest first
            edge = row.read - row.read % PROMPT_CHUNK + PROMPT_CHUNK
            end = min(row.read + min(budget, self.model.prompt_piece), edge, row.prompt_end)
            part = list(row.request.prompt[row.read : end])
            if part:
                works.append(Work(row, part, scored=False, following=following(row, len(part))))
                budget -= len(part)
        works += [Work(row, [row.pending], scored=True) for row in self._of(Phase.STEP)]
        works += [Work(row, row.block, scored=True) for row in self._of(Phase.CHECK)]
        for row in self._of(Phase.COMMIT):
            first = row.after is not None  # the held tokens are the block itself, so its first follows what was read
            works.append(Work(row, row.block, scored=False, following=row.held[first:] if row.held else None))
        return [c for group in grouped(works) for c in in_parts(self._read_group, group, self._relieve, self._fail)]

    def _going(self, phase: Phase) -> list[Row]:
        """The rows of this phase for whom the denoiser makes a pass in this step.

        All of them; but where every row would leave the denoiser for the context tower at once, the younger half waits
        for one step, and from then on one half denoises while the other is read. Two passes side by side over half the
        rows take no longer than two in turn over all, if the towers' cost alike, and less where rows cost anything.
        """
        going = [row for row in self.rows.values() if row.needs_denoiser]  # oldest first
        if self.apart and len(going) == len(self.rows) and all(row.in_last_pass for row in going):
            going = going[: (len(going) + 1) // 2]
        return sorted((row for row in going if row.phase is phase), key=lambda row: row.slot)

    @staticmethod
    def _fail(of: Work | Row, error: Exception) -> list[Collect]:
        """The end of a row whose pass does not fit the memory even alone."""
        row = of.row if isinstance(of, Work) else of
        then = row.phase, row.opened
        return [lambda: [_failed(row, error)] if then == (row.phase, row.opened) else []]

    def _read_group(self, group: Sequence[Work]) -> list[Collect]:
        """One pass of the context tower, and what each row does next."""
        rows = [work.row for work in group]
        with self._shared(rows):
            launched = context_step.launch(self.model, self.state, group)

        def finish() -> list[BlockEvent]:
            with self._shared(rows):
                events = context_step.collect(launched)
            tokens = {event.row: len(event.tokens) for event in events}
            for work in group:
                row = work.row
                if work.scored:
                    if row.mode == "verified":
                        row.pace.record(row.allowed, tokens[row.record.row], row.kept, row.seconds)
                    self._begin(row)
                elif row.phase is Phase.PROMPT:
                    self._keep_prefix(row)
                    if row.read == row.prompt_end:
                        events += self._written(row)
                else:
                    self._begin(row)
            return events

        return [finish]

    def _keep_prefix(self, row: Row) -> None:
        try:
            self.prefixes.keep(self.state, row.slot, row.request.prompt, row.read)
        except Exception as error:
            if not out_of_memory(error):
                raise
            self._relieve()

    def _relieve(self) -> None:
        """Gives back memory that nobody's answer needs."""
        self.prefixes.clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @contextmanager
    def _shared(self, rows: Sequence[Row]) -> Iterator[None]:
        """What is done in it is done for these rows: each has its share of the time. Of a pass that is its launch and
        the wait for it, not what else was done in between."""
        started = time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        for row in rows:
            row.seconds += seconds / len(rows)

    def _written(self, row: Row) -> list[BlockEvent]:
        """Its prompt is read → its end, where nothing but the prompt was asked about."""
        row.record.prefilled = time.perf_counter()
        row.pending = row.request.prompt[-1]
        self._begin(row)
        return [] if row.record.running else [row.record.nothing()]

    def _begin(self, row: Row) -> None:
        """The next round of a row's cycle."""
        if not row.record.running:
            return
        params = row.params
        row.allowed, row.taken, row.seconds = 0, 0, 0.0
        match row.mode:
            case "ar":
                row.phase = Phase.STEP
            case "mock_ar":
                row.phase = Phase.MOCK
            case "diffusion":
                row.allowed = params.steps_per_block
            case "verified":
                row.phase = Phase.STEP
                row.allowed = row.pace.passes()
                if min(params.block_size, row.record.room) == 1:  # nothing to draft
                    row.allowed = 0
        if row.allowed and row.mode == "verified" and self.drafter is not None:
            row.phase = Phase.DRAFT
        elif row.allowed:
            row.phase = Phase.DENOISE
            row.opened += 1
            self._opening.append(row)

    def _draft(self) -> list[Collect]:
        """Drafts of the engine's drafter; nothing of them is left to collect."""
        rows = self._of(Phase.DRAFT)
        if rows and self.drafter is not None:
            with self._shared(rows):
                drafting.fill(self.drafter, rows)
        return []

    def _denoise(self) -> list[Collect]:
        """The denoiser's pass over open blocks."""
        rows, launched = self._going(Phase.DENOISE), []
        if rows:
            self.blocks.begin(self._opening)
            self._opening.clear()
            launched = in_parts(self._denoise_rows, rows, self._relieve, self._fail)
        if self.ahead and any(row.needs_denoiser for row in rows):  # so there is another pass to launch meanwhile
            launched, self._late = self._late, launched
        else:
            launched, self._late = self._late + launched, []
        return launched

    def _denoise_rows(self, rows: Sequence[Row]) -> list[Collect]:
        with self._shared(rows):
            look = self.blocks.launch(rows, self._view(rows), self.ahead)

        def finish() -> list[Event]:
            live = [rows[place] for place in look.live()]
            with self._shared(live):
                done, failed = self.blocks.collect(look)
            events: list[Event] = []
            for row in live:
                events += row.seen
                row.seen.clear()
            events += [_failed(row, error) for row, error in failed]
            for row in done:
                if row.mode == "verified":
                    row.phase = Phase.CHECK
                    row.block = row.block[: min(row.record.room, row.pace.length(row.params.block_size))]
                else:
                    row.phase = Phase.COMMIT
                    if row.request.logprobs is None:
                        events.append(row.record.take(row.block, row.committed_at, row.confidence))
                    else:  # the context tower has yet to say how likely it is
                        row.held = row.block = row.block[: row.record.room]
            return events

        return [finish]

    def _mock(self) -> list[Collect]:
        """The denoiser's pass over pending tokens."""
        rows = self._going(Phase.MOCK)
        return in_parts(self._mock_rows, rows, self._relieve, self._fail) if rows else []

    def _mock_rows(self, rows: Sequence[Row]) -> list[Collect]:
        launched = denoiser_ar.launch(self.model, rows, self._view(rows))
        return [lambda: denoiser_ar.collect(rows, launched)]

    def _view(self, rows: Sequence[Row]) -> ContextView:
        """What the denoiser sees of the rows' texts, brought to its device as far as it is new there."""
        assert self.reader is not None
        self.state.bound = max(row.read for row in rows)
        fresh = [Fresh(row.slot, max(row.shown, 0), row.read) for row in rows if row.shown < row.read]
        view = self.reader.view(some(rows, self.state.rows, self.blocks.device), fresh)
        for row in rows:
            row.shown = row.read
        return view

    def _leave(self, event: BlockEvent) -> None:
        """An ended row's slot is free; mode "auto" learns from what it wrote."""
        row = self._release(event.row)
        if row is None:
            return
        if row.params.mode == AUTO and event.result is not None:
            chooser_of(self.model).recent.learn([event.result], row.params.block_size)


def _failed(row: Row, error: Exception) -> BlockEvent:
    """The row's end; passes of it that are on their way count no more."""
    row.phase = Phase.GONE
    return row.record.fail(error)
