"""Bounds of what one request can make the server do: sizes of fields, bodies and compressed bodies."""

from __future__ import annotations

import gzip
import json
import re
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from serving import LENGTH, RunningServer, events_of, expected_output, serving, wait_until
from test_stopping import TOKENIZER

from twotower.server.choices import MAX_SCORES
from twotower.server.format_schemas import MAX_FORMAT_SIZE
from twotower.server.request_schemas import MAX_MESSAGES, MAX_PROMPTS
from twotower.server.settings import Limits

PATH, CHAT = "/v1/completions", "/v1/chat/completions"
ASK = {"prompt": "the quick", "max_tokens": 2, "seed": 1}
SECONDS = 8.0  # far more than a bounded request takes, far less than an unbounded one


@pytest.fixture(scope="module")
def served() -> Iterator[RunningServer]:
    with serving(rows=2, limits=Limits(queue=8)) as found:
        yield found
        wait_until(found.is_idle)


def error_of(answer: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert answer.status_code == status, answer.text[:500]
    (error,) = answer.json().values()
    assert len(error["message"]) <= 1000
    return dict(error)


def numbered(count: int) -> dict[str, int]:
    """An object with this many fields."""
    return {f"a{number:06}": 1 for number in range(count)}


def chat(*messages: object) -> dict[str, object]:
    return {"messages": list(messages)}


TEXT = "ab " * 1_300_000
# Bodies of up to 4 MiB whose validation took from seconds to minutes, in the thread of all requests; and the field of
# the error.
HUGE: dict[str, tuple[str, Callable[[], dict[str, object]], str]] = {
    "booleans": (PATH, lambda: {"prompt": [True] * 800_000}, "prompt"),
    "mixed": (PATH, lambda: {"prompt": ["a", *[5] * 1_500_000]}, "prompt"),
    "ids": (PATH, lambda: {"prompt": [5] * 2_000_000}, "prompt"),
    "prompts": (PATH, lambda: {"prompt": ["a"] * 900_000}, "prompt"),
    "lists": (PATH, lambda: {"prompt": [[]] * 1_300_000}, "prompt"),
    "stops": (PATH, lambda: {"prompt": "a", "stop": [1] * 1_500_000}, "stop"),
    "messages": (CHAT, lambda: chat(*[{"role": "user", "content": ""}] * 130_000), "messages"),
    "empty messages": (CHAT, lambda: chat(*[{}] * 1_300_000), "messages"),
    "parts": (CHAT, lambda: chat({"role": "user", "content": [{}] * 1_300_000}), "messages"),
    "fields": (PATH, lambda: {"prompt": "a"} | numbered(300_000), ""),
    "message fields": (CHAT, lambda: chat(numbered(300_000)), "messages"),
    "biases": (PATH, lambda: {"prompt": "a", "logit_bias": numbered(300_000)}, "logit_bias"),
    "text": (PATH, lambda: {"prompt": TEXT}, "prompt"),
    "chat": (CHAT, lambda: chat({"role": "user", "content": TEXT}), "messages"),
    "model": (PATH, lambda: {"prompt": "a", "model": TEXT}, "model"),
    "user": (PATH, lambda: {"prompt": "a", "user": TEXT}, "user"),
    "field name": (PATH, lambda: {"prompt": "a", TEXT: 1}, "ab "),
}


@pytest.mark.parametrize("name", HUGE)
def test_a_huge_body_is_refused_at_once(served: RunningServer, name: str) -> None:
    path, body, field = HUGE[name]
    content = json.dumps(body(), separators=(",", ":")).encode()
    assert len(content) <= served.service.settings.limits.body_bytes
    started = time.monotonic()
    error = error_of(served.post(path, content))
    assert time.monotonic() - started < SECONDS
    assert (error["param"] or "").startswith(field)


@pytest.mark.parametrize("name", ["text", "chat"])
def test_a_text_that_is_too_long_is_not_encoded(
    served: RunningServer, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Encoding it took seconds, in which other prompts waited."""
    encoded: list[int] = []
    encode = type(TOKENIZER).__call__

    def note(self: Any, text: str, **options: Any) -> Any:
        encoded.append(len(text))
        return encode(self, text, **options)

    monkeypatch.setattr(type(TOKENIZER), "__call__", note)
    path, body, field = HUGE[name]
    assert error_of(served.post(path, body()))["param"] == field
    assert encoded == []
    assert served.complete("the quick", max_tokens=1).status_code == 200
    assert encoded == [len("the quick")]


SOURCES: dict[str, dict[str, Any]] = {
    "regex": {"type": "regex", "regex": "a?" * 4000},
    "grammar": {"type": "grammar", "grammar": "start: " + " | ".join(f'"a{number}"' for number in range(20_000))},
    "json_schema": {"type": "json_schema", "json_schema": {"schema": {"enum": list(range(20_000))}}},
}


@pytest.mark.parametrize("kind", SOURCES)
def test_size_of_a_format(served: RunningServer, kind: str) -> None:
    error = error_of(served.complete("a", response_format=SOURCES[kind]))
    assert error["param"] == "response_format"
    assert str(MAX_FORMAT_SIZE[kind]) in error["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_format_that_needs_too_much_is_an_error_of_the_client(served: RunningServer, stream: bool) -> None:
    """The grammar library finds this only while the text is written."""
    properties = {f"a{number}": {"type": "string", "pattern": "^.{0,50}$"} for number in range(1200)}
    schema = {"type": "json_schema", "json_schema": {"schema": {"type": "object", "properties": properties}}}
    answer = served.complete("a", response_format=schema, max_tokens=40, seed=1, stream=stream)
    error = events_of(answer.text)[-1]["error"] if stream else error_of(answer)
    assert error["param"] == "response_format"
    assert "cannot be followed" in error["message"]
    assert not re.search("[a-z]Error:|[<>]", error["message"])


def test_a_panic_of_the_grammar_library_is_one_line(served: RunningServer) -> None:
    grammar = "start: " + " ".join(f"r{number}" for number in range(500))
    error = error_of(served.complete("a", response_format={"type": "grammar", "grammar": grammar}))
    assert "backtrace" not in error["message"]


def test_numbers_that_fit_are_named(served: RunningServer) -> None:
    too_long = served.complete("ab " * 20_000)
    assert str(LENGTH) in error_of(too_long)["message"]
    assert str(MAX_PROMPTS) in error_of(served.complete(["a"] * (MAX_PROMPTS + 1)))["message"]
    messages = [{"role": "user", "content": ""}] * (MAX_MESSAGES + 1)
    assert str(MAX_MESSAGES) in error_of(served.post(CHAT, {"messages": messages}))["message"]
    assert "max_tokens is 600" in error_of(served.complete("a", max_tokens=600))["message"]


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (PATH, {"prompt": "a", "logprobs": 20}, "logprobs"),
        (PATH, {"prompt": [5] * 400, "logprobs": 20, "echo": True, "max_tokens": 0}, "logprobs"),
        (CHAT, chat({"role": "user", "content": "a"}) | {"logprobs": True, "top_logprobs": 20}, "logprobs"),
        (PATH, {"prompt": "a", "stream": True, "stream_denoising": True, "steps": 64}, "stream_denoising"),
    ],
)
def test_values_of_a_response(served: RunningServer, path: str, fields: dict[str, Any], param: str) -> None:
    """The product of choices, tokens and alternatives is bounded."""
    with served.limited(queue=64):
        error = error_of(served.post(path, {"n": 64, "max_tokens": 480} | fields))
        assert error["param"] == param
        assert str(MAX_SCORES) in error["message"]
        assert served.post(path, fields | {"max_tokens": 2}).status_code == 200


# --- compressed bodies ------------------------------------------------------------------------------------------------


def compressed(served: RunningServer, body: bytes, encoding: str) -> httpx.Response:
    return served.post(PATH, body, headers={"content-encoding": encoding})


@pytest.mark.parametrize(("encoding", "compress"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
def test_compressed_bodies(served: RunningServer, encoding: str, compress: Callable[[bytes], bytes]) -> None:
    answer = compressed(served, compress(json.dumps(ASK).encode()), encoding)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["text"] == expected_output("the quick", max_tokens=2, seed=1).text
    wrong = compressed(served, json.dumps(ASK).encode(), encoding)
    assert encoding in error_of(wrong)["message"]
    cut = compressed(served, compress(json.dumps(ASK).encode())[:-6], encoding)
    error_of(cut)


def test_a_compressed_body_is_bounded(served: RunningServer) -> None:
    """1 GiB of spaces in 1 MiB: only the allowed size is decompressed."""
    one = zlib.compressobj(wbits=31)
    bomb = b"".join(one.compress(b" " * 2**20) for _ in range(1024)) + one.flush()
    tracemalloc.start()
    try:
        error = error_of(compressed(served, bomb, "gzip"), 413)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert str(served.service.settings.limits.body_bytes) in error["message"]
    assert peak < 2**26


def test_other_encodings(served: RunningServer) -> None:
    for encoding in ("br", "zstd", "gzip, gzip", "nonsense"):
        error = error_of(compressed(served, json.dumps(ASK).encode(), encoding), 415)
        assert "gzip" in error["message"]
    assert compressed(served, json.dumps(ASK).encode(), "identity").status_code == 200


# --- all bodies together ----------------------------------------------------------------------------------------------


def test_bytes_of_all_requests_are_bounded(served: RunningServer) -> None:
    body = json.dumps(ASK | {"user": "x" * 1000}).encode()
    with served.limited(all_bodies_bytes=2500), ThreadPoolExecutor(2) as pool:
        with served.step_gate.closed():
            running = [pool.submit(served.post, PATH, body) for _ in range(2)]
            wait_until(lambda: served.service.active_choices == 2)
            for encoding, content in (("identity", body), ("gzip", gzip.compress(body))):
                answer = compressed(served, content, encoding)
                error_of(answer, 429)
                assert int(answer.headers["retry-after"]) >= 1
        assert [found.result(20).status_code for found in running] == [200, 200]
        for _ in range(3):  # all bytes are released, also after errors
            assert served.post(PATH, body).status_code == 200
            error_of(compressed(served, body, "gzip"))
            error_of(served.post(PATH, b"x" * 1000))
        assert served.post(PATH, body).status_code == 200
