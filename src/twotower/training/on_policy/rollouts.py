"""Rollouts: texts that the model of a step decodes in its own mode, and states of their decoding.

A state is the input of a pass that predicts tokens: a block with masks, after the text before it. Its visible tokens
are those of the text. States of one text do not overlap, so that one pass over the text trains all of them. Where
states overlap, those whose draft was refused come first, and chance, keyed by (seed, row, document), chooses among the
others.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from twotower.decoding.block_rule import BlockRule
from twotower.decoding.output import BlockEvent, Event, StepEvent
from twotower.decoding.params import GenerationParams
from twotower.engine.engine_options import EngineOptions
from twotower.engine.llm import LLM
from twotower.engine.sequence import Request
from twotower.errors import TwoTowerError
from twotower.modeling_twotower import TwoTowerForCausalLM
from twotower.training.data.keyed_random import uniform
from twotower.training.noise import keyed_seed


@dataclass(frozen=True)
class State:
    """The input of a pass. start: the place in the tokens of its first column. masked: which columns are masks.

    refused: whether verification refused a token of the draft that the pass made.
    """

    start: int
    masked: tuple[bool, ...]
    refused: bool = False

    @property
    def end(self) -> int:
        return self.start + len(self.masked)


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """The beginning of document `document` of row `row` of the run."""

    row: int
    document: int
    tokens: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """tokens: a prompt of `given` tokens and its continuation. ended: whether it ends with EOS."""

    row: int
    document: int
    given: int
    tokens: tuple[int, ...]
    ended: bool
    states: tuple[State, ...]

    @property
    def refused(self) -> Rollout:
        """With the states alone whose draft was refused."""
        return replace(self, states=tuple(state for state in self.states if state.refused))


def decode(
    model: TwoTowerForCausalLM, prompts: Sequence[Prompt], params: GenerationParams, seed: int, rows: int
) -> list[Rollout]:
    """Continues prompts → their rollouts, in order. A prompt without a state gets a rollout without states.

    params: of all prompts; their seeds are keyed by (seed, row, document). rows: texts that are decoded at once.

    Raises:
        TwoTowerError: a text cannot be decoded.
    """
    if not prompts:
        return []
    requests = [
        Request(
            list(prompt.tokens),
            replace(params, seed=keyed_seed(keyed_seed(seed, prompt.row), prompt.document)),
            watched=True,
        )
        for prompt in prompts
    ]
    options = EngineOptions(prefix_cache=False, raise_errors=True)
    llm = LLM.fitting(model, requests, min(rows, len(requests)), options=options)
    events: dict[int, list[Event]] = defaultdict(list)
    numbers = [llm.add_request(request) for request in requests]
    while llm.has_work:
        for event in llm.step():
            events[event.row].append(event)
    llm.close()
    rule = BlockRule.of(model.config.denoiser)
    return [
        _rollout(prompt, events[number], params, seed, rule) for prompt, number in zip(prompts, numbers, strict=True)
    ]


def _rollout(prompt: Prompt, events: Sequence[Event], params: GenerationParams, seed: int, rule: BlockRule) -> Rollout:
    new = [token for event in events if isinstance(event, BlockEvent) for token in event.tokens]
    result = events[-1].result
    if result is None or result.error:
        raise TwoTowerError(f"row {prompt.row}: a rollout ended with an error ({result.error if result else 'none'})")
    given = len(prompt.tokens)
    tokens, ended = (*prompt.tokens, *new), result.finish_reason == "eos"
    if not rule.one_pass:
        known = params.block_size - rule.predictions(params.block_size, params.mode)
        found = _states_of_blocks(events, tokens, given, known)
    elif params.mode == "verified":
        found = _states_of_checks(events, given)
    else:
        found = _states_of_windows(events, given)
    usable = [state for state in found if _usable(state, len(tokens), ended)]
    key = (seed, prompt.row, prompt.document)
    return Rollout(
        row=prompt.row,
        document=prompt.document,
        given=given,
        tokens=tokens,
        ended=ended,
        states=tuple(_apart(usable, *key)),
    )


def _usable(state: State, length: int, ended: bool) -> bool:
    """Whether the text has the visible tokens of the state, and a token for a mask that is not beyond its end."""
    first = state.masked.index(True)
    inside = all(hidden or state.start + place < length for place, hidden in enumerate(state.masked))
    return state.start >= 0 and inside and state.start + first < length and (ended or state.end <= length)


def _apart(states: Sequence[State], *key: int | str) -> Iterator[State]:
    """States that do not overlap, in order."""
    order = sorted(
        range(len(states)), key=lambda number: (not states[number].refused, uniform("state", *key, number), number)
    )
    kept: list[State] = []
    for number in order:
        state = states[number]
        if all(state.end <= other.start or other.end <= state.start for other in kept):
            kept.append(state)
    yield from sorted(kept, key=lambda state: state.start)


def _states_of_blocks(events: Sequence[Event], text: Sequence[int], given: int, known: int) -> Iterator[State]:
    """A denoiser with passes of its own: the inputs of the passes over each block.

    known: columns of a new block before its masks. In verified decoding, later passes over a block read tokens of its
    draft. Such an input is left out if one of these tokens was refused.
    """
    passes: list[StepEvent] = []
    for event in events:
        if isinstance(event, StepEvent):
            passes.append(event)
            continue
        refused = _refused(event)
        for number, step in enumerate(passes):
            start = given + step.start
            if not number:
                yield State(start, tuple(place >= known for place in range(len(step.masked))), refused)
            read = zip(step.masked, step.tokens, text[start:], strict=False)
            if any(step.masked) and all(hidden or token == own for hidden, token, own in read):
                yield State(start, tuple(step.masked), refused)
        passes.clear()


def _refused(event: BlockEvent) -> bool:
    """Whether verification refused a token of the draft."""
    return any(drafted != token for drafted, token in zip(event.draft, event.tokens, strict=False))


def _states_of_checks(events: Sequence[Event], given: int) -> Iterator[State]:
    """Verified decoding with adapters: passes that made a draft. Such a pass has kept the whole draft before.

    Its first column is the token before the text that it has fixed (`engine/one_pass.py`).
    """
    last: BlockEvent | None = None
    open_state: State | None = None
    for event in events:
        if isinstance(event, StepEvent):
            assert last is not None
            visible = len(last.tokens)
            width = visible + len(event.tokens) - 1
            masked = tuple(place >= visible for place in range(width))
            open_state = State(given + last.start - 1, masked) if width > visible else None
            continue
        if open_state is not None:
            yield replace(open_state, refused=_refused(event))
        last, open_state = event, None
    if open_state is not None:
        yield open_state


def _states_of_windows(events: Sequence[Event], given: int) -> Iterator[State]:
    """Diffusion with adapters: passes over the tokens that the pass before has fixed, and masks."""
    visible = 1
    for event in events:
        if isinstance(event, BlockEvent):
            visible = len(event.tokens)
            continue
        width = visible + len(event.tokens) - 1
        if width > visible:
            yield State(given + event.start - visible, tuple(place >= visible for place in range(width)))
