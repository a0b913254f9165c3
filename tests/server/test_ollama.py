"""The routes of Ollama: whole replies, lines of JSON, options, and errors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from serving import NAME, RunningServer, expected_output, serving, wait_until

STOPS = ["\nSystem:", "\nUser:", "\nAssistant:"]
OPTIONS = {"seed": 3, "num_predict": 12, "mode": "ar", "temperature": 1.0, "num_ctx": 4096}
ASK = [{"role": "user", "content": "the quick"}]
REPLY = expected_output("User: the quick\nAssistant:", mode="ar", max_tokens=12, seed=3, stop=STOPS)


@pytest.fixture(scope="module")
def served() -> Iterator[RunningServer]:
    with serving(rows=2, more_names=("other",)) as found:
        yield found
        wait_until(found.is_idle)


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("path", ["/api/chat", "/api/generate"])
def test_replies(served: RunningServer, path: str) -> None:
    start: dict[str, Any] = {"messages": ASK} if path == "/api/chat" else {"prompt": "the quick"}
    body = {"model": NAME, "options": OPTIONS, "keep_alive": "5m"} | start

    def text(part: dict[str, Any]) -> str:
        return str(part["message"]["content"] if path == "/api/chat" else part["response"])

    whole = served.post(path, body | {"stream": False})
    assert whole.status_code == 200, whole.text
    streamed = served.post(path, body)
    assert streamed.headers["content-type"] == "application/x-ndjson"
    parts = lines(streamed.text)
    assert text(whole.json()) == "".join(map(text, parts)) == REPLY.text.lstrip()
    assert [part["done"] for part in parts] == [False] * (len(parts) - 1) + [True]
    for last in (whole.json(), parts[-1]):
        assert last["done_reason"] == ("length" if REPLY.finish_reason == "length" else "stop")
        assert (last["prompt_eval_count"], last["eval_count"]) == (REPLY.prompt_tokens, len(REPLY.tokens))
        assert last["total_duration"] >= last["eval_duration"] > 0


def test_a_raw_prompt(served: RunningServer) -> None:
    body = {"model": NAME, "prompt": "the quick", "raw": True, "stream": False, "options": OPTIONS}
    assert served.post("/api/generate", body).json()["response"] == expected_output(
        "the quick", mode="ar", max_tokens=12, seed=3
    ).text  # fmt: skip


def test_a_format_and_forced_json(served: RunningServer) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": ["x"]}}, "required": ["a"], "additionalProperties": False}
    answer = served.post("/api/chat", {"model": NAME, "messages": ASK, "format": schema, "stream": False})
    assert json.loads(answer.json()["message"]["content"]) == {"a": "x"}


def test_models(served: RunningServer) -> None:
    assert [model["name"] for model in served.get("/api/tags").json()["models"]] == [NAME, "other"]
    assert served.get("/api/version").json()["version"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"options": {"mirostat": 1}}, "options"),
        ({"options": {"temperature": "hot"}}, "temperature"),
        ({"options": {"num_predict": 10**6}}, "max_tokens"),
        ({"format": "xml"}, "format"),
        ({"messages": [{"role": "user", "content": "a", "images": ["AA=="]}]}, "messages"),
        ({"messages": [{"role": "king", "content": "a"}]}, "messages"),
        ({"messages": 5}, "messages"),
        ({"options": {"\ud800": 5}}, "options"),
        ({"suffix": "b"}, "suffix"),
    ],
)
def test_bad_bodies(served: RunningServer, fields: dict[str, Any], param: str) -> None:
    answer = served.post("/api/chat", {"model": NAME, "messages": ASK} | fields)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


def test_other_models_and_late_errors(served: RunningServer) -> None:
    assert served.post("/api/chat", {"model": "no", "messages": ASK}).status_code == 404
    assert served.post("/api/generate", {"model": NAME, "prompt": "a", "suffix": "b"}).status_code == 400
    with served.limited(request_seconds=0.2), served.step_gate.closed():
        (line,) = lines(served.post("/api/chat", {"model": NAME, "messages": ASK}).text)
    assert "longer than" in line["error"]
