"""Routes beside those that generate text, the errors that clients act on, and headers."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from serving import LENGTH, NAME, RunningServer, captured_log, serving, wait_until

from twotower.version import VERSION

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def served() -> Iterator[RunningServer]:
    with serving(rows=2) as found:
        yield found
        wait_until(found.is_idle)


@pytest.fixture(scope="module")
def keyed() -> Iterator[RunningServer]:
    with serving(rows=1, api_keys=("right",), root_path="/llm") as found:
        yield found
        wait_until(found.is_idle)


def error_of(answer: Any, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    return error


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (COMPLETIONS, {"prompt": "a", "max_tokens": 600}),
        (COMPLETIONS, {"prompt": [5] * 600}),
        (COMPLETIONS, {"prompt": "a" * 10**6}),
        (CHAT, {"messages": [{"role": "user", "content": "x " * 600}]}),
        (CHAT, {"messages": [{"role": "user", "content": "x"}], "max_completion_tokens": 600}),
    ],
)
def test_a_text_that_is_too_long_has_the_code_that_clients_match(
    served: RunningServer, path: str, fields: dict[str, Any]
) -> None:
    error = error_of(served.post(path, fields), 400)
    assert error["code"] == "context_length_exceeded"
    assert error["message"].startswith(f"This model's maximum context length is {LENGTH} tokens")
    assert error["type"] == "invalid_request_error"


def test_a_limit_of_prompts_has_the_same_code(served: RunningServer) -> None:
    with served.limited(prompt_tokens=4):
        error = error_of(served.complete([5] * 5), 400)
    assert error["code"] == "context_length_exceeded"
    assert "at most 4 tokens" in error["message"]


def test_a_wrong_key_has_the_code_of_the_openai_api(keyed: RunningServer) -> None:
    for headers in ({}, {"authorization": "Bearer wrong"}, {"x-api-key": "wrong"}):
        error = error_of(keyed.get("/v1/models", headers=headers), 401)
        assert error["code"] == "invalid_api_key"


@pytest.mark.parametrize("path", ["/v1", "/v1/", "/v1/engines", "/v1/chat", "/v1/completions/x"])
def test_a_404_under_v1_names_the_routes(served: RunningServer, path: str) -> None:
    message = error_of(served.get(path), 404)["message"]
    assert f"{COMPLETIONS}, {CHAT}" in message
    assert "/v1/models" in message


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/audio/speech", "/v1/files/f-1/content"])
def test_a_route_of_another_kind_is_not_served(served: RunningServer, path: str) -> None:
    message = error_of(served.post(path, {"input": "x"}), 404)["message"]
    assert " not served" in message
    assert COMPLETIONS in message


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_too_many_stop_strings_say_so(served: RunningServer, path: str) -> None:
    start: dict[str, Any] = {"prompt": "a"} if path == COMPLETIONS else {"messages": [{"role": "user", "content": "x"}]}
    error = error_of(served.post(path, start | {"stop": ["a"] * 17}), 400)
    assert error["param"] == "stop"
    assert "at most 16" in error["message"]


# --- headers and paths ------------------------------------------------------------------------------------------------


def test_a_key_may_be_sent_as_x_api_key(keyed: RunningServer) -> None:
    assert keyed.get("/v1/models", headers={"x-api-key": "right"}).status_code == 200
    both = {"x-api-key": "right", "authorization": "Bearer wrong"}
    assert keyed.get("/v1/models", headers=both).status_code == 401  # the usual header counts first


@pytest.mark.parametrize("prefix", ["", "/llm"])
def test_a_slash_at_the_end_changes_nothing(keyed: RunningServer, prefix: str) -> None:
    key = {"x-api-key": "right"}
    assert keyed.get(f"{prefix}/v1/models/", headers=key).json()["data"][0]["id"] == NAME
    answer = keyed.post(f"{prefix}{COMPLETIONS}/", {"prompt": "the", "max_tokens": 1}, headers=key)
    assert answer.status_code == 200
    assert keyed.post(f"{prefix}{COMPLETIONS}//", {"prompt": "the"}).status_code == 401  # nor does it avoid the key


def test_the_request_id_of_a_client_is_kept(served: RunningServer) -> None:
    with captured_log() as lines:
        answer = served.post(COMPLETIONS, {"prompt": "a", "max_tokens": 1}, headers={"x-request-id": "mine-7:a"})
        wait_until(lambda: any(line["event"] == "request" for line in lines))
    assert answer.headers.get_list("x-request-id") == ["mine-7:a"]
    assert [line["id"] for line in lines if line["event"] == "request"] == ["mine-7:a"]
    for bad in ("x" * 129, "a b", b"\xff"):
        found = served.get("/health", headers={"x-request-id": bad}).headers["x-request-id"]
        assert re.fullmatch("[0-9a-f]{32}", found)


def test_a_gzip_body_may_have_several_members(served: RunningServer) -> None:
    body = json.dumps({"prompt": "the quick", "max_tokens": 2, "seed": 1}).encode()
    headers = {"content-encoding": "gzip"}
    whole = served.post(COMPLETIONS, body).json()["choices"][0]["text"]
    for packed in (gzip.compress(body), gzip.compress(body[:9]) + gzip.compress(body[9:])):
        assert served.post(COMPLETIONS, packed, headers=headers).json()["choices"][0]["text"] == whole
    for bad in (gzip.compress(body) + b"more", gzip.compress(body)[:-3], b"", gzip.compress(b"") * 65):
        assert error_of(served.post(COMPLETIONS, bad, headers=headers), 400)["code"] == "encoding"
    assert error_of(served.post(COMPLETIONS, gzip.compress(b""), headers=headers), 400)["code"] == "json"
    bomb = gzip.compress(b" " * 2**23) * 2
    assert served.post(COMPLETIONS, bomb, headers=headers).status_code == 413


def test_version_and_ping(served: RunningServer) -> None:
    assert served.get("/version").json() == {"version": VERSION}
    assert served.get("/ping").json() == served.post("/ping").json() == {"status": "ok"}
