"""Requests that break a step of the engine: they get an error, and the server goes on."""

from __future__ import annotations

import copy
import json
import math
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest.mock import patch

import pytest
import torch
from serving import RunningServer, events_of, expected_output, serving, texts_of, tiny_model, wait_until
from test_stopping import TOKENIZER, VOCABULARY

from twotower import TwoTowerForCausalLM
from twotower.server.readiness import FAILURES

POISON = VOCABULARY - 1


@pytest.fixture(scope="module")
def served() -> Iterator[RunningServer]:
    with serving() as found:
        yield found
        wait_until(found.is_idle, "a request is still active")


def assert_well(served: RunningServer) -> None:
    assert served.get("/ready").json() == {"status": "ready"}
    assert served.complete(seed=1).json()["choices"][0]["text"] == expected_output("the quick", seed=1).text


@pytest.mark.parametrize("place", ["prompt", "messages"])
def test_a_token_beyond_the_vocabulary_is_an_error_of_its_request(served: RunningServer, place: str) -> None:
    """The tokenizer has more tokens than the model."""
    wide = copy.deepcopy(TOKENIZER)
    wide.add_tokens([*(f"<{number}>" for number in range(VOCABULARY)), "<think>"])
    with patch.object(served.service.tokenizer, "_encoder", wide):
        answer = served.complete("<think>") if place == "prompt" else served.chat("<think>")
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert error["param"] == place
        assert "the vocabulary is 0 to" in error["message"]
    assert_well(served)


@pytest.mark.parametrize("prompt", [[1, 5000], [1, -5], ["x", 3], [1, 2.5], [[1], 2]])
def test_prompts_that_are_no_token_ids_are_refused(served: RunningServer, prompt: Any) -> None:
    assert served.complete(prompt).status_code == 400
    assert_well(served)


@pytest.mark.parametrize("mode", ["ar", "diffusion"])
def test_a_request_that_breaks_a_pass_gets_500_and_the_others_go_on(served: RunningServer, mode: str) -> None:
    """One of eight requests raises in each pass; the other streams are as without it, and no text comes twice."""
    real = TwoTowerForCausalLM.extend

    def extend(self: Any, tokens: Any, *rest: Any, **options: Any) -> Any:
        out = real(self, tokens, *rest, **options)
        if bool((tokens == POISON).any()):
            raise RuntimeError("a kernel died")
        return out

    fields: dict[str, Any] = {"seed": 3} if mode == "diffusion" else {"seed": 3, "mode": mode}
    outputs = [([5 + i, 6, 7], expected_output([5 + i, 6, 7], **fields)) for i in range(20)]
    chosen = [(prompt, output.text) for prompt, output in outputs if POISON not in output.tokens][:8]
    prompts, expected = [prompt for prompt, _ in chosen], [text for _, text in chosen]
    prompts[3] = [5, POISON]
    with patch.object(TwoTowerForCausalLM, "extend", extend), ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda p: served.complete(p, stream=True, **fields), prompts))
        assert served.get("/ready").json() == {"status": "ready"}
    for place, answer in enumerate(answers):
        events = events_of(answer.text)
        if place == 3:
            assert "RuntimeError: a kernel died" in events[-1]["error"]["message"]
        else:
            assert texts_of(events)[0] == expected[place]
    assert_well(served)


@pytest.mark.parametrize("verb", ["extend", "denoise"])
def test_an_engine_whose_requests_all_fail_is_not_ready(served: RunningServer, verb: str) -> None:
    """Its resets work, so it lives. When the cause is gone, a request of the server itself makes it ready."""
    broken = threading.Event()
    real = getattr(TwoTowerForCausalLM, verb)

    def fail(self: Any, *rest: Any, **options: Any) -> Any:
        if broken.is_set():
            raise RuntimeError("a kernel died")
        return real(self, *rest, **options)

    with patch.object(TwoTowerForCausalLM, verb, fail):
        broken.set()
        for count in range(1, 5):
            assert served.complete([5, 6], max_tokens=2).status_code == 500
            answer = served.get("/ready")
            assert answer.status_code == (200 if count < FAILURES else 503)
        assert served.get("/health").status_code == 200
        for _ in range(3):  # the server tests itself, and fails
            error = served.get("/ready").json()["error"]
            assert re.match(
                r"the last \d+ requests failed, the last one with RuntimeError: a kernel died;", error["message"]
            )
            assert error["code"] == "engine"
            wait_until(served.is_idle)
        assert served.counts()["twotower_failures_in_a_row",] >= FAILURES
        broken.clear()
        wait_until(lambda: served.get("/ready").status_code == 200)
    assert_well(served)


def test_single_failures_leave_the_server_ready(served: RunningServer) -> None:
    """A request that succeeds ends a series of failures, and errors of clients are none."""
    real = TwoTowerForCausalLM.extend

    def extend(self: Any, tokens: Any, *rest: Any, **options: Any) -> Any:
        if bool((tokens == POISON).any()):
            raise RuntimeError("a kernel died")
        return real(self, tokens, *rest, **options)

    grammar = {"type": "json_schema", "json_schema": {"schema": {"type": "object", "properties": {
        f"a{number}": {"type": "string", "pattern": "^.{0,50}$"} for number in range(1200)
    }}}}  # fmt: skip
    with patch.object(TwoTowerForCausalLM, "extend", extend):
        for _ in range(FAILURES):
            for _ in range(FAILURES - 1):
                assert served.complete([5, POISON], max_tokens=2).status_code == 500
            assert served.complete([5, 6], max_tokens=2, mode="ar", seed=1).status_code == 200
        for _ in range(FAILURES + 1):
            assert served.complete("a", response_format=grammar, max_tokens=40, seed=1).status_code == 400
        assert served.get("/ready").json() == {"status": "ready"}
        assert served.service.engine.stats.failures == 0
    assert_well(served)


def test_logits_that_are_not_finite_are_an_error(served: RunningServer) -> None:
    weight = tiny_model().context.embeddings.weight
    kept = weight[POISON].clone()
    with torch.no_grad():
        weight[POISON] = math.nan
    try:
        for fields in ({}, {"mode": "ar"}, {"logprobs": 2, "mode": "ar"}, {"logprobs": 2, "mode": "ar", "echo": True}):
            answer = served.complete([5, POISON], **fields)
            assert answer.status_code == 500
            body = json.loads(answer.text, parse_constant=_refuse)
            assert "NaN or infinite at new token 1" in body["error"]["message"]
            stream = served.complete([5, POISON], stream=True, **fields)
            assert "NaN or infinite" in events_of(stream.text)[-1]["error"]["message"]
        wait_until(lambda: served.get("/ready").status_code == 200)  # after eight failures, the server tests itself
        assert_well(served)
    finally:
        with torch.no_grad():
            weight[POISON] = kept


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


def test_a_temperature_that_is_almost_0_is_greedy(served: RunningServer) -> None:
    answer = served.complete(temperature=1e-320, mode="ar", max_tokens=6)
    assert (
        answer.json()["choices"][0]["text"]
        == expected_output("the quick", temperature=0.0, mode="ar", max_tokens=6).text
    )
