"""The engine: a request's result equals its result alone, with any other requests that run, arrive or are aborted."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from conftest import EVERY_KIND, build_random_model
from near_ties import is_near_tie
from torch import Tensor

from twotower import TwoTowerForCausalLM
from twotower.cache.replica import DeviceTransfer, Replica
from twotower.decoding.output import Generation, StepEvent
from twotower.decoding.params import GenerationParams
from twotower.decoding.unmasking import POLICIES, Pass, Verdict, register_policy
from twotower.engine import LLM, Request
from twotower.engine.context_step import group_by_width
from twotower.engine.engine_options import EngineOptions
from twotower.engine.generation import generate
from twotower.engine.scheduled import ScheduledTokens
from twotower.errors import ArgumentError, TwoTowerError

LENGTH = 160
KINDS: dict[str, Callable[[random.Random], dict[str, Any]]] = {
    "ar": lambda rng: {},
    "mock_ar": lambda rng: {},
    "diffusion": lambda rng: {
        "block_size": rng.choice([1, 4, 8, 16]),
        "steps_per_block": rng.choice([2, 5, 16]),
        "policy": rng.choice(sorted(POLICIES)),
        "confidence_threshold": rng.choice([0.1, 0.3]),
    },
    "verified": lambda rng: {
        "block_size": rng.choice([1, 4, 8, 16]),
        "draft_steps": rng.choice([None, 1, 2, 4]),
        "policy": rng.choice(sorted(POLICIES)),
        "acceptance": rng.choice([1.0, 1.0, 0.3]),
    },
}


@pytest.fixture(scope="module")
def model() -> TwoTowerForCausalLM:
    return build_random_model(EVERY_KIND, dtype=torch.float64)


def some_request(rng: random.Random, **given: Any) -> Request:
    """A random request: any mode, policy, length, sampling and end."""
    mode = given.pop("mode", None) or rng.choice(sorted(KINDS))
    temperature = rng.choice([0.0, 0.0, 0.7, 1.0])
    values = {
        "mode": mode,
        "max_new_tokens": rng.choice([0, 1, 5, 17, 33]),
        "seed": rng.randrange(1000),
        "temperature": temperature,
        "top_k": rng.choice([None, 10]),
        "top_p": rng.choice([None, 0.8]),
        "eos_token_id": rng.choice([None, 9]),
    }
    prompt = [rng.randrange(4, 64) for _ in range(rng.choice([1, 2, 7, 40, 90]))]
    return Request(prompt, GenerationParams.of(**(values | KINDS[mode](rng) | given)))


def alone(model: TwoTowerForCausalLM, request: Request) -> Generation:
    (output,) = generate(model, [list(request.prompt)], request.params)
    return output


def facts(output: Generation, counted: bool) -> tuple[Any, ...]:
    """A result without times, and without counts that depend on times."""
    what = (output.mode, output.tokens, output.finish_reason, output.prompt_tokens)
    steps = (output.committed_at, output.denoiser_passes, output.context_passes)
    drafts = (output.drafts, output.drafted, output.accepted, output.rejected)
    return what + (steps + drafts if counted else ())


def assert_as_alone(model: TwoTowerForCausalLM, request: Request, output: Generation) -> None:
    counted = not request.params.depends_on_timing
    expected = alone(model, request)
    assert facts(output, counted) == facts(expected, counted), request
    torch.testing.assert_close(torch.tensor(output.confidence), torch.tensor(expected.confidence), rtol=1e-5, atol=1e-6)


def drive(llm: LLM, requests: list[Request], rng: random.Random, aborted: float) -> dict[int, Generation]:
    """Adds requests while others run, and aborts a share of them at any time → outputs of the others by index."""
    numbers: dict[int, int] = {}
    outputs: dict[int, Generation] = {}
    coming = list(range(len(requests)))
    while coming or llm.has_work:
        while coming and (not llm.has_work or rng.random() < 0.4):
            place = coming.pop(0)
            numbers[llm.add_request(requests[place])] = place
        for event in llm.step():
            if event.result is not None:
                outputs[numbers[event.row]] = event.result
        live = [number for number, place in numbers.items() if place not in outputs]
        if live and rng.random() < aborted:
            number = rng.choice(live)
            llm.abort(number)
            del numbers[number]
    assert sorted(llm.core.scheduler.free) == list(range(llm.core.state.rows))
    assert not llm.core.scheduler.running
    return outputs


@pytest.mark.parametrize("rows", [1, 3, 16])
def test_every_request_equals_its_result_alone(model: TwoTowerForCausalLM, rows: int) -> None:
    rng = random.Random(rows)
    requests = [some_request(rng) for _ in range(40)]
    outputs = LLM(model, rows=rows, length=LENGTH).generate(requests)
    for request, output in zip(requests, outputs, strict=True):
        assert_as_alone(model, request, output)


def test_requests_come_and_go(model: TwoTowerForCausalLM) -> None:
    rng = random.Random(5)
    requests = [some_request(rng) for _ in range(60)]
    outputs = drive(LLM(model, rows=5, length=LENGTH), requests, rng, aborted=0.1)
    assert 20 < len(outputs) < 60
    for place, output in outputs.items():
        assert_as_alone(model, requests[place], output)


def test_a_small_window_of_prompts_in_pieces(model: TwoTowerForCausalLM) -> None:
    """Prompts are read in chunks while other requests run."""
    rng = random.Random(8)
    requests = [some_request(rng, max_new_tokens=12) for _ in range(16)]
    with patch("twotower.engine.core.PROMPT_CHUNK", 16):
        llm = LLM(model, rows=4, length=LENGTH)
        for request, output in zip(requests, llm.generate(requests), strict=True):
            assert_as_alone(model, request, output)


def test_two_devices(model: TwoTowerForCausalLM) -> None:
    """The denoiser reads a replica of the pool, as on a second device."""
    rng = random.Random(13)
    requests = [some_request(rng) for _ in range(30)]
    with patch.object(model, "transfer", DeviceTransfer()):
        llm = LLM(model, rows=4, length=LENGTH)
        assert isinstance(llm.core.reader, Replica)
        outputs = drive(llm, requests, rng, aborted=0.05)
    for place, output in outputs.items():
        assert_as_alone(model, requests[place], output)


# --- who shares a pass ----------------------------------------------------------------------------------------------


def passes(model: TwoTowerForCausalLM, run: Callable[[], object]) -> tuple[int, int]:
    """Calls of the context tower and of the denoiser while run() runs."""
    with (
        patch.object(model, "extend", wraps=model.extend) as extend,
        patch.object(model, "denoise", wraps=model.denoise) as denoise,
    ):
        run()
    return extend.call_count, denoise.call_count


@pytest.mark.parametrize("mode", sorted(KINDS))
def test_rows_of_one_kind_take_no_more_passes_than_one(model: TwoTowerForCausalLM, mode: str) -> None:
    params = GenerationParams.of(
        mode=mode, max_new_tokens=32, draft_steps=1, steps_per_block=4, policy="top-k", policy_value=4
    )
    requests = [Request([5, 6, 7, 8], params)] * 6
    one = passes(model, lambda: LLM(model, rows=6, length=64).generate(requests[:1]))
    six = passes(model, lambda: LLM(model, rows=6, length=64).generate(requests))
    assert six == one


def test_a_full_pool_is_not_gathered(model: TwoTowerForCausalLM) -> None:
    """If all slots take part, a pass reads the state without a gather."""
    params = GenerationParams.of(mode="verified", max_new_tokens=20, draft_steps=1)
    llm = LLM(model, rows=3, length=64)
    with patch.object(llm.core.state, "view", wraps=llm.core.state.view) as view:
        outputs = llm.generate([Request([5, 6, 7], params)] * 3)
    assert len({tuple(output.tokens) for output in outputs}) == 1
    asked = [call.args[0] if call.args else None for call in view.call_args_list]
    assert asked.count(None) == len(asked) > 4


def test_no_row_waits_for_a_slower_one(model: TwoTowerForCausalLM) -> None:
    """A row of 2 passes per block ends as early as alone, beside a row of 16. The next step fills a free slot."""
    quick = Request([5, 6], GenerationParams.of(max_new_tokens=32, steps_per_block=2, policy="top-k", policy_value=8))
    slow = Request([7, 8], GenerationParams.of(max_new_tokens=32, steps_per_block=16, policy="top-k", policy_value=1))

    def steps(*requests: Request) -> list[int]:
        llm = LLM(model, rows=2, length=64)
        order = [llm.add_request(request) for request in requests]
        ended: dict[int, int] = {}
        at = 0
        while llm.has_work:
            at += 1
            ended |= {event.row: at for event in llm.step() if event.result is not None}
        return [ended[number] for number in order]

    (own,) = steps(quick)
    together = steps(slow, quick, quick)
    assert together[1] == own
    assert together[2] == 2 * own
    assert together[0] == steps(slow)[0]


def test_first_come_first_served(model: TwoTowerForCausalLM) -> None:
    rng = random.Random(3)
    llm = LLM(model, rows=3, length=LENGTH)
    numbers = [llm.add_request(some_request(rng, max_new_tokens=rng.choice([1, 20]))) for _ in range(12)]
    begun: list[int] = []
    while llm.has_work:
        llm.step()
        begun += [number for number in llm.core.scheduler.running if number not in begun]
    assert begun == sorted(begun)
    assert set(begun) <= set(numbers)


def test_a_pass_is_padded_little() -> None:
    def widths(*given: int) -> list[list[int]]:
        rows = [SimpleNamespace(slot=slot) for slot in range(len(given))]
        scheduled = [ScheduledTokens(row, [0] * width, sampled=False) for row, width in zip(rows, given, strict=True)]  # type: ignore[arg-type]
        groups = group_by_width(scheduled)
        assert all(
            [work.sequence.slot for work in group] == sorted(work.sequence.slot for work in group) for group in groups
        )
        return [sorted(len(work.tokens) for work in group) for group in groups]

    assert widths(16, 1, 1) == [[1, 1, 16]]  # enough tokens to fill a pass
    assert widths(*[1] * 20, *[16] * 4) == [[1] * 20, [16] * 4]
    assert widths(512, 16, 16, 1) == [[1, 16, 16], [512]]
    assert widths(*[12] * 9, *[16] * 9) == [[12] * 9 + [16] * 9]
    assert widths() == []


# --- the ways in and out --------------------------------------------------------------------------------------------


def test_a_stream_beside_others(model: TwoTowerForCausalLM) -> None:
    rng = random.Random(1)
    llm = LLM(model, rows=4, length=LENGTH)
    others = [some_request(rng, max_new_tokens=33) for _ in range(3)]
    numbers = [llm.add_request(request) for request in others]
    request = some_request(rng, mode="diffusion", max_new_tokens=33, eos_token_id=None)
    events = list(llm.stream(request))
    assert [token for event in events for token in event.tokens] == alone(model, request).tokens
    assert [event.block for event in events] == list(range(len(events)))
    assert events[-1].result is not None
    outputs: dict[int, Generation] = {}
    written: dict[int, list[int]] = {}
    while llm.has_work:
        for event in llm.step():
            written.setdefault(event.row, []).extend(event.tokens)
            if event.result is not None:
                outputs[event.row] = event.result
    for number, other in zip(numbers, others, strict=True):  # none of their events was lost
        assert_as_alone(model, other, outputs[number])
        assert written[number] == outputs[number].tokens


def test_streams_side_by_side(model: TwoTowerForCausalLM) -> None:
    """Each stream has its own events, whichever call ran the step."""
    params = GenerationParams.of(mode="ar", max_new_tokens=9)
    requests = [Request([5, 6], params), Request([7, 8], params), Request([9], params)]
    expected = [result.tokens for result in LLM(model, rows=3, length=LENGTH).generate(requests)]
    llm = LLM(model, rows=3, length=LENGTH)
    streams = [llm.stream(request) for request in requests[:2]]
    written: list[list[int]] = [list(next(stream).tokens) for stream in streams]
    (third,) = llm.generate(requests[2:])
    for events in zip(*streams, strict=True):
        for tokens, event in zip(written, events, strict=True):
            tokens += event.tokens
    assert [*written, third.tokens] == expected
    assert not llm.has_work


def test_invalid_requests(model: TwoTowerForCausalLM) -> None:
    llm: Any = LLM(model, rows=1, length=LENGTH)
    for no_request in ("text", None, [5, 6]):
        with pytest.raises(ArgumentError, match="give a Request"):
            llm.generate([no_request])
    no_params: Any = "ar"
    with pytest.raises(ArgumentError, match="params is a str; give GenerationParams"):
        Request([5, 6], no_params)


@pytest.mark.parametrize("end", ["abort", "close"])
def test_a_request_aborted_while_somebody_waits_for_it(model: TwoTowerForCausalLM, end: str) -> None:
    """Its stream ends, and `generate` raises; neither waits for ever."""
    llm = LLM(model, rows=2, length=LENGTH)
    request = Request([5, 6], GenerationParams.of(mode="ar", max_new_tokens=50))
    events = llm.stream(request)
    next(events)
    llm.abort(0)
    assert list(events) == []
    short = Request([5, 6], GenerationParams.of(mode="ar", max_new_tokens=5))
    with pytest.raises(TwoTowerError, match="aborted"):
        llm.generate([short, request], lambda ended: llm.abort(2) if end == "abort" else llm.close())


def test_an_abandoned_stream_frees_its_slot(model: TwoTowerForCausalLM) -> None:
    llm = LLM(model, rows=1, length=LENGTH)
    events = llm.stream(Request([5, 6], GenerationParams.of(mode="ar", max_new_tokens=50)))
    next(events)
    events.close()
    assert not llm.has_work
    assert llm.core.scheduler.free == [0]


def test_an_aborted_request_has_no_events(model: TwoTowerForCausalLM) -> None:
    """Nor events that occurred while another request was streamed."""
    llm = LLM(model, rows=2, length=LENGTH)
    number = llm.add_request(Request([5, 6], GenerationParams.of(mode="ar", max_new_tokens=40)))
    list(llm.stream(Request([7, 8], GenerationParams.of(mode="ar", max_new_tokens=5))))
    assert llm.has_work
    llm.abort(number)
    assert not llm.has_work
    assert llm.step() == []


@pytest.mark.parametrize("given", [{"rows": 0}, {"length": 0}, {"block_size": -1}, {"rows": None}, {"rows": 1.5}])
def test_an_engine_of_nothing(model: TwoTowerForCausalLM, given: dict[str, Any]) -> None:
    (name,) = given
    with pytest.raises(ArgumentError, match=f"{name} is .*at least 1"):
        LLM(model, **given)


def test_a_model_without_denoiser_runs_ar() -> None:
    lone = build_random_model("M*", dtype=torch.float64)
    lone.denoiser = lone.time = None
    request = Request([5, 6], GenerationParams.of(mode="ar", max_new_tokens=9))
    (output,) = LLM(lone, rows=2, length=32).generate([request])
    assert output.tokens == alone(lone, request).tokens
    with pytest.raises(ArgumentError, match="only the context tower is loaded"):
        LLM(lone, rows=2, length=64).add_request(Request([5], GenerationParams.of(max_new_tokens=9)))


@pytest.mark.parametrize(
    ("prompt", "given", "message"),
    [
        ([5] * 40, {"max_new_tokens": 30}, "a prompt of 40 tokens plus max_new_tokens 30 is longer than the 64 tokens"),
        ([5], {"max_new_tokens": 30, "block_size": 32}, "block_size is 32; this engine's blocks have at most 16"),
        ([], {"max_new_tokens": 5}, "the prompt is empty"),
        ([5], {"max_new_tokens": 5, "stop": ["x"]}, "stop strings need a tokenizer"),
        ([5], {"max_new_tokens": 5, "eos_token_id": 999}, "eos_token_id has 999"),
    ],
)
def test_what_can_never_run_is_refused_at_once(
    model: TwoTowerForCausalLM, prompt: list[int], given: dict[str, Any], message: str
) -> None:
    llm = LLM(model, rows=2, length=64)
    with pytest.raises(ArgumentError) as error:
        llm.add_request(Request(prompt, GenerationParams.of(**given)))
    assert message in str(error.value)
    assert not llm.has_work


@contextmanager
def moody_policy() -> Iterator[None]:
    """A policy "moody" which raises in a block's later passes where its policy value is above 1."""

    def moody(seen: Pass, value: Tensor) -> Verdict:
        if (value > 1).any() and (seen.step > 1).any():
            raise ZeroDivisionError("in a bad mood")
        return POLICIES["threshold"].rule(seen, value)

    register_policy("moody", moody, value_meaning="mood", default=0.5)
    try:
        yield
    finally:
        del POLICIES["moody"]


def test_a_policy_that_raises_ends_its_own_request_only(model: TwoTowerForCausalLM) -> None:
    """Other rows, with other policies or another value of this policy, continue."""
    with moody_policy():
        asked = {"max_new_tokens": 20, "block_size": 8, "steps_per_block": 8}
        policies = [("moody", 0.9), ("moody", 2.0), ("threshold", 0.9), ("moody", 0.8)]
        requests = [
            Request([5, 6], GenerationParams.of(policy=name, policy_value=policy_value, **asked))
            for name, policy_value in policies
        ]
        llm = LLM(model, rows=4, length=64)
        outputs = llm.generate(requests)
        assert [output.finish_reason for output in outputs] == ["length", "error", "length", "length"]
        assert outputs[1].error == "ZeroDivisionError: in a bad mood"
        assert outputs[1].tokens == []
        for place in (0, 2, 3):
            assert_as_alone(model, requests[place], outputs[place])
        assert len(llm.core.scheduler.free) == 4


def test_auto_chooses_and_says_why(model: TwoTowerForCausalLM) -> None:
    requests = [Request([5, 6, 7], GenerationParams.of(mode="auto", max_new_tokens=20))] * 3
    outputs = LLM(model, rows=2, length=64).generate(requests)
    assert all(output.mode in KINDS and output.mode_reason for output in outputs)


def test_the_state_does_not_grow(model: TwoTowerForCausalLM) -> None:
    rng = random.Random(2)
    llm = LLM(model, rows=3, length=LENGTH)

    def held() -> int:
        return llm.core.state.nbytes

    drive(llm, [some_request(rng) for _ in range(10)], rng, aborted=0.3)
    llm.core.state.commit_state()
    before, capacity = held(), llm.core.state.capacity
    drive(llm, [some_request(rng) for _ in range(80)], rng, aborted=0.3)
    llm.core.state.commit_state()
    assert held() == before
    assert llm.core.state.capacity == capacity
    assert not llm.core.rounds.opening


# --- being watched --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["diffusion", "verified"])
def test_a_watched_request_has_a_step_event_after_every_pass(model: TwoTowerForCausalLM, mode: str) -> None:
    """The last event of a block equals the committed or verified block, and watching does not change the result."""
    engine = LLM(model, rows=3, length=160)
    params = GenerationParams.of(mode=mode, max_new_tokens=30, seed=3, block_size=6, draft_steps=3)
    plain = Request([5, 6, 7], params)
    looks: list[StepEvent] = []
    passes, ahead = 0, int(mode == "verified")  # in verified decoding the first position is the token before the draft
    for event in engine.stream(replace(plain, watched=True)):
        if isinstance(event, StepEvent):
            assert event.step == len(looks)
            looks.append(event)
            continue
        for before, after in pairwise(looks):
            for i in range(6):
                if not before.masked[i]:
                    assert not after.masked[i]
                    assert (before.tokens[i], before.confidence[i]) == (after.tokens[i], after.confidence[i])
        if looks:
            assert not any(looks[-1].masked)
            assert looks[-1].start == event.start - ahead
            drafted = list(event.draft) if ahead else event.tokens
            assert looks[-1].tokens[ahead:][: len(drafted)] == drafted
        passes += len(looks)
        looks.clear()
        result = event.result
    assert result is not None
    assert passes == result.denoiser_passes
    assert result.tokens == alone(model, plain).tokens
    assert not any(isinstance(event, StepEvent) for event in engine.stream(plain))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_thousand_requests_as_alone() -> None:
    """Equal in float64; in fp32 up to counted near ties; in bf16 the rate is printed. Some requests are aborted."""
    exact = build_random_model(EVERY_KIND, dtype=torch.float64)
    for dtype, count in ((torch.float64, 1100), (torch.float32, 1100), (torch.bfloat16, 200)):
        model = build_random_model(EVERY_KIND, dtype=torch.float64).to(dtype)
        rng = random.Random(11)
        requests = [some_request(rng) for _ in range(count)]
        outputs = drive(LLM(model, rows=16, length=LENGTH), requests, rng, aborted=0.02)
        differ = [place for place, output in outputs.items() if output.tokens != alone(model, requests[place]).tokens]
        print(f"{dtype}: {len(differ)} of {len(outputs)} requests differ from what they write alone")
        assert count < 1000 or len(outputs) >= 1000
        if dtype == torch.float64:
            assert not differ
        elif dtype == torch.float32:
            for request in [requests[place] for place in differ]:
                assert is_near_tie(exact, lambda m, request=request: alone(m, request).tokens), request


# --- in lockstep ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("apart", [False, True], ids=["one device", "two devices"])
@pytest.mark.parametrize("mode", ["diffusion", "verified"])
def test_the_callback_of_a_block_follows_the_events_of_the_block_before(
    model: TwoTowerForCausalLM, mode: str, apart: bool
) -> None:
    """A display of blocks receives the text of a block before the next block begins."""
    told: list[tuple[str, int]] = []

    def callback(step: int, steps: int, block: Tensor, t: Any, logits: Tensor | None, block_idx: int) -> None:
        told.append(("pass", block_idx))

    fixed = {"draft_steps": 2} if mode == "verified" else {}
    with patch.object(model, "transfer", DeviceTransfer() if apart else None):
        prompts = [[5, 6, 7], [8], [9] * 40]
        events = model.stream(prompts, mode, max_new_tokens=24, block_size=8, step_callback=callback, **fixed)
        for event in events:
            told.append(("event", event.block))
    for place, (what, block) in enumerate(told):
        if what == "pass" and block:
            assert told[:place].count(("event", block - 1)) >= 1
            assert ("event", block) not in told[:place]


SLOW_LOCKSTEP = [(1, 0.05), (2, 0.0), (5, 0.05)]


@pytest.mark.parametrize(
    ("rows", "aborted"),
    [(1, 0.0), (2, 0.05), (5, 0.0), *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_LOCKSTEP)],
)
@pytest.mark.timeout(60)
def test_lockstep_with_any_requests(model: TwoTowerForCausalLM, rows: int, aborted: float) -> None:
    """Requests of all modes and sizes arrive and end at any time. None waits for ever, and the texts are equal."""
    rng = random.Random(rows)
    requests = [some_request(rng, draft_steps=2, policy="threshold") for _ in range(40)]
    passes: list[int] = []

    def callback(step: int, steps: int, block: Tensor, t: Any, logits: Tensor | None, block_idx: int) -> None:
        passes.append(step)

    options = EngineOptions(step_callback=callback, prompt_budget=16)
    outputs = drive(LLM(model, rows=rows, length=LENGTH, options=options), requests, rng, aborted)
    assert passes
    assert len(outputs) > 15
    for place, output in outputs.items():
        expected = alone(model, requests[place])
        assert (output.tokens, output.finish_reason) == (expected.tokens, expected.finish_reason)
