"""Faults in a step: only the requests that raise end, and the others get the text that they would have got."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any
from unittest.mock import patch

import pytest
import torch
from conftest import EVERY_KIND, build_random_model
from pairwise import pairwise
from test_engine import LENGTH, alone, some_request

from twotower import LLM, AsyncLLM, Request, TwoTowerForCausalLM
from twotower.cache.hybrid_cache import TowerState
from twotower.cache.replica import DeviceTransfer
from twotower.decoding.output import BlockEvent, Generation, StepEvent
from twotower.decoding.params import GenerationParams
from twotower.decoding.stopping import Detokenizer
from twotower.decoding.structured import Constraint
from twotower.decoding.unmasking import POLICIES, Pass, Verdict, register_policy
from twotower.engine import admitter, context_step, core, denoiser_ar, denoiser_step, drafting
from twotower.engine.engine_options import EngineOptions
from twotower.engine.rounds import Rounds
from twotower.errors import ArgumentError, TwoTowerError

POISON = 63  # a token that `some_request` may choose; see `requests_of`


class Words:
    """A tokenizer with a word a token, of characters of two bytes."""

    is_fast = True

    def decode(self, tokens: Sequence[int], **_: Any) -> str:
        return "".join(f" wörd{token}" for token in tokens)


@pytest.fixture(scope="module")
def model() -> TwoTowerForCausalLM:
    made = build_random_model(EVERY_KIND, dtype=torch.float64)
    made.tokenizer = Words()
    return made


def requests_of(count: int, seed: int, **given: Any) -> list[Request]:
    """Requests of every mode, without POISON in their prompts and draft depths that depend on time."""
    rng, requests = random.Random(seed), []
    for place in range(count):
        mode = ("ar", "diffusion", "verified", "mock_ar")[place % 4]
        fixed = {"draft_steps": rng.choice([1, 2])} if mode == "verified" else {}
        one = some_request(rng, mode=mode, max_new_tokens=rng.choice([5, 17]), **(fixed | given))
        prompt = [token % 50 + 4 for token in one.prompt]
        requests.append(Request(prompt, one.params, logprobs=(2 if place % 3 == 0 else None), watched=place % 2 == 0))
    return requests


class Fault:
    """Forwards calls to `real`, and raises at one call, or at each call that `poisoned` names."""

    def __init__(self, real: Callable[..., Any], at: int = 0, late: bool = False) -> None:
        self.real, self.at, self.late, self.calls = real, at, late, 0

    def poisoned(self, *_: Any, **__: Any) -> bool:
        self.calls += 1
        return self.calls == self.at

    def __call__(self, *args: Any, **given: Any) -> Any:
        bad = self.poisoned(*args, **given)
        if bad and not self.late:
            raise ValueError("injected")
        out = self.real(*args, **given)
        if bad:
            raise ValueError("injected")
        return out

    def __get__(self, instance: object, owner: object) -> Callable[..., Any]:
        return lambda *args, **given: self(instance, *args, **given)


@contextmanager
def fault(owner: object, name: str, made: Fault) -> Iterator[Fault]:
    """Puts a fault in the place of a method of a class, or of a function of a module."""
    with patch.object(owner, name, made):
        yield made


def run(llm: LLM, requests: Sequence[Request]) -> list[Generation]:
    """Runs requests and checks their streams: every token and text comes once."""
    numbers = [llm.add_request(request) for request in requests]
    events: dict[int, list[BlockEvent]] = {number: [] for number in numbers}
    shown: dict[int, list[tuple[int, int]]] = {number: [] for number in numbers}
    while llm.has_work:
        for event in llm.step():
            if isinstance(event, StepEvent):
                shown[event.row].append((event.start, event.step))
            else:
                events[event.row].append(event)
    results = []
    for number in numbers:
        *_, last = events[number]
        assert [event.result for event in events[number][:-1]] == [None] * (len(events[number]) - 1)
        result = last.result
        assert result is not None
        assert [token for event in events[number] for token in event.tokens] == result.tokens
        assert len(result.committed_at) == len(result.confidence) == len(result.tokens)
        assert [event.start for event in events[number]] == sorted({event.start for event in events[number]})
        if result.finish_reason != "error":
            assert "".join(event.text for event in events[number]) == result.text
        assert shown[number] == sorted(set(shown[number]))
        results.append(result)
    core_of = llm.core
    assert not core_of.scheduler.running
    assert sorted(core_of.scheduler.free) == list(range(core_of.state.rows))
    assert not core_of.state.kv_slots.allocated
    return results


def assert_as_before(found: Generation, expected: Generation) -> None:
    assert (found.tokens, found.text, found.finish_reason) == (expected.tokens, expected.text, expected.finish_reason)
    assert found.committed_at == expected.committed_at
    assert [one.token for one in found.logprobs] == [one.token for one in expected.logprobs]
    for one, other in zip(found.logprobs, expected.logprobs, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-6)


PLACES: list[tuple[object, str]] = [
    (TwoTowerForCausalLM, "extend"),
    (TwoTowerForCausalLM, "denoise"),
    (TowerState, "append"),
    (TowerState, "commit_state"),
    (TowerState, "rollback"),
    (TowerState, "view"),
    (Rounds, "begin"),
    (Detokenizer, "push"),
    (context_step, "sample_rows"),
    (context_step, "collect"),
    (denoiser_step, "sample_rows"),
    (denoiser_step, "commit_rows"),
    (denoiser_step.OpenBlocks, "open"),
    (denoiser_step.OpenBlocks, "collect"),
    (denoiser_ar, "sample_rows"),
    (denoiser_ar, "collect"),
    (core, "group_by_width"),
]
PLACE_PARAMETERS = [pytest.param(place, id=f"{getattr(place[0], '__name__', '?')}-{place[1]}") for place in PLACES]


@lru_cache
def without_faults(model: TwoTowerForCausalLM, rows: int, count: int, seed: int) -> list[Generation]:
    return run(LLM(model, rows=rows, length=LENGTH), requests_of(count, seed))


BEFORE_OR_AFTER = [pytest.param(late, id="after" if late else "before") for late in (False, True)]


@pytest.mark.parametrize(("place", "late", "rows", "at"), pairwise(PLACE_PARAMETERS, BEFORE_OR_AFTER, [1, 16], [3, 9]))
def test_a_fault_that_does_not_return_ends_no_request(
    model: TwoTowerForCausalLM, place: tuple[Any, str], late: bool, rows: int, at: int
) -> None:
    owner, name = place
    count = max(rows, 4)
    with fault(owner, name, Fault(getattr(owner, name), at, late)) as made:
        found = run(LLM(model, rows=rows, length=LENGTH), requests_of(count, seed=rows))
    assert made.calls >= 3
    for one, other in zip(found, without_faults(model, rows, count, rows), strict=True):
        assert_as_before(one, other)


@pytest.mark.parametrize(
    ("place", "way"),
    [
        pytest.param(place, way, id=f"{param.id}-{way}", marks=() if number % 2 == way_number else pytest.mark.slow)
        for number, (place, param) in enumerate(zip(PLACES, PLACE_PARAMETERS, strict=True))
        for way_number, way in enumerate(("two devices", "asynchronous"))
    ],
)
def test_a_fault_with_uncollected_passes(model: TwoTowerForCausalLM, place: tuple[Any, str], way: str) -> None:
    """As on GPUs: with the towers on two devices, and with a pass that is launched before the last is collected."""
    owner, name = place
    with patch.object(model, "transfer", DeviceTransfer() if way == "two devices" else model.transfer):
        llm = LLM(model, rows=16, length=LENGTH)
        llm.core.async_scheduling = way == "asynchronous"
        with fault(owner, name, Fault(getattr(owner, name), at=4, late=True)) as made:
            found = run(llm, requests_of(16, seed=16))
    assert made.calls >= 4
    for one, other in zip(found, without_faults(model, 16, 16, 16), strict=True):
        assert_as_before(one, other)


class Poisoned(Fault):
    """Raises at each pass over the poisoned token."""

    def poisoned(self, _: object, tokens: Any, *rest: Any, **options: Any) -> bool:
        return bool((tokens == POISON).any())


ALWAYS = [
    ("ar", "extend"), ("diffusion", "extend"), ("verified", "extend"), ("mock_ar", "extend"), ("diffusion", "denoise"),
    ("verified", "denoise"), ("mock_ar", "denoise"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("mode_and_verb", "late", "rows"),
    pairwise([pytest.param(pair, id="-".join(pair)) for pair in ALWAYS], BEFORE_OR_AFTER, [1, 16]),
)
def test_a_request_that_always_raises_ends_alone(
    model: TwoTowerForCausalLM, mode_and_verb: tuple[str, str], late: bool, rows: int
) -> None:
    """The server's thread, the streams of the other requests and the next request go on."""
    mode, verb = mode_and_verb
    requests = requests_of(rows, seed=3)
    bad = Request([5, 6, POISON], GenerationParams.of(mode=mode, max_new_tokens=9, block_size=4))
    if mode in ("diffusion", "verified") and verb == "denoise":
        values = {"draft_steps": 1} if mode == "verified" else {}
        bad = Request([5, 6], GenerationParams.of(mode=mode, max_new_tokens=9, mask_token_id=POISON, **values))
    expected = without_faults(model, rows, rows, 3)
    place = rows // 2
    llm = LLM(model, rows=rows, length=LENGTH)
    with fault(TwoTowerForCausalLM, verb, Poisoned(getattr(TwoTowerForCausalLM, verb), late=late)):
        found = run(llm, [*requests[:place], bad, *requests[place:]])
    (failed,) = found[place : place + 1]
    assert (failed.finish_reason, failed.error) == ("error", "ValueError: injected")
    for one, other in zip(found[:place] + found[place + 1 :], expected, strict=True):
        if POISON not in other.tokens:  # a text may have the token too
            assert_as_before(one, other)
    assert_as_before(run(llm, requests[:1])[0], expected[0])


def test_a_detokenizer_that_raises_ends_its_request(model: TwoTowerForCausalLM) -> None:
    requests = requests_of(16, seed=4)
    expected = run(LLM(model, rows=16, length=LENGTH), requests)
    bad = expected[3].tokens[2]

    class Raising(Fault):
        def poisoned(self, _: object, token: int) -> bool:
            return token == bad

    with fault(Detokenizer, "push", Raising(Detokenizer.push)):
        found = run(LLM(model, rows=16, length=LENGTH), requests)
    for one, other in zip(found, expected, strict=True):
        if bad in other.tokens:
            assert one.finish_reason == "error"
            assert one.tokens == other.tokens[: len(one.tokens)]
        else:
            assert_as_before(one, other)
    assert any(one.finish_reason != "error" for one in found)


class Choice(Constraint):
    """Allows all tokens; its matcher raises at a token of the text, or at the start."""

    def __init__(self, at: int) -> None:
        self.at, self.vocab_size = at, 64

    def matcher(self, eos: Sequence[int]) -> Any:
        if self.at == 0:
            raise RuntimeError("no matcher")
        return Matching(self.at)


class Matching:
    def __init__(self, at: int) -> None:
        self.at, self.count = at, 0

    def walk(self, draft: Sequence[int], size: int) -> Any:
        if self.count == self.at:
            raise RuntimeError("walk")
        mask = torch.full((-(-size // 8),), 255, dtype=torch.uint8).numpy()
        return [mask] * (1 + len(draft)), len(draft)

    def take(self, tokens: Sequence[int]) -> tuple[int, bool]:
        self.count += len(tokens)
        if self.count > self.at:
            raise RuntimeError("take")
        return len(tokens), False


@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("at", [0, 1, 4])
def test_a_matcher_that_raises_ends_its_request(model: TwoTowerForCausalLM, at: int, rows: int) -> None:
    requests = requests_of(rows, seed=5)
    expected = run(LLM(model, rows=rows, length=LENGTH), requests)
    params = GenerationParams.of(mode="verified", max_new_tokens=9, draft_steps=1)
    found = run(LLM(model, rows=rows, length=LENGTH), [Request([5, 6], params, constraint=Choice(at)), *requests])
    assert found[0].finish_reason == "error"
    assert "RuntimeError" in found[0].error
    for one, other in zip(found[1:], expected, strict=True):
        assert_as_before(one, other)


def test_a_matcher_follows_its_text_after_a_fault(model: TwoTowerForCausalLM) -> None:
    """The grammar has read the tokens before the fault once."""
    params = GenerationParams.of(mode="ar", max_new_tokens=9)
    request = Request([5, 6], params, constraint=Choice(9))
    (expected,) = run(LLM(model, rows=1, length=LENGTH), [request])
    with fault(TwoTowerForCausalLM, "extend", Fault(TwoTowerForCausalLM.extend, at=5)):
        (found,) = run(LLM(model, rows=1, length=LENGTH), [request])
    assert found.finish_reason == "length"
    assert_as_before(found, expected)


@pytest.mark.parametrize("rows", [1, 16])
def test_a_policy_that_raises_ends_its_request(model: TwoTowerForCausalLM, rows: int) -> None:
    def rule(seen: Pass, value: Any) -> Verdict:
        raise RuntimeError("policy")

    requests = requests_of(rows, seed=6)
    expected = run(LLM(model, rows=rows, length=LENGTH), requests)
    register_policy("raising", rule, value_meaning="none", default=2.0)
    try:
        bad = Request([5, 6], GenerationParams.of(mode="diffusion", max_new_tokens=9, policy="raising"))
        found = run(LLM(model, rows=rows, length=LENGTH), [*requests, bad])
    finally:
        del POLICIES["raising"]
    assert found.pop().error == "RuntimeError: policy"
    for one, other in zip(found, expected, strict=True):
        assert_as_before(one, other)


@pytest.mark.parametrize("rows", [1, 16])
def test_a_callback_that_raises_ends_its_request(model: TwoTowerForCausalLM, rows: int) -> None:
    """The callback gets each block again, alone; in lockstep the blocks of the others then begin together again."""
    params = [GenerationParams.of(mode="diffusion", max_new_tokens=17, block_size=8, seed=i) for i in range(rows)]
    requests = [Request([5 + i, 7], own) for i, own in enumerate(params)]
    expected = [alone(model, request) for request in requests]
    bad = expected[rows // 2].tokens[3]

    def callback(step: int, steps: int, block: Any, **_: Any) -> None:
        if bool((block == bad).any()):
            raise ValueError("callback")

    options = EngineOptions(step_callback=callback)
    found = run(LLM(model, rows=rows, length=LENGTH, options=options), requests)
    assert found[rows // 2].error == "ValueError: callback"
    for one, other in zip(found, expected, strict=True):
        if one.finish_reason != "error":
            assert_as_before(one, other)
        else:
            assert bad in other.tokens
    calls = [0]

    def once(step: int, steps: int, block: Any, **_: Any) -> None:
        calls[0] += 1
        if calls[0] in (3, 30):
            raise ValueError("callback")

    found = run(LLM(model, rows=rows, length=LENGTH, options=EngineOptions(step_callback=once)), requests)
    for one, other in zip(found, expected, strict=True):
        if one.finish_reason != "error":
            assert_as_before(one, other)


def test_a_drafter_that_raises_ends_its_request(model: TwoTowerForCausalLM) -> None:
    def drafter(requests: Sequence[drafting.DraftRequest]) -> list[drafting.Draft]:
        if any(request.tokens[0] == 5 for request in requests):
            raise ValueError("drafter")
        return [drafting.Draft([7, 8]) for _ in requests]

    params = GenerationParams.of(mode="verified", max_new_tokens=9, draft_steps=1)
    requests = [Request([5 + i, 7], params) for i in range(4)]
    found = run(LLM(model, rows=4, length=LENGTH, options=EngineOptions(drafter=drafter)), requests)
    assert found[0].error == "ValueError: drafter"
    assert [one.tokens for one in found[1:]] == [alone(model, request).tokens for request in requests[1:]]


def test_a_request_that_cannot_start_ends_alone(model: TwoTowerForCausalLM) -> None:
    requests = requests_of(3, seed=7)
    expected = run(LLM(model, rows=3, length=LENGTH), requests)
    llm = LLM(model, rows=3, length=LENGTH)
    with fault(admitter, "resolve", Fault(admitter.resolve, at=2)):
        found = run(llm, requests)
    assert found[1].error == "ValueError: injected"
    assert_as_before(found[0], expected[0])
    assert_as_before(found[2], expected[2])


def test_log_probabilities_of_prompts_come_once(model: TwoTowerForCausalLM) -> None:
    params = GenerationParams.of(mode="ar", max_new_tokens=6)
    requests = [Request(list(range(5, 25)), params, logprobs=1, prompt_logprobs=True), Request([9], params)]
    expected = run(LLM(model, rows=2, length=LENGTH), requests)
    for at in range(1, 8):
        with fault(TwoTowerForCausalLM, "extend", Fault(TwoTowerForCausalLM.extend, at, late=True)):
            found = run(LLM(model, rows=2, length=LENGTH), requests)
        assert_as_before(found[0], expected[0])
        assert [one and one.token for one in found[0].prompt_logprobs] == [
            one and one.token for one in expected[0].prompt_logprobs
        ]


def test_requests_that_only_raise_together_end_well(model: TwoTowerForCausalLM) -> None:
    """Trials get longer, so that the texts are read again only a few times."""

    class Crowd(Fault):
        def poisoned(self, _: object, tokens: Any, *rest: Any, **options: Any) -> bool:
            self.calls += 1
            return len(tokens) > 2

    requests = requests_of(4, seed=8)
    expected = run(LLM(model, rows=4, length=LENGTH), requests)
    with fault(TwoTowerForCausalLM, "extend", Crowd(TwoTowerForCausalLM.extend)) as made:
        found = run(LLM(model, rows=4, length=LENGTH), requests)
    for one, other in zip(found, expected, strict=True):
        assert_as_before(one, other)
    assert made.calls < 400


# --- an engine that cannot continue ----------------------------------------------------------------------------------


def broken(model: TwoTowerForCausalLM) -> LLM:
    """An engine whose next pass raises, and whose state can then not be reset."""
    llm = LLM(model, rows=2, length=LENGTH)

    def dead(*_: object) -> None:
        raise RuntimeError("the device is gone")

    llm.core.state.drop_step_inputs = dead  # type: ignore[method-assign]
    return llm


def test_an_engine_that_cannot_continue_says_why(model: TwoTowerForCausalLM) -> None:
    llm = broken(model)
    llm.add_request(requests_of(1, seed=1)[0])
    reason = "could not be reset .RuntimeError: the device is gone. after ValueError: injected; restart the program"
    with (
        fault(TwoTowerForCausalLM, "extend", Fault(TwoTowerForCausalLM.extend, at=1)),
        pytest.raises(TwoTowerError, match=reason),
    ):
        llm.step()
    for again in (llm.step, lambda: llm.add_request(requests_of(1, seed=1)[0])):
        with pytest.raises(TwoTowerError, match="the device is gone"):
            again()
    llm.close()


def test_an_async_engine_that_cannot_continue_is_not_alive(model: TwoTowerForCausalLM) -> None:
    async def ask() -> None:
        with AsyncLLM(broken(model)) as engine:
            assert engine.failure == ""
            with pytest.raises(TwoTowerError, match="the engine has failed: the state could not be reset"):
                await engine.generate(requests_of(1, seed=1)[0])
            assert not engine.alive
            assert "the device is gone" in engine.failure

    with fault(TwoTowerForCausalLM, "extend", Fault(TwoTowerForCausalLM.extend, at=1)):
        asyncio.run(ask())


class Always(Fault):
    """Raises at every call."""

    def poisoned(self, *_: Any, **__: Any) -> bool:
        return True


def test_streams_go_on_beside_a_callback_that_raises(model: TwoTowerForCausalLM) -> None:
    """An exception in the callback of one request keeps no event from another request."""
    request = Request([5, 6], GenerationParams.of(mode="ar", max_new_tokens=6))

    async def ask() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)
        with AsyncLLM(LLM(model, rows=3, length=LENGTH)) as engine:
            cancels = [engine.subscribe(request, Always(print)), engine.subscribe(request, Always(print))]
            result = await asyncio.wait_for(engine.generate(request), 20)
            for cancel in cancels:
                cancel()
            assert result.tokens == alone(model, request).tokens
            assert engine.alive

    asyncio.run(ask())


# --- the engine's door -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [[1, 5000], [1, -5], ["x"], [1, 2.5], [True], [10**30], "ab", [], [None]])
def test_prompts_that_are_no_token_ids_are_refused(model: TwoTowerForCausalLM, prompt: Any) -> None:
    llm = LLM(model, rows=2, length=LENGTH)
    params = GenerationParams.of(mode="ar", max_new_tokens=3)
    running = llm.add_request(Request([5, 6], params))
    llm.step()
    with pytest.raises(ArgumentError, match="prompt"):
        llm.add_request(Request(prompt, params))
    events = [event for _ in range(4) for event in llm.step()]
    assert [event.result.finish_reason for event in events if event.result] == ["length"]
    assert {event.row for event in events} == {running}
