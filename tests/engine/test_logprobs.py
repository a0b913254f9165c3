"""Log-probabilities of an engine equal those of one full forward of the context tower, in every mode."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from conftest import EVERY_KIND, build_random_model
from test_engine import KINDS, LENGTH, assert_as_alone, drive, facts, passes, some_request
from test_stopping import EOS, TOKENIZER, VOCABULARY

from twotower import LLM, Request, TwoTowerForCausalLM
from twotower.cache.replica import DeviceTransfer
from twotower.decoding.output import BlockEvent, Generation, TokenLogprob
from twotower.decoding.params import GenerationParams
from twotower.engine import core, logprobs
from twotower.engine.engine_options import EngineOptions
from twotower.errors import ArgumentError

NEAR = {"rel": 0.0, "abs": 1e-9}


@pytest.fixture(scope="module")
def model() -> TwoTowerForCausalLM:
    return build_random_model(EVERY_KIND, dtype=torch.float64)


def with_logprobs(rng: random.Random, request: Request) -> Request:
    return replace(request, logprobs=rng.choice([None, 0, 3, 20]), prompt_logprobs=rng.random() < 0.4)


def assert_told(told: TokenLogprob, chances: torch.Tensor, token: int, top: int) -> None:
    assert told.token == token
    assert told.logprob == pytest.approx(float(chances[token]), **NEAR)
    values, ids = chances.topk(top)
    assert [token for token, _ in told.top] == ids.tolist()
    assert [value for _, value in told.top] == pytest.approx(values.tolist(), **NEAR)


def assert_right(model: TwoTowerForCausalLM, request: Request, output: Generation) -> None:
    """Compares with one forward over the prompt and the new tokens."""
    prompt, text = list(request.prompt), [*request.prompt, *output.tokens]
    with torch.no_grad():
        chances = model(torch.tensor([text])).logits[0].log_softmax(-1)
    top = request.logprobs or 0
    assert len(output.logprobs) == (0 if request.logprobs is None else len(output.tokens))
    for place, told in enumerate(output.logprobs, len(prompt)):
        assert_told(told, chances[place - 1], text[place], top)
    assert len(output.prompt_logprobs) == (len(prompt) if request.prompt_logprobs else 0)
    for place, said in enumerate(output.prompt_logprobs):
        assert (said is None) == (place == 0)
        if said is not None:
            assert_told(said, chances[place - 1], prompt[place], top)


def run(llm: LLM, requests: list[Request]) -> tuple[list[Generation], list[list[BlockEvent]]]:
    numbers = [llm.add_request(request) for request in requests]
    events: dict[int, list[BlockEvent]] = {number: [] for number in numbers}
    while llm.has_work:
        for event in llm.step():
            events[event.row].append(event)
    results = [events[number][-1].result for number in numbers]
    assert all(result is not None for result in results)
    return [result for result in results if result is not None], [events[number] for number in numbers]


def plain(request: Request) -> Request:
    return replace(request, logprobs=None, prompt_logprobs=False)


@pytest.mark.parametrize("rows", [1, 3, 16])
def test_they_are_those_of_a_full_forward(model: TwoTowerForCausalLM, rows: int) -> None:
    rng = random.Random(rows)
    requests = [with_logprobs(rng, some_request(rng)) for _ in range(40)]
    outputs, events = run(LLM(model, rows=rows, length=LENGTH), requests)
    expected = LLM(model, rows=rows, length=LENGTH).generate([plain(request) for request in requests])
    for request, output, without, told in zip(requests, outputs, expected, events, strict=True):
        assert_right(model, request, output)
        if request.params.depends_on_timing:
            assert output.tokens == without.tokens
        else:
            assert facts(output, counted=False) == facts(without, counted=False)
            assert output.denoiser_passes == without.denoiser_passes
            assert output.committed_at == without.committed_at
            own = request.logprobs is not None and output.mode in ("diffusion", "mock_ar") and bool(output.tokens)
            assert output.context_passes == without.context_passes + own  # the last block is read too
        assert output.confidence == pytest.approx(without.confidence, rel=1e-5, abs=1e-6)
        for event in told:
            assert len(event.logprobs) == (0 if request.logprobs is None else len(event.tokens))
        assert tuple(one for event in told for one in event.prompt_logprobs) == output.prompt_logprobs
        assert tuple(one for event in told for one in event.logprobs) == output.logprobs
        assert [token for event in told for token in event.tokens] == output.tokens


@pytest.mark.parametrize("mode", sorted(KINDS))
def test_every_mode_greedy_and_sampled_with_long_prompts(
    model: TwoTowerForCausalLM, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of several chunks, blocks of several sizes, and an end inside a block."""
    monkeypatch.setattr(core, "PROMPT_CHUNK", 16)
    rng = random.Random(4)
    requests = [
        replace(
            some_request(rng, mode=mode, temperature=temperature, eos_token_id=rng.choice([(5, 9, 53), None])),
            prompt=[rng.randrange(4, 64) for _ in range(length)],
            logprobs=2,
            prompt_logprobs=whole,
        )
        for temperature in (0.0, 1.0)
        for length in (1, 2, 15, 16, 17, 33, 100)
        for whole in (False, True)
    ]
    llm = LLM(model, rows=6, length=LENGTH, options=EngineOptions(prompt_budget=24))
    outputs, _ = run(llm, requests)
    assert {"eos", "length"} <= {output.finish_reason for output in outputs}
    for request, output in zip(requests, outputs, strict=True):
        assert_right(model, request, output)
        assert_as_alone_but_for_the_last_pass(model, request, output)


def assert_as_alone_but_for_the_last_pass(model: TwoTowerForCausalLM, request: Request, output: Generation) -> None:
    more = output.mode in ("diffusion", "mock_ar") and bool(output.tokens)
    assert_as_alone(model, plain(request), replace(output, context_passes=output.context_passes - more))


def test_a_prompt_beyond_the_chunk(model: TwoTowerForCausalLM) -> None:
    rng = random.Random(6)
    prompt = [rng.randrange(4, 64) for _ in range(2 * core.PROMPT_CHUNK + 40)]
    for mode in KINDS:
        params = GenerationParams.of(mode=mode, max_new_tokens=6)
        request = Request(prompt, params, logprobs=1, prompt_logprobs=True)
        (output,) = LLM(model, rows=2, length=700).generate([request])
        assert_right(model, request, output)


@pytest.mark.parametrize("mode", sorted(KINDS))
@pytest.mark.parametrize("length", [1, 2, 40])
def test_a_prompt_alone(model: TwoTowerForCausalLM, mode: str, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No new tokens: the prompt is read and its log-probabilities are returned."""
    monkeypatch.setattr(core, "PROMPT_CHUNK", 16)
    prompt = [5 + i for i in range(length)]
    request = Request(prompt, GenerationParams.of(mode=mode, max_new_tokens=0), prompt_logprobs=True, logprobs=4)
    llm = LLM(model, rows=2, length=64)
    beside = Request([5, 6], GenerationParams.of(mode="ar", max_new_tokens=4))
    (output, other), (events, _) = run(llm, [request, beside])
    assert len(events) == 1
    assert (output.finish_reason, output.tokens, output.logprobs) == ("length", [], ())
    assert output.decode_seconds == 0
    assert_right(model, request, output)
    assert_as_alone(model, beside, other)
    assert sorted(llm.core.scheduler.free) == [0, 1]
    unasked = passes(model, lambda: llm.generate([plain(request)]))
    assert unasked == (0, 0)


def test_prompt_logprobs_ignore_the_prefix_cache(model: TwoTowerForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tokens also enter the prefix cache."""
    monkeypatch.setattr(core, "PROMPT_CHUNK", 8)
    prompt = [5 + i for i in range(30)]
    for mode in KINDS:
        params = GenerationParams.of(mode=mode, max_new_tokens=5, draft_steps=1)
        llm = LLM(model, rows=2, length=LENGTH)
        llm.core.prefixes.budget = 2**24
        asking = Request(prompt, params, logprobs=2, prompt_logprobs=True)
        for request, cached in ((asking, 0), (asking, 0), (replace(asking, prompt_logprobs=False), 24)):
            (output,) = llm.generate([request])
            assert output.cached_tokens == cached
            assert_right(model, request, output)


def test_two_devices_and_aborted_requests(model: TwoTowerForCausalLM) -> None:
    rng = random.Random(13)
    requests = [with_logprobs(rng, some_request(rng)) for _ in range(30)]
    with patch.object(model, "transfer", DeviceTransfer()):
        outputs = drive(LLM(model, rows=4, length=LENGTH), requests, rng, aborted=0.1)
    assert len(outputs) > 10
    for place, output in outputs.items():
        assert_right(model, requests[place], output)


def test_stop_strings_and_characters_cut_in_two() -> None:
    """A block in which a stop string ends is used up to that token."""
    model = build_random_model("M*E", dtype=torch.float64, vocab_size=VOCABULARY)
    model.tokenizer = TOKENIZER
    rng = random.Random(2)
    stops = ["a", "e", "ü", "th"]
    requests = [
        replace(request, logprobs=2, params=replace(request.params, stop=(rng.choice(stops),), eos_token_id=(EOS,)))
        for request in (some_request(rng, max_new_tokens=30) for _ in range(20))
    ]
    outputs, _ = run(LLM(model, rows=5, length=LENGTH), requests)
    assert sum(output.finish_reason == "stop" for output in outputs) > 3
    for request, output in zip(requests, outputs, strict=True):
        assert_right(model, request, output)
    texts = [output.text for output in LLM(model, rows=5, length=LENGTH).generate([plain(r) for r in requests])]
    assert [output.text for output in outputs] == texts


# --- memory gives out -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("late", [False, True], ids=["the pass", "the scores"])
def test_out_of_memory_records_nothing_twice(model: TwoTowerForCausalLM, late: bool) -> None:
    """Passes of more than two rows, or log-probabilities of more than one row, run out of memory."""
    rng = random.Random(3)
    requests = [with_logprobs(rng, some_request(rng)) for _ in range(20)]
    if late:
        real = logprobs.LogprobRequest.gather

        def scarce(self: logprobs.LogprobRequest, *args: Any) -> Any:
            out = real(self, *args)
            if len(self.scheduled) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return out

        patched = patch.object(logprobs.LogprobRequest, "gather", scarce)
    else:
        extend = TwoTowerForCausalLM.extend

        def short(self: Any, tokens: Any, *rest: Any, **options: Any) -> Any:
            out = extend(self, tokens, *rest, **options)
            if len(tokens) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return out

        patched = patch.object(TwoTowerForCausalLM, "extend", short)
    with patched:
        outputs, _ = run(LLM(model, rows=6, length=LENGTH), requests)
    for request, output in zip(requests, outputs, strict=True):
        assert output.finish_reason in ("length", "eos")
        assert_right(model, request, output)


# --- asking -----------------------------------------------------------------------------------------------------------


def test_no_cost_without_logprobs(model: TwoTowerForCausalLM) -> None:
    """Without a request for log-probabilities there are no extra logits and no extra passes."""
    with patch.object(logprobs, "LogitStats", side_effect=AssertionError("nobody asked")):
        for mode in KINDS:
            request = Request([5, 6, 7], GenerationParams.of(mode=mode, max_new_tokens=12, draft_steps=1))
            with patch.object(model, "extend", wraps=model.extend) as extend:
                (output,) = LLM(model, rows=2, length=64).generate([request])
            assert_as_alone(model, request, output)
            scored = [call.kwargs["logits"] is not False for call in extend.call_args_list]
            assert any(scored) == (mode in ("ar", "verified"))
            assert "logprobs" not in output.to_dict()
            assert "prompt_logprobs" not in output.to_dict()


def test_they_are_plain_data(model: TwoTowerForCausalLM) -> None:
    request = Request([5, 6], GenerationParams.of(max_new_tokens=3), logprobs=1, prompt_logprobs=True)
    (output,) = LLM(model, rows=1, length=32).generate([request])
    said = json.loads(json.dumps(output.to_dict()))
    assert [one["token"] for one in said["logprobs"]] == output.tokens
    assert said["logprobs"][0].keys() == {"token", "logprob", "top"}
    assert said["prompt_logprobs"][0] is None
    assert len(said["prompt_logprobs"]) == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"logprobs": 21}, "logprobs is 21; it must be a whole number from 0 to 20, or None"),
        ({"logprobs": -1}, "logprobs is -1"),
        ({"logprobs": True}, "logprobs is True"),
        ({"logprobs": 1.0}, "logprobs is 1.0"),
        ({"prompt_logprobs": 1}, "prompt_logprobs is 1; it must be True or False"),
    ],
)
def test_what_cannot_be_asked(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError) as error:
        Request([5], GenerationParams.of(), **given)
    assert message in str(error.value)
