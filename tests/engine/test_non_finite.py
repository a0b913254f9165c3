"""Logits that are NaN or infinite: the request ends with an error, the others are unharmed, and no NaN leaves."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from command import Result
from conftest import EVERY_KIND, build_random_model
from test_engine import LENGTH, some_request
from test_stopping import TOKENIZER, VOCABULARY

from twotower import LLM, GenerationParams, Request, TwoTowerForCausalLM, generate, model_loading
from twotower.decoding.output import Generation, StepEvent
from twotower.decoding.sampling import NoiseKeys, SamplingRule, sample_rows
from twotower.engine.jobs import Line, run_job
from twotower.errors import NonFiniteLogitsError

BAD = 63  # a token with a damaged embedding
WORDS = "NonFiniteLogitsError: the logits of the {} are NaN or infinite at new token {}"
TOWER = {"ar": "context tower", "verified": "context tower", "diffusion": "denoiser", "mock_ar": "denoiser"}


@pytest.fixture(scope="module", params=[torch.float64, torch.float32, torch.bfloat16], ids=str)
def model(request: pytest.FixtureRequest) -> TwoTowerForCausalLM:
    return damaged(request.param)


def damaged(dtype: torch.dtype, value: float = math.nan) -> TwoTowerForCausalLM:
    """A model whose passes over BAD have NaN logits."""
    model = build_random_model(EVERY_KIND, dtype=dtype)
    with torch.no_grad():
        for tower in (model.context, model.denoiser):
            assert tower is not None
            tower.embeddings.weight[BAD] = value
    return model


def bad(mode: str, n: int = 9, **given: Any) -> Request:
    extra = {name: given.pop(name) for name in ("logprobs", "prompt_logprobs", "watched") if name in given}
    return Request([5, BAD, 6, 7], GenerationParams.of(mode=mode, max_new_tokens=n, **given), **extra)


def others(count: int) -> list[Request]:
    rng, requests = random.Random(2), []
    for _ in range(count):
        one = some_request(rng, draft_steps=1, mode="verified") if rng.random() < 0.3 else some_request(rng)
        requests.append(Request([token % 50 + 4 for token in one.prompt], one.params))
    return [one for one in requests if not one.params.depends_on_timing]


@cache
def expected_of(model: TwoTowerForCausalLM, count: int) -> list[Generation]:
    return LLM(model, rows=16, length=LENGTH).generate(others(count))


def told(result: Generation, tower: str, place: int = 1) -> None:
    assert result.finish_reason == "error"
    assert WORDS.format(tower, place) in result.error
    json.dumps(result.to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("mode", "temperature"),
    [
        pytest.param(mode, temperature, marks=() if (place % 2 == 0) == (temperature == 0) else pytest.mark.slow)
        for place, mode in enumerate(sorted(TOWER))
        for temperature in (0.0, 1.0)
    ],
)
def test_a_request_ends_with_the_cause(model: TwoTowerForCausalLM, mode: str, temperature: float) -> None:
    """In fp32 and float64 the others have the same text as without it; K/V that it leaves behind harm no later text."""
    given = {"draft_steps": 0} if mode == "verified" else {}
    requests = others(15)
    llm = LLM(model, rows=16, length=LENGTH)
    expected = expected_of(model, 15)
    found = llm.generate([*requests[:7], bad(mode, temperature=temperature, **given), *requests[7:]])
    told(found.pop(7), TOWER[mode])
    again = llm.generate(requests)
    for one, other, third in zip(expected, found, again, strict=True):
        assert other.finish_reason == one.finish_reason != "error"
        assert third.finish_reason != "error"
        if model.dtype != torch.bfloat16:
            assert other.tokens == third.tokens == one.tokens


@pytest.mark.parametrize("mode", ["ar", "diffusion", "verified"])
@pytest.mark.parametrize("n", [0, 5])
def test_log_probabilities_are_numbers(model: TwoTowerForCausalLM, mode: str, n: int) -> None:
    (result,) = LLM(model, rows=1, length=LENGTH).generate([bad(mode, n, logprobs=2, prompt_logprobs=True)])
    assert result.finish_reason == "error"
    json.dumps(result.to_dict(), allow_nan=False)


def test_steps_have_numbers(model: TwoTowerForCausalLM) -> None:
    llm = LLM(model, rows=1, length=LENGTH)
    llm.add_request(bad("diffusion", watched=True))
    while llm.has_work:
        for event in llm.step():
            assert not isinstance(event, StepEvent)
            assert event.result is not None


def test_infinite_logits_end_a_request_too() -> None:
    (result,) = LLM(damaged(torch.float32, math.inf), rows=1, length=LENGTH).generate([bad("ar")])
    told(result, "context tower")


def test_the_methods_of_the_model_tell_the_error() -> None:
    """`generate` returns it beside the other results; a tensor has no place for it."""
    model = damaged(torch.float32)
    prompts, params = [[5, 6], [5, BAD, 7]], GenerationParams.of(mode="ar", max_new_tokens=4)
    good, failed = generate(model, prompts, params)
    assert good.finish_reason == "length"
    told(failed, "context tower")
    with pytest.raises(NonFiniteLogitsError, match=r"prompt 1: .* NaN or infinite at new token 1"):
        model.generate_ar(torch.tensor([[5, 6], [5, BAD]]), max_new_tokens=4)


@pytest.mark.parametrize("options", [[], ["--json"]])
@pytest.mark.parametrize("mode", ["ar", "diffusion"])
def test_the_command_line_exits_with_1(
    cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, mode: str, options: list[str]
) -> None:
    model = build_random_model("M*-", seed=11, vocab_size=VOCABULARY, eos_token_id=2)
    model.tokenizer = TOKENIZER
    with torch.no_grad():
        model.context.embeddings.weight[:] = math.nan
    monkeypatch.setattr(model_loading, "load_model", lambda *_, **__: model)
    result = cli("generate", "the quick", "--mode", mode, "-n", "8", *options)
    assert result.code == 1
    assert result.err.splitlines()[-1].startswith("Error: NonFiniteLogitsError: the logits of the ")
    if options:
        assert json.loads(result.out, parse_constant=_refuse)["finish_reason"] == "error"


def test_a_batch_job_writes_the_error_beside_its_line(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    params = GenerationParams.of(mode="ar", max_new_tokens=4)
    lines = [Line(1, "a", request=Request([5, 6], params)), Line(2, "b", request=bad("ar"))]
    assert run_job(LLM(damaged(torch.float32), rows=2, length=LENGTH), lines, out) == (2, 1)
    answers = [json.loads(line, parse_constant=_refuse) for line in out.read_text().splitlines()]
    assert answers[0]["finish_reason"] == "length"
    assert "NaN or infinite" in answers[1]["error"]


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


def test_prompts_with_damaged_states_are_not_cached() -> None:
    model = damaged(torch.float32)
    llm = LLM(model, rows=2, length=600)
    prompt = [5, BAD, *[6 + i % 40 for i in range(300)]]
    told(llm.generate([Request(prompt, GenerationParams.of(mode="ar", max_new_tokens=2))])[0], "context tower")
    assert not llm.core.prefixes.nodes


@pytest.mark.parametrize(("top_k", "top_p"), [(None, None), (10, None), (None, 0.8)])
@pytest.mark.parametrize("temperature", [5e-324, 1e-320, 1e-300, 1e-9])
def test_a_tiny_temperature_is_greedy(temperature: float, top_k: int | None, top_p: float | None) -> None:
    logits = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0))

    def keys() -> NoiseKeys:
        zeros = torch.zeros(2, 1, dtype=torch.long)
        return NoiseKeys(torch.tensor([1, 2]), torch.arange(6).view(2, 3), zeros, zeros)

    tokens, sure = sample_rows(logits, [SamplingRule(temperature, top_k, top_p)] * 2, keys)
    assert torch.equal(tokens, logits.argmax(-1))
    assert sure.isfinite().all()
