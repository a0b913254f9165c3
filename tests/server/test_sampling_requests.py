"""vLLM's and llama.cpp's fields over HTTP: the texts of the Python API, and errors that name the field."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from serving import RunningServer, events_of, expected_output, serving, texts_of, tiny_model, wait_until
from test_stopping import TOKENIZER

from twotower import LLM, GenerationParams, Request

PROMPT = "the quick"
FIELDS: dict[str, Any] = {
    "min_p": 0.3,
    "repetition_penalty": 1.6,
    "frequency_penalty": 0.9,
    "presence_penalty": -0.7,
    "logit_bias": {"9": 3.5, "2": -100},
    "bad_words": ["o", " the"],
    "stop_token_ids": [9],
    "min_tokens": 8,
    "ignore_eos": True,
    "skip_special_tokens": False,
}
CLOSED = {"required": ["a"], "additionalProperties": False}
JSON_SCHEMA = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, **CLOSED}
GBNF = 'root ::= "yes" | "no"'


@pytest.fixture(scope="module")
def served() -> Iterator[RunningServer]:
    with serving() as found:
        yield found
        wait_until(found.is_idle, "a request is still active")


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_is_that_of_the_python_api(served: RunningServer, name: str) -> None:
    fields = {"seed": 4, "mode": "ar", "max_tokens": 24, name: FIELDS[name]}
    own = {"stop_token_ids": (9,), "bad_words": ("o", " the"), "logit_bias": ((2, -100.0), (9, 3.5))}
    expected = expected_output(PROMPT, **fields | {name: own.get(name, FIELDS[name])})
    assert served.complete(PROMPT, **fields).json()["choices"][0]["text"] == expected.text
    streamed = served.complete(PROMPT, **fields, stream=True)
    assert texts_of(events_of(streamed.text)) == {0: expected.text}
    chat = served.chat(**fields)
    assert chat.status_code == 200, chat.text


def test_all_fields_together_with_logprobs(served: RunningServer) -> None:
    fields = {"seed": 4, "mode": "verified", "draft_steps": 1, "max_tokens": 24, **FIELDS, "logprobs": 1}
    (choice,) = served.complete(PROMPT, **fields).json()["choices"]
    logprobs = choice["logprobs"]
    assert len(logprobs["tokens"]) >= 8
    assert logprobs["text_offset"] == sorted(logprobs["text_offset"])
    chat = served.chat(**{**fields, "logprobs": True}).json()["choices"][0]
    assert chat["logprobs"]["content"]


def test_best_of(served: RunningServer) -> None:
    """The texts with the largest mean AR log-probability, best first; all generated tokens are counted."""
    fields = {"seed": 4, "mode": "ar", "max_tokens": 12}
    requests = [
        Request(
            TOKENIZER(PROMPT)["input_ids"],
            GenerationParams.of(mode="ar", temperature=1.0, seed=4 + number, max_new_tokens=12, eos_token_id=2),
            logprobs=0,
        )
        for number in range(5)
    ]
    every = LLM(tiny_model(), rows=5, length=64).generate(requests)
    ranked = sorted(every, key=lambda result: -sum(one.logprob for one in result.logprobs) / len(result.tokens))
    body = served.complete(PROMPT, **fields, n=2, best_of=5).json()
    assert [choice["text"] for choice in body["choices"]] == [result.text for result in ranked[:2]]
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    assert all(choice["logprobs"] is None for choice in body["choices"])
    assert body["usage"]["completion_tokens"] == sum(len(result.tokens) for result in every)
    two = served.complete([PROMPT, PROMPT], **fields, best_of=5).json()["choices"]
    assert [choice["text"] for choice in two] == [ranked[0].text] * 2
    chat = served.chat(PROMPT, **fields, n=2, best_of=4).json()
    assert [choice["index"] for choice in chat["choices"]] == [0, 1]
    assert served.complete(PROMPT, **fields, n=2, best_of=2, stream=True).status_code == 200


FORMATS: list[dict[str, Any]] = [
    {"structured_outputs": {"json": JSON_SCHEMA}},
    {"structured_outputs": {"choice": ["yes", "no"]}},
    {"structured_outputs": {"regex": "yes|no"}},
    {"structured_outputs": {"grammar": GBNF}},
    {"structured_outputs": {"json_object": True, "disable_fallback": False}},
    {"guided_json": JSON_SCHEMA},
    {"guided_json": json.dumps(JSON_SCHEMA)},
    {"guided_regex": "yes|no", "guided_decoding_backend": "xgrammar"},
    {"guided_choice": ["yes", "no"]},
    {"guided_grammar": 'start: "yes" | "no"'},
    {"grammar": GBNF},
    {"json_schema": JSON_SCHEMA},
    {"response_format": {"type": "json_object", "schema": JSON_SCHEMA}},
    {"response_format": {"type": "json_schema", "schema": JSON_SCHEMA}},
    {"response_format": {"type": "choice", "choice": ["yes", "no"]}},
]


@pytest.mark.parametrize("fields", FORMATS, ids=lambda fields: "-".join(fields))
def test_formats(served: RunningServer, fields: dict[str, Any]) -> None:
    pytest.importorskip("llguidance")
    body = served.chat("x", **fields, seed=1, temperature=0, max_tokens=60, presence_penalty=0.5).json()
    (choice,) = body["choices"]
    assert choice["decoding"]["mode"] == "verified"
    text = choice["message"]["content"]
    if "json_object" in fields.get("structured_outputs", {}):
        assert text.startswith("{")  # the tiny model may not end it
        return
    assert text in ("yes", "no") or json.loads(text).get("a") in ("x", "y")


@pytest.mark.parametrize("value", ["NaN", "1e999", "-1e999", "1" + "0" * 400])
def test_numbers_that_json_should_not_have(served: RunningServer, value: str) -> None:
    for field in ("repetition_penalty", "min_p"):
        body = f'{{"prompt": "x", "{field}": {value}}}'.encode()
        assert served.post("/v1/completions", body).status_code == 400
    body = f'{{"prompt": "x", "logit_bias": {{"5": {value}}}}}'.encode()
    assert served.post("/v1/completions", body).status_code == 400
