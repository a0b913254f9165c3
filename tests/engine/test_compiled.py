"""Passes as one compiled call give what the engine's passes give: tokens, events, counts and states, bit for bit."""

from __future__ import annotations

import asyncio
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from conftest import EVERY_KIND, build_random_model
from test_engine import LENGTH, some_request
from test_recovery import Fault, fault
from tiny_backbones import SHAPES, slow_but, two_tower

from twotower import LLM, AsyncLLM, Request, TwoTowerForCausalLM
from twotower.checkpoint.quantize import quantize_
from twotower.decoding.output import BlockEvent, Event, Generation
from twotower.decoding.params import GenerationParams
from twotower.denoiser_fields import DenoiserConfig, DraftHeadConfig
from twotower.engine.compiled import MOST_STEPS_BEFORE_STOP
from twotower.engine.generation import generate
from twotower.ops.registry import select
from twotower.runners import fused_cpu
from twotower.runners.decode_pass import DecodePass

BURST = 1e9  # seconds: calls of as many passes as possible
KERNELS = select("argmax", torch.device("cpu"), torch.float32, differentiable=False).name == "native"
needs_kernels = pytest.mark.skipif(not KERNELS, reason="the C++ kernels are not used here")


class Words:
    """A tokenizer with a word a token."""

    is_fast = True

    def decode(self, tokens: list[int], **_: Any) -> str:
        return "".join(f" w{token}" for token in tokens)


@contextmanager
def compiled(on: bool = True) -> Iterator[dict[str, int]]:
    """Switches compiled passes on or off → the number of calls of each kind."""
    calls = {"ar_steps": 0, "read": 0, "fill_blocks": 0, "one_pass_rounds": 0}

    def counted(name: str) -> Callable[..., Any]:
        real = getattr(DecodePass, name)

        def call(*arguments: Any) -> Any:
            calls[name] += 1
            return real(*arguments)

        return call

    with patch.multiple(DecodePass, **{name: counted(name) for name in calls}):
        if on:
            yield calls
        else:
            with patch.object(fused_cpu, "kernels_selected", lambda _: False):
                yield calls


def run(llm: LLM, requests: list[Request], seconds: float) -> list[Event]:
    for request in requests:
        llm.add_request(request)
    events = []
    while llm.has_work:
        events += llm.step(seconds)
    return events


def facts(event: Event) -> tuple[object, ...]:
    """An event without times."""
    if not isinstance(event, BlockEvent):
        return (event,)
    result = event.result
    counts: tuple[object, ...] = ()
    if result is not None:
        passes = result.denoiser_passes, result.context_passes, result.cached_tokens
        drafts = result.drafts, result.drafted, result.accepted, result.rejected
        counts = result.tokens, result.text, result.finish_reason, result.error, result.confidence, *passes, *drafts
    own = event.row, event.block, event.start, event.tokens, event.committed_at, event.confidence, event.text
    return *own, event.draft, event.logprobs, counts


def assert_same(found: list[Event], expected: list[Event], requests: list[Request]) -> None:
    """The same events of each row; confidences under relaxed acceptance within rounding."""
    own, other = by_row(found), by_row(expected)
    assert own.keys() == other.keys()
    for row, request in enumerate(requests):
        if request.params.acceptance < 1:
            assert is_close(own[row], other[row]), row
        else:
            assert own[row] == other[row]


def is_close(one: object, other: object) -> bool:
    """Whether nested values are equal, and floats within 1e-5."""
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(is_close, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-5)
    return one == other


def by_row(events: list[Event]) -> dict[int, list[tuple[object, ...]]]:
    rows: dict[int, list[tuple[object, ...]]] = {}
    for event in events:
        rows.setdefault(event.row, []).append(facts(event))
    return rows


def texts_of(llm: LLM) -> list[torch.Tensor]:
    """What the engine's state holds: lengths, Mamba states, and the keys and values of the texts."""
    state = llm.core.state
    with torch.no_grad():
        state.commit_state()
    rows = [state.snapshot_row(row, 0, int(length)) for row, length in enumerate(state.lengths) if length]
    return [part for row in rows for pair in [*row.states, *(k for keys in row.keys for k in keys)] for part in pair]


def mixed(count: int, seed: int, **given: Any) -> list[Request]:
    """Requests of every mode and kind; most of them can run compiled."""
    rng, requests = random.Random(seed), []
    for place in range(count):
        mode = given.get("mode") or ("ar", "diffusion", "verified", "mock_ar")[place % 4]
        own: dict[str, Any] = {"draft_steps": rng.choice([0, 1, 2])} if mode == "verified" else {}
        own["temperature"] = 0.7 if rng.random() < 0.2 else 0.0
        if mode in ("diffusion", "verified"):
            own |= {"policy": rng.choice(["threshold", "threshold", "threshold", "factor"]), "policy_value": 0.6}
        own["stop"] = rng.choice([None, None, "w7", "w1"])
        own["acceptance"] = rng.choice([1.0, 1.0, 0.5]) if mode == "verified" else 1.0
        request = some_request(rng, **(own | {"mode": mode, "max_new_tokens": rng.choice([1, 9, 24])} | given))
        rare = rng.random()
        logprobs = 1 if rare < 0.1 else None
        requests.append(Request(request.prompt, request.params, logprobs=logprobs, watched=0.1 < rare < 0.2))
    return requests


@pytest.fixture(scope="module")
def model() -> TwoTowerForCausalLM:
    made = build_random_model(EVERY_KIND)
    made.tokenizer = Words()
    return made


@needs_kernels
@pytest.mark.code_path
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_mixed_batches_give_the_same_events(model: TwoTowerForCausalLM, dtype: torch.dtype) -> None:
    own = build_random_model(EVERY_KIND, dtype=dtype) if dtype != torch.float32 else model
    own.tokenizer = Words()
    totals: Counter[str] = Counter()
    for seed, rows in enumerate((1, 3, 8)):
        requests = mixed(12, seed)
        with compiled(on=False) as calls:
            expected = run(LLM(own, rows=rows, length=LENGTH), requests, 0.0)
        assert not any(calls.values())
        for seconds in (0.0, BURST):
            with compiled() as calls:
                found = run(LLM(own, rows=rows, length=LENGTH), requests, seconds)
            totals.update(calls)
            assert_same(found, expected, requests)
            if not seconds:  # in the same order
                assert is_close([facts(event) for event in found], [facts(event) for event in expected])
    assert all(totals[name] > 2 for name in ("ar_steps", "read", "fill_blocks")), totals


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("draft_rank", [None, 5], ids=["plain", "draft head"])
def test_models_with_adapters_give_the_same_events(dtype: torch.dtype, draft_rank: int | None) -> None:
    own = two_tower("nemotron_h", dtype, rank=3, draft_rank=draft_rank)
    own.tokenizer = Words()
    drafted = passes = tokens = rounds = relaxed = 0
    for seed, rows in enumerate((1, 3, 8)):
        same: dict[str, Any] = {"policy": "threshold", "policy_value": 0.05}
        requests = mixed(12, seed, **same)
        long: dict[str, Any] = {"max_new_tokens": 24, "stop": None, "acceptance": 1.0} | same
        requests += mixed(3, seed, mode="verified", draft_steps=1, block_size=6, **long)
        requests += mixed(3, seed, mode="verified", draft_steps=1, block_size=6, temperature=0.0, **long)
        requests += [Request(one.prompt, replace(one.params, acceptance=0.05)) for one in requests[-3:]]
        requests += mixed(3, seed, mode="diffusion", block_size=16, deterministic=not seed, **long)
        with compiled(on=False) as calls:
            expected = run(LLM(own, rows=rows, length=LENGTH), requests, 0.0)
        assert not any(calls.values())
        for seconds in (0.0, BURST):
            with compiled() as calls:
                found = run(LLM(own, rows=rows, length=LENGTH), requests, seconds)
            assert_same(found, expected, requests)
            assert calls["read"]
            rounds += calls["one_pass_rounds"]
        ended = [event for event in found if isinstance(event, BlockEvent)]
        texts = {event.row: event.result.tokens for event in ended if event.result is not None}
        results = [event.result for event in ended if event.result is not None]
        drafted += sum(result.drafted for result in results)
        passes += sum(result.context_passes for result in results)
        tokens += sum(len(result.tokens) for result in results)
        relaxed += sum(texts[row] != texts[row + 3] for row in range(15, 18))
    assert drafted
    assert relaxed
    assert passes < tokens
    assert rounds


BLOCKS = {
    "shift": DenoiserConfig(prediction_shift=1),
    "prefix": DenoiserConfig(block_attention="prefix_causal"),
    "shift-prefix": DenoiserConfig(prediction_shift=1, block_attention="prefix_causal"),
    "first": DenoiserConfig(first_from_ar=True),
    "everywhere": DenoiserConfig.with_adapters(3, "everywhere"),
}
BLOCKS["head"] = DenoiserConfig(draft_head=DraftHeadConfig(5))
BLOCKS |= {
    f"{name}-head": replace(BLOCKS[name], draft_head=DraftHeadConfig(5)) for name in ("shift-prefix", "everywhere")
}


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("choice", BLOCKS)
def test_other_blocks_give_the_same_events(choice: str, dtype: torch.dtype) -> None:
    """Blocks of towers, and the commits of adapters that act everywhere, are compiled calls."""
    own = two_tower("nemotron_h", dtype, denoiser=BLOCKS[choice])
    own.tokenizer = Words()
    requests = mixed(12, 3, **({"policy": "threshold", "policy_value": 0.1} if "head" in choice else {}))
    with compiled(on=False):
        expected = run(LLM(own, rows=4, length=LENGTH), requests, 0.0)
    for seconds in (0.0, BURST):
        with compiled() as calls:
            found = run(LLM(own, rows=4, length=LENGTH), requests, seconds)
        assert_same(found, expected, requests)
        assert calls["read"]
        assert bool(calls["fill_blocks"]) == ("everywhere" not in choice)


@needs_kernels
@pytest.mark.parametrize("choice", ["shift", "prefix", "shift-prefix"])
def test_blocks_and_prompts_of_every_size_give_the_same_events(choice: str) -> None:
    own = two_tower("nemotron_h", torch.float32, denoiser=BLOCKS[choice])
    rng, requests = random.Random(choice), []
    for size in range(1, 33):
        for mode in ("diffusion", "verified"):
            options: dict[str, Any] = {"draft_steps": 2}
            if mode == "diffusion":
                options = {"steps_per_block": rng.choice((1, 3, 16)), "confidence_threshold": rng.choice((0.05, 0.6))}
            new = rng.choice((1, size, size + 2))
            params = GenerationParams.of(mode=mode, max_new_tokens=new, block_size=size, **options)
            length = rng.choice((1, 2, max(size - 1, 1), size, size + 1))
            requests.append(Request([rng.randrange(4, 60) for _ in range(length)], params))
    with compiled(on=False):
        expected = run(LLM(own, rows=1, length=LENGTH, block_size=32), requests, 0.0)
    llm = LLM(own, rows=1, length=LENGTH, block_size=32)
    with compiled() as calls:
        found = run(llm, requests, 0.0)
    assert by_row(found) == by_row(expected)
    assert calls["fill_blocks"] == llm.denoiser_passes > 200


@needs_kernels
@pytest.mark.parametrize("mode", ["ar", "diffusion", "verified"])
@pytest.mark.parametrize("rows", [1, 4])
def test_batches_of_one_mode_give_the_same_events_and_passes(model: TwoTowerForCausalLM, mode: str, rows: int) -> None:
    requests = mixed(rows + 3, 7, mode=mode, temperature=0.0, policy="threshold", acceptance=1.0, stop=None)
    requests = [Request(request.prompt, request.params) for request in requests]
    with compiled(on=False):
        plain = LLM(model, rows=rows, length=LENGTH)
        expected = run(plain, requests, 0.0)
    with compiled() as calls:
        llm = LLM(model, rows=rows, length=LENGTH)
        found = run(llm, requests, BURST)
    assert by_row(found) == by_row(expected)
    assert llm.denoiser_passes == plain.denoiser_passes
    passes = sum(event.result.context_passes for event in found if event.result is not None)
    if mode == "ar":
        assert calls["ar_steps"] < passes / 2
    for one, other in zip(texts_of(llm), texts_of(plain), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def tokens_of(events: list[tuple[Any, ...]]) -> list[int]:
    """The tokens of a row's events without times; each token comes once."""
    return [token for event in events if len(event) > 1 for token in event[3]]


async def answers(llm: LLM, requests: list[Request]) -> list[Generation]:
    with AsyncLLM(llm) as engine:
        return list(await asyncio.gather(*map(engine.generate, requests)))


@needs_kernels
def test_every_way_to_run_requests_gives_the_same_results(model: TwoTowerForCausalLM) -> None:
    requests = mixed(9, 3, temperature=0.0)
    with compiled(on=False):
        expected = LLM(model, rows=3, length=LENGTH).generate(requests)
        params = GenerationParams.of(mode="ar", max_new_tokens=40, stop=("w7",))
        one = generate(model, [[5, 6, 7]], params)
    with compiled() as calls:
        found = LLM(model, rows=3, length=LENGTH).generate(requests)
        served = asyncio.run(answers(LLM(model, rows=3, length=LENGTH), requests))
        streamed = [list(LLM(model, rows=3, length=LENGTH).stream(request)) for request in requests]
        alone = generate(model, [[5, 6, 7]], params)
        events = list(model.stream([[5, 6, 7]], "ar", max_new_tokens=40, stop=("w7",)))
    assert all(count for name, count in calls.items() if name != "one_pass_rounds")
    fields = ("tokens", "text", "finish_reason", "confidence", "committed_at", "context_passes", "denoiser_passes")
    for results in (found, served, [events[-1].result for events in streamed]):
        for result, other in zip(results, expected, strict=True):
            assert [getattr(result, name) for name in fields] == [getattr(other, name) for name in fields]
    assert [getattr(alone[0], name) for name in fields] == [getattr(one[0], name) for name in fields]
    assert "".join(event.text for event in events) == one[0].text
    assert [token for event in events for token in event.tokens] == one[0].tokens


@needs_kernels
def test_a_call_ends_with_a_row(model: TwoTowerForCausalLM) -> None:
    """At EOS, at the length, and soon after a stop string; waiting requests then begin."""
    params = GenerationParams.of(mode="ar", max_new_tokens=60)
    tokens = LLM(model, rows=1, length=LENGTH).generate([Request([5, 6, 7], params)])[0].tokens
    eos = tokens[25]
    at = tokens.index(eos) + 1
    ends: list[dict[str, Any]] = [{"eos_token_id": eos}, {"stop": f"w{eos}"}, {"max_new_tokens": at}]
    for end in ends:
        own = GenerationParams.of(**({"mode": "ar", "max_new_tokens": 60} | end))
        llm = LLM(model, rows=1, length=LENGTH)
        first, second = llm.add_request(Request([5, 6, 7], own)), llm.add_request(Request([5, 6, 7], own))
        steps: list[list[Event]] = []
        with compiled() as calls:
            while llm.has_work:
                steps.append(llm.step(BURST))
        results = {event.row: event.result for events in steps for event in events if event.result is not None}
        assert [results[row].tokens for row in (first, second)] == [tokens[:at]] * 2
        assert [results[row].context_passes for row in (first, second)] == [at] * 2
        assert calls["ar_steps"] <= 2 * (2 + at // MOST_STEPS_BEFORE_STOP if "stop" in end else 2)
        last = next(events for events in steps if any(event.result is not None for event in events))
        assert {event.row for event in last} == {first}


@needs_kernels
def test_without_time_a_step_is_one_pass(model: TwoTowerForCausalLM) -> None:
    llm = LLM(model, rows=2, length=LENGTH)
    for mode in ("ar", "diffusion"):
        llm.add_request(Request([5, 6, 7], GenerationParams.of(mode=mode, max_new_tokens=20)))
    passes = llm.denoiser_passes
    while llm.has_work:
        events = llm.step()
        assert llm.denoiser_passes - passes <= 1
        assert len({event.row for event in events}) == len(events)
        passes = llm.denoiser_passes


@needs_kernels
@pytest.mark.parametrize("mode", ["ar", "diffusion", "verified"])
def test_logits_that_are_not_finite_end_their_request(mode: str) -> None:
    own = build_random_model(EVERY_KIND)
    denoiser = own.denoiser
    assert denoiser is not None
    with torch.no_grad():
        for tower in (own.context,) if mode == "ar" else (denoiser,):
            tower.head.weight[11] = torch.nan
    requests = [Request([5, 6, 7], GenerationParams.of(mode=mode, max_new_tokens=20)) for _ in range(2)]
    if mode == "verified":
        requests = [replace(r, params=replace(r.params, draft_steps=1)) for r in requests]
    with compiled(on=False):
        expected = by_row(run(LLM(own, rows=2, length=LENGTH), requests, 0.0))
    found = by_row(run(LLM(own, rows=2, length=LENGTH), requests, BURST))
    assert repr(found) == repr(expected)
    assert "NaN" in repr(found)


@needs_kernels
@pytest.mark.parametrize(("mode", "name"), [("ar", "ar_steps"), ("diffusion", "read"), ("diffusion", "fill_blocks")])
@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
def test_a_fault_in_a_compiled_pass_ends_no_request(
    model: TwoTowerForCausalLM, mode: str, name: str, late: bool
) -> None:
    requests = mixed(8, 5, mode=mode, temperature=0.0, policy="threshold", stop="w7")
    expected = by_row(run(LLM(model, rows=4, length=LENGTH), requests, BURST))
    with fault(DecodePass, name, Fault(getattr(DecodePass, name), at=3, late=late)) as made:
        found = by_row(run(LLM(model, rows=4, length=LENGTH), requests, BURST))
    assert made.calls > 3
    assert [tokens_of(found[row]) for row in sorted(found)] == [tokens_of(expected[row]) for row in sorted(expected)]


@needs_kernels
def test_changed_weights_are_read() -> None:
    own = build_random_model(EVERY_KIND)
    requests = mixed(6, 4, temperature=0.0, stop=None)
    before = by_row(run(LLM(own, rows=2, length=LENGTH), requests, BURST))
    with torch.no_grad():
        for weight in own.parameters():
            weight.mul_(1.1)
    with compiled(on=False):
        expected = by_row(run(LLM(own, rows=2, length=LENGTH), requests, 0.0))
    found = by_row(run(LLM(own, rows=2, length=LENGTH), requests, BURST))
    assert found == expected != before


FAST = ("llama", "gemma", "olmo2", "glm4", "qwen2_moe", "qwen3_moe", "nemotron_h:latent", "mamba2:biases", "bamba")
# For windows, factors of logits, a cap of logits, LongRoPE, and layers of a kind that the C++ pass lacks.
DECLINED = ("mistral", "granite", "falcon_h1", "gemma2", "phi3:longrope", "qwen3_next")


@needs_kernels
@pytest.mark.parametrize("weights", ["packed", "int8", "int4"])
@pytest.mark.parametrize("name", slow_but(FAST, [name for name in SHAPES if name not in DECLINED]))
def test_other_backbones_and_weights_give_the_same_events(name: str, weights: str) -> None:
    own = two_tower(name)
    if weights == "packed":
        own.pack()
    else:
        quantize_(own, weights)
    requests = [
        Request([5, 6, 7, 8], GenerationParams.of(mode=mode, max_new_tokens=18, block_size=6, mask_token_id=3, **more))
        for mode, more in (("ar", {}), ("diffusion", {"policy_value": 0.3}), ("verified", {"draft_steps": 2}))
    ]
    with compiled(on=False):
        expected = [by_row(run(LLM(own, rows=3, length=LENGTH), [request] * 2, 0.0)) for request in requests]
    with compiled() as calls:
        found = [by_row(run(LLM(own, rows=3, length=LENGTH), [request] * 2, BURST)) for request in requests]
    assert found == expected
    if name in FAST:
        assert all(calls[name] for name in ("ar_steps", "read", "fill_blocks"))


@needs_kernels
@pytest.mark.parametrize("name", DECLINED)
def test_backbones_that_are_declined(name: str) -> None:
    own = two_tower(name)
    request = Request([5, 6, 7, 8], GenerationParams.of(mode="ar", max_new_tokens=6))
    with compiled(on=False):
        expected = by_row(run(LLM(own, rows=1, length=LENGTH), [request], 0.0))
    with compiled() as calls:
        found = by_row(run(LLM(own, rows=1, length=LENGTH), [request], BURST))
    assert found == expected
    assert not any(calls.values())
