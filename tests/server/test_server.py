"""Responses of the server: the texts of the Python API, complete and streamed, and error messages."""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from serving import (
    EOS,
    LENGTH,
    MODES,
    NAME,
    RunningServer,
    captured_log,
    events_of,
    expected_output,
    serving,
    texts_of,
    tiny_model,
    wait_until,
)
from test_stopping import TOKENIZER
from torch import Tensor

from twotower import GenerationParams, generate
from twotower.decoding.unmasking import POLICIES, Pass, Verdict, register_policy
from twotower.server.completion_requests import ChatCompletionRequest, CompletionRequest
from twotower.server.neutral_fields import UNSUPPORTED_FIELDS

PROMPT = "the quick"
BOTH = ("/v1/completions", "/v1/chat/completions")
START = {
    "/v1/completions": {"prompt": PROMPT},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}]},
}


@pytest.fixture(scope="module")
def served() -> Iterator[RunningServer]:
    with serving() as found:
        yield found
        wait_until(found.is_idle, "a request is still active")  # a stream ends after its last event has been read


def assert_error(answer: httpx.Response, param: str | None, status: int = 400) -> dict[str, Any]:
    """Asserts that a response has an error in the form of the OpenAI API, and returns the error."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    (error,) = answer.json().values()
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param, error
    assert error["message"]
    assert "\n" not in error["message"]
    return error


def text_of(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    (choice,) = answer.json()["choices"]
    return choice["text"] if "text" in choice else choice["message"]["content"]


# --- texts ------------------------------------------------------------------------------------------------------------


def test_integers_may_be_written_as_floats(served: RunningServer) -> None:
    """JSON does not distinguish 3.0 from 3."""
    with_point = served.complete([77.0, 5.0], max_tokens=3.0, seed=1.0, n=2.0).json()["choices"]
    without = served.complete([77, 5], max_tokens=3, seed=1, n=2).json()["choices"]
    assert [choice["text"] for choice in with_point] == [choice["text"] for choice in without]
    assert_error(served.complete(max_tokens=3.5), "max_tokens")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("prompt", [PROMPT, [77, 5, 300, 301], "世界 👩‍👩‍👧"])
def test_text_equals_python_api(served: RunningServer, mode: str, prompt: Any) -> None:
    fields = {"seed": 5, "max_tokens": 19, "top_p": 0.9, "top_k": 50, "temperature": 0.7, **MODES[mode]}
    expected = expected_output(prompt, **fields)
    answer = served.complete(prompt, **fields)
    assert text_of(answer) == expected.text
    body = answer.json()
    assert body["object"] == "text_completion"
    assert body["model"] == NAME
    assert body["choices"][0]["finish_reason"] == {"eos": "stop", "length": "length"}[expected.finish_reason]
    usage = body["usage"]
    assert usage["prompt_tokens"] == expected.prompt_tokens
    assert usage["completion_tokens"] == len(expected.tokens)
    assert usage["total_tokens"] == expected.prompt_tokens + len(expected.tokens)
    assert usage["passes"] == expected.passes
    assert usage["tokens_per_pass"] == pytest.approx(expected.tokens_per_pass, abs=1e-4)
    decoding = body["choices"][0]["decoding"]
    for name in ("mode", "denoiser_passes", "context_passes", "drafted", "accepted"):
        assert decoding[name] == getattr(expected, name), name
    stream = events_of(served.complete(prompt, **fields, stream=True).text)
    assert texts_of(stream) == {0: expected.text}
    assert stream[-1]["choices"][0]["decoding"]["denoiser_passes"] == expected.denoiser_passes


def test_a_stream_has_a_chunk_for_each_block(served: RunningServer) -> None:
    fields = {"seed": 5, "max_tokens": 40, "block_size": 8}
    events = events_of(served.complete(**fields, stream=True).text)
    assert 3 <= len(events) <= 5  # a block of incomplete characters has no chunk
    reasons = [event["choices"][0]["finish_reason"] for event in events]
    assert reasons == [None] * (len(events) - 1) + ["length"]
    assert len({event["id"] for event in events}) == 1
    assert all("usage" not in event for event in events)


def test_auto_reports_mode_and_reason(served: RunningServer) -> None:
    choice = served.complete(mode="auto", max_tokens=8).json()["choices"][0]
    assert choice["decoding"]["mode"] in ("ar", "verified", "diffusion")
    assert choice["decoding"]["mode_reason"]


def test_eos_ends_a_text(served: RunningServer) -> None:
    params = GenerationParams.of(mode="ar", max_new_tokens=16, temperature=1, seed=range(100), eos_token_id=EOS)
    outputs = generate(tiny_model(), [PROMPT] * 100, params)
    seed = [output.finish_reason for output in outputs].index("eos")
    answer = served.complete(seed=seed, mode="ar").json()
    expected = expected_output(PROMPT, seed=seed, mode="ar")
    assert expected.tokens[-1] == EOS
    assert answer["choices"][0]["text"] == expected.text
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == len(expected.tokens)


@pytest.mark.parametrize("stream", [False, True])
def test_order_of_prompts_and_choices(served: RunningServer, stream: bool) -> None:
    """Choice i of a prompt equals the choice of a request with seed + i."""
    prompts = ["the quick", "brown fox jumps", "世界"]
    fields = {"seed": 40, "max_tokens": 9}
    answer = served.complete(prompts, n=3, **fields, stream=stream, **usage_if(stream))
    assert answer.status_code == 200
    expected = [
        expected_output(prompt, seed=40 + i, max_tokens=9).text for prompt, i in itertools.product(prompts, range(3))
    ]  # fmt: skip
    if stream:
        events = events_of(answer.text)
        assert texts_of(events) == dict(enumerate(expected))
        usage = events[-1]["usage"]
    else:
        body = answer.json()
        assert [choice["index"] for choice in body["choices"]] == list(range(9))
        assert [choice["text"] for choice in body["choices"]] == expected
        assert [choice["decoding"]["seed"] for choice in body["choices"]] == [40, 41, 42] * 3
        usage = body["usage"]
    read = sum(len(TOKENIZER(prompt)["input_ids"]) for prompt in prompts)
    assert usage["prompt_tokens"] == read  # a prompt counts once for all its choices
    assert usage["completion_tokens"] == sum(
        len(expected_output(prompt, seed=40 + i, max_tokens=9).tokens)
        for prompt, i in itertools.product(prompts, range(3))
    )


def usage_if(stream: bool) -> dict[str, Any]:
    return {"stream_options": {"include_usage": True}} if stream else {}


def test_prompts_may_be_lists_of_ids(served: RunningServer) -> None:
    prompts = [[7, 8, 9], [300]]
    body = served.complete(prompts, seed=1).json()
    assert [choice["text"] for choice in body["choices"]] == [
        expected_output(prompt, seed=1).text for prompt in prompts
    ]


def test_seeds(served: RunningServer) -> None:
    """In float64 a seed repeats its text. Without a seed, the response has the seed that repeats the text."""
    assert text_of(served.complete(seed=9)) == text_of(served.complete(seed=9)) != text_of(served.complete(seed=10))
    first, second = (served.complete(max_tokens=40) for _ in range(2))
    assert text_of(first) != text_of(second)
    seed = first.json()["choices"][0]["decoding"]["seed"]
    assert text_of(served.complete(max_tokens=40, seed=seed)) == text_of(first)
    assert text_of(served.complete(temperature=0)) == expected_output(PROMPT, temperature=0).text
    largest = 2**62 - 1
    assert text_of(served.complete(seed=largest)) == expected_output(PROMPT, seed=largest).text


def test_server_defaults_apply_to_absent_fields(served: RunningServer) -> None:
    """Fields of a request override the defaults, also if the defaults use other parameters of the policy."""
    ours = {
        "mode": "diffusion",
        "policy": "factor",
        "policy_value": 0.5,
        "block_size": 8,
        "temperature": 0.5,
        "seed": 7,
    }
    with served.set(decoding=ours):
        assert text_of(served.complete()) == expected_output(PROMPT, **ours).text
        assert (
            text_of(served.complete(temperature=1, seed=8))
            == expected_output(PROMPT, **ours | {"temperature": 1, "seed": 8}).text
        )
        rest = {name: value for name, value in ours.items() if name not in ("policy", "policy_value")}
        for given in ({"threshold": 0.01}, {"policy": "top-k"}, {"policy": "top-k", "policy_value": 4}):
            assert text_of(served.complete(**given)) == expected_output(PROMPT, **rest, **given).text
        assert text_of(served.complete(mode="ar", seed=1)) == expected_output(PROMPT, mode="ar", seed=1).text


@pytest.mark.parametrize("path", BOTH)
@pytest.mark.parametrize("stream", [False, True])
def test_max_tokens_zero(served: RunningServer, path: str, stream: bool) -> None:
    answer = served.post(path, START[path] | {"max_tokens": 0, "stream": stream} | usage_if(stream))
    assert answer.status_code == 200
    if stream:
        events = events_of(answer.text)
        assert texts_of(events) in ({}, {0: ""})
        assert [event["choices"][0]["finish_reason"] for event in events if event["choices"]][-1] == "length"
        assert events[-1]["usage"]["completion_tokens"] == 0
    else:
        assert text_of(answer) == ""
        assert answer.json()["choices"][0]["finish_reason"] == "length"
        assert answer.json()["usage"]["completion_tokens"] == 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("tokens", [0, 12])
def test_echo(served: RunningServer, stream: bool, tokens: int) -> None:
    answer = served.complete(["brown fox", "世界"], echo=True, seed=4, max_tokens=tokens, stream=stream)
    if stream:
        found = texts_of(events_of(answer.text))
    else:
        found = {choice["index"]: choice["text"] for choice in answer.json()["choices"]}
    assert found == {
        place: prompt + expected_output(prompt, seed=4, max_tokens=tokens).text
        for place, prompt in enumerate(["brown fox", "世界"])
    }


@pytest.mark.parametrize("mode", MODES)
def test_stop_strings_never_leak(served: RunningServer, mode: str) -> None:
    """At every position of a text, also across blocks; the same complete, streamed and in the Python API."""
    fields = {"seed": 12, "max_tokens": 26, **MODES[mode]}
    free = expected_output(PROMPT, **fields).text
    for at in range(2, len(free) - 4, 6):
        stop = [free[at : at + 4], "never there", free[at + 2 : at + 4] + "also not"]
        expected = expected_output(PROMPT, **fields, stop=stop)
        assert expected.finish_reason == "stop"
        assert not any(text in expected.text for text in stop)
        answer = served.complete(**fields, stop=stop)
        assert text_of(answer) == expected.text
        assert answer.json()["choices"][0]["finish_reason"] == "stop"
        events = events_of(served.complete(**fields, stop=stop, stream=True).text)
        assert texts_of(events) == {0: expected.text}
        assert events[-1]["choices"][0]["finish_reason"] == "stop"


def test_stop_may_be_one_string(served: RunningServer) -> None:
    fields = {"seed": 12, "max_tokens": 40}
    stop = expected_output(PROMPT, **fields).text[9:12]
    assert text_of(served.complete(**fields, stop=stop)) == expected_output(PROMPT, **fields, stop=[stop]).text
    assert text_of(served.complete(**fields, stop=[])) == expected_output(PROMPT, **fields).text


# --- chats ------------------------------------------------------------------------------------------------------------

TURNS = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "the quick"},
    {"role": "assistant", "content": [{"type": "text", "text": "brown "}, {"type": "text", "text": "fox"}]},
    {"role": "user", "content": "  again  ", "name": "Ann"},
]


@pytest.mark.parametrize("stream", [False, True])
def test_chat_without_a_template(served: RunningServer, stream: bool) -> None:
    prompt = "System: be brief\nUser: the quick\nAssistant: brown fox\nUser: again\nAssistant:"
    fields = {"seed": 6, "max_tokens": 30}
    stops = ["\nSystem:", "\nUser:", "\nAssistant:"]
    expected = expected_output(prompt, **fields, stop=stops).text.lstrip()
    answer = served.post(BOTH[1], {"messages": TURNS, **fields, "stream": stream})
    if stream:
        events = events_of(answer.text)
        deltas = [event["choices"][0]["delta"] for event in events]
        assert deltas[0]["role"] == "assistant"
        assert deltas[0]["content"]  # the role comes with the first text
        assert all("role" not in delta for delta in deltas[1:])
        assert all(event["object"] == "chat.completion.chunk" for event in events)
        assert texts_of(events) == {0: expected}
    else:
        assert text_of(answer) == expected
        assert answer.json()["object"] == "chat.completion"
        assert answer.json()["usage"]["prompt_tokens"] == len(TOKENIZER(prompt)["input_ids"])


def test_chat_template(served: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
        "{% if messages[-1].role == 'assistant' %}{{ raise_exception('who asks?') }}{% endif %}<assistant>"
    )
    monkeypatch.setattr(TOKENIZER, "chat_template", template)
    prompt = "<system>be brief\n<user>the quick\n<assistant>brown fox\n<user>  again  \n<assistant>"
    fields = {"seed": 6, "max_tokens": 30}
    answer = served.post(BOTH[1], {"messages": TURNS, **fields})
    assert text_of(answer) == expected_output(prompt, **fields).text
    error = assert_error(served.post(BOTH[1], {"messages": TURNS[:3]}), "messages")
    assert "who asks?" in error["message"]


def test_role_names_are_stop_strings(served: RunningServer) -> None:
    """Without a chat template, role names are stop strings beside those of the request."""
    request = ChatCompletionRequest.model_validate({"messages": TURNS, "stop": "xyz"})
    choices = asyncio.run(served.service.build_choices(request))
    assert set(choices[0].engine_request.params.stop) == {"xyz", "\nSystem:", "\nUser:", "\nAssistant:"}


def test_default_length_of_a_reply(served: RunningServer) -> None:
    with served.limited(output_tokens=20):
        assert served.chat(mode="ar", seed=1).json()["usage"]["completion_tokens"] <= 20
    body = served.chat(mode="ar", seed=1).json()
    assert body["usage"]["total_tokens"] <= LENGTH
    long = served.chat("x " * 600)
    assert "longer than" in assert_error(long, "messages")["message"]


def test_max_completion_tokens(served: RunningServer) -> None:
    assert served.chat(max_completion_tokens=3, seed=1).json()["usage"]["completion_tokens"] == 3
    assert served.chat(max_completion_tokens=3, max_tokens=3, seed=1).json()["usage"]["completion_tokens"] == 3
    assert_error(served.chat(max_completion_tokens=3, max_tokens=4), "max_tokens")
    assert_error(served.complete(max_completion_tokens=3), "max_completion_tokens")


# --- streams ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", BOTH)
def test_include_usage_adds_a_last_chunk(served: RunningServer, path: str) -> None:
    fields = START[path] | {"seed": 2, "max_tokens": 20, "n": 2}
    events = events_of(served.post(path, fields | {"stream": True, "stream_options": {"include_usage": True}}).text)
    assert all(event["usage"] is None for event in events[:-1])
    assert events[-1]["choices"] == []
    whole = served.post(path, fields).json()["usage"]
    del whole["prompt_tokens_details"], events[-1]["usage"]["prompt_tokens_details"]
    assert events[-1]["usage"] == whole
    silent = served.post(path, fields | {"stream": True, "stream_options": {"include_usage": False}})
    assert all("usage" not in event for event in events_of(silent.text))


@pytest.mark.parametrize("path", BOTH)
def test_continuous_usage(served: RunningServer, path: str) -> None:
    """Every chunk with choices has the tokens so far, also of choices whose texts came before."""
    fields = START[path] | {"seed": 2, "max_tokens": 20, "n": 2, "mode": "ar", "stream": True}
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = events_of(served.post(path, fields | {"stream_options": options}).text)
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts[0] >= 1
    assert counts == sorted(counts)
    assert counts[-2] == counts[-1]
    assert len({event["usage"]["prompt_tokens"] for event in events}) == 1
    assert all(event["usage"].keys() == {"prompt_tokens", "completion_tokens", "total_tokens"} for event in events[:-1])
    silent = served.post(path, fields | {"stream_options": {"continuous_usage_stats": True}})
    assert all("usage" not in event for event in events_of(silent.text))  # as in vLLM, it needs include_usage


def test_no_chunk_before_the_first_text(served: RunningServer) -> None:
    """The time of the first chunk with choices is the time to the first token. An echo comes with the text too."""
    bodies = {BOTH[0]: {"prompt": PROMPT, "echo": True}, BOTH[1]: {"messages": TURNS[:1]}}
    for path, body in bodies.items():
        with served.client() as client, served.step_gate.closed():
            done: list[bytes] = []
            ask = body | {"stream": True, "mode": "ar", "seed": 1, "max_tokens": 4}

            def read(client: Any = client, path: str = path, ask: Any = ask, done: list[bytes] = done) -> None:
                with client.stream("POST", path, json=ask) as answer:
                    done.extend(answer.iter_raw())

            thread = threading.Thread(target=read)
            thread.start()
            served.step_gate.wait_blocked()
            time.sleep(0.05)
            assert done == []
            served.step_gate.allow(None)
            thread.join(20)
            assert b"data: " in done[0]
    answer = served.complete(PROMPT, echo=True, stream=True, mode="ar", seed=1, max_tokens=4)
    first = events_of(answer.text)[0]["choices"][0]["text"]
    assert first.startswith(PROMPT)


def test_a_chat_without_text_has_a_role(served: RunningServer) -> None:
    events = events_of(served.chat(stream=True, max_tokens=0).text)
    assert [event["choices"][0]["delta"] for event in events] == [{"role": "assistant", "content": ""}]


@pytest.mark.parametrize("path", BOTH)
@pytest.mark.parametrize("mode", ["diffusion", "verified"])
def test_stream_denoising(served: RunningServer, path: str, mode: str) -> None:
    """Each pass has an event; committed tokens stay; the last event of each block has the text."""
    fields = START[path] | {"seed": 3, "max_tokens": 20, **MODES[mode]}
    events = events_of(served.post(path, fields | {"stream": True, "stream_denoising": True}).text)
    assert texts_of(events)[0] == text_of(served.post(path, fields))
    shown = [event["denoising"] for event in events if "denoising" in event]
    assert all(event["choices"] == [] for event in events if "denoising" in event)
    last = events[-1]["choices"][0]
    assert len(shown) == last["decoding"]["denoiser_passes"]
    for _, block in itertools.groupby(shown, key=lambda step: step["start"]):
        fixed: dict[int, int] = {}
        for number, step in enumerate(block):
            assert step["index"] == 0
            assert step["step"] == number < step["steps"]
            size = len(step["tokens"])
            assert size == len(step["texts"]) == len(step["masked"]) == len(step["confidence"])
            assert all(0 <= sure <= 1 for sure in step["confidence"])
            now = {place: token for place, token in enumerate(step["tokens"]) if not step["masked"][place]}
            assert fixed.items() <= now.items()
            fixed = now
        if mode == "diffusion":
            assert not any(step["masked"])
    if mode == "diffusion":
        prompt = fields.get("prompt") or "User: x\nAssistant:"
        arguments = {name: value for name, value in fields.items() if name not in ("prompt", "messages")}
        tokens = expected_output(prompt, **arguments).tokens
        final = {step["start"]: step["tokens"] for step in shown}
        assert [token for start in sorted(final) for token in final[start]][: len(tokens)] == tokens


def test_keep_alive_comments(served: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream without events sends comments, which clients ignore."""
    monkeypatch.setattr("twotower.server.choice_events.KEEPALIVE_SECONDS", 0.01)
    with served.step_gate.closed(), served.client() as client:
        fields = {"prompt": PROMPT, "stream": True, "seed": 1, "max_tokens": 4}
        with client.stream("POST", BOTH[0], json=fields) as answer:
            lines = answer.iter_lines()
            assert next(lines) == ": keep-alive"
            served.step_gate.allow(None)
            found = texts_of(events_of("\n".join(lines)))
    assert found == {0: expected_output(PROMPT, seed=1, max_tokens=4).text}


class Broken(Exception):
    pass


@pytest.fixture
def breaking() -> Iterator[str]:
    """A commit policy that raises an error."""

    def decide(seen: Pass, value: Tensor) -> Verdict:
        raise Broken("the policy broke")

    register_policy("breaking", decide, value_meaning="none", default=0.5)
    yield "breaking"
    del POLICIES["breaking"]


def test_an_error_after_the_start_of_a_stream_is_an_event(served: RunningServer, breaking: str) -> None:
    answer = served.chat(policy=breaking, stream=True)
    assert answer.status_code == 200
    (event,) = events_of(answer.text)
    assert set(event) == {"error"}
    assert event["error"]["type"] == "server_error"
    assert served.chat(policy=breaking).status_code == 500
    assert text_of(served.complete(seed=1)) == expected_output(PROMPT, seed=1).text  # other requests are not affected
    wait_until(served.is_idle)


def test_a_failed_engine_is_reported_everywhere() -> None:
    with serving() as served, served.client() as client:
        with (
            served.step_gate.closed(),
            client.stream("POST", BOTH[0], json={"prompt": PROMPT, "stream": True}) as answer,
        ):
            served.step_gate.wait_blocked()

            def fail() -> None:
                raise RuntimeError("a kernel died")

            served.step_gate._step = fail
            served.step_gate.allow(None)
            assert answer.status_code == 200
            (event,) = events_of("".join(answer.iter_text()))
        assert event["error"]["type"] == "server_error"
        assert "a kernel died" in event["error"]["message"]
        for path in ("/health", "/ready"):
            assert_error(served.get(path), None, 503)
        assert "a kernel died" in served.get("/ready").json()["error"]["message"]
        assert "retry-after" in served.complete().headers
        assert_error(served.complete(), None, 503)


# --- invalid requests -------------------------------------------------------------------------------------------------

ON: dict[str, Any] = {
    "frequency_penalty": 0.5, "presence_penalty": -0.1, "best_of": 2, "suffix": "end", "logit_bias": {"5": 1},
    "tools": [{"type": "function"}], "tool_choice": "required", "functions": [{"name": "f"}],
    "function_call": {"name": "f"}, "store": True, "metadata": {"a": "b"}, "service_tier": "flex",
    "modalities": ["text", "audio"], "audio": {}, "prediction": {}, "reasoning_effort": "low",
    "web_search_options": {}, "verbosity": "low", "prompt_cache_key": "a", "safety_identifier": "a",
    "parallel_tool_calls": 1,
}  # fmt: skip


@pytest.mark.parametrize("path", BOTH)
@pytest.mark.parametrize("name", UNSUPPORTED_FIELDS)
def test_unsupported_fields(served: RunningServer, path: str, name: str) -> None:
    """An unsupported field is an error that names the field, except with a value that turns it off."""
    with served.set(strict_fields=True):
        error = assert_error(served.post(path, START[path] | {name: ON[name]}), name)
    assert name in error["message"]
    if path == BOTH[0] or name not in ChatCompletionRequest.model_fields:
        assert error["code"] == "unsupported"
    for off in (*UNSUPPORTED_FIELDS[name], None):
        answer = served.post(path, START[path] | {name: off, "seed": 1, "max_tokens": 2})
        assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("path", BOTH)
def test_unknown_fields(served: RunningServer, path: str) -> None:
    for name in ("max_token", "", "ünknown", "prompt " if "chat" in path else "messages", "__class__"):
        error = assert_error(served.post(path, START[path] | {name: None}), name)
        assert error["code"] == "unsupported"


@pytest.mark.parametrize(
    ("path", "request_model"), list(zip(BOTH, (CompletionRequest, ChatCompletionRequest), strict=True))
)
def test_null_is_the_default(
    served: RunningServer, path: str, request_model: type[CompletionRequest] | type[ChatCompletionRequest]
) -> None:
    needed = START[path]
    nothing = {name: None for name in (*request_model.model_fields, *UNSUPPORTED_FIELDS) if name not in needed}
    defaults = {name: field.default for name, field in request_model.model_fields.items() if name not in needed}
    some = {"seed": 3, "max_tokens": 10}
    plain = text_of(served.post(path, needed | some))
    assert text_of(served.post(path, needed | nothing | some)) == plain
    assert text_of(served.post(path, needed | defaults | some)) == plain


WRONG: list[tuple[str, list[Any]]] = [
    ("temperature", [-0.1, 2.1, "1", True, [], 1e300]),
    ("top_p", [0, -1, 1.5, "0.5", {}]),
    ("top_k", [-1, 1.5, "5", True]),
    ("max_tokens", [-1, 1.5, "16", True, [16], 10**9, 10**30]),
    ("n", [0, -1, 65, 1.5, "1", True, 10**30]),
    ("seed", [-2, 2**62, 1.5, "1", True, 10**30]),
    ("stop", ["", [""], 5, ["a"] * 17, [["a"]], "a" * 257, {"a": 1}, [None]]),
    ("stream", [1, "true", []]),
    ("stream_options", [5, {"include_usage": 1}, {"other": True}, {"include_obfuscation": True}, []]),
    ("model", [5, ["tiny"], True]),
    ("user", [5, [], {}]),
    ("mode", ["fast", 1, "", [], "DIFFUSION"]),
    ("threshold", [-0.1, 1.1, "0.5", True]),
    ("policy", ["unknown", 5, "", ["threshold"]]),
    ("policy_value", ["1", True, [1], -1e300]),
    ("block_size", [0, -1, 17, 4097, 1.5, "8", True]),
    ("steps", [0, -1, 4097, 1.5, "8", True]),
    ("draft_steps", [-1, 4097, 1.5, "8"]),
    ("acceptance", [-0.1, 1.1, "1"]),
    ("stream_denoising", [1, "true"]),
    ("logprobs", [-1, 21, "5", 1.5]),
    ("response_format", [5, {"type": "xml"}, {}, {"type": "json_schema"}, {"type": "text", "regex": "a"}]),
]
MODE_OF = {"draft_steps": "verified", "acceptance": "verified"}
WITH = {"policy_value": {"policy": "threshold"}}


@pytest.mark.parametrize("path", BOTH)
@pytest.mark.parametrize(("name", "values"), WRONG, ids=[name for name, _ in WRONG])
def test_invalid_values(served: RunningServer, path: str, name: str, values: list[Any]) -> None:
    start = START[path] | {"mode": MODE_OF.get(name, "diffusion"), "max_tokens": 4} | WITH.get(name, {})
    for value in values:
        assert_error(served.post(path, start | {name: value}), name)


@pytest.mark.parametrize(
    "prompt",
    ["", [], [""], [[]], ["a", ""], [[5], []], [-1], [320], [2**31], [10**30], [1.5], ["a", 5], [True], 5, {}, None,
     [["a"]], [[["a"]]], "\ud800", ["a", "b\udfff"]],
    ids=repr,
)  # fmt: skip
def test_invalid_prompts(served: RunningServer, prompt: Any) -> None:
    assert_error(served.complete(prompt), "prompt")


@pytest.mark.parametrize(
    "messages",
    [[], None, "hello", {}, [{}], [{"role": "user"}], [{"content": "x"}], [{"role": "tool"}],
     [{"role": "user", "content": 5}], [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
     [{"role": "user", "content": None}], [{"role": "user", "content": "x", "tool_calls": 5}], ["x"], [None],
     [{"role": "user", "content": "half \ud83d"}]],
    ids=repr,
)  # fmt: skip
def test_invalid_messages(served: RunningServer, messages: Any) -> None:
    assert_error(served.post(BOTH[1], {"messages": messages}), "messages")


@pytest.mark.parametrize("path", BOTH)
def test_missing_fields(served: RunningServer, path: str) -> None:
    (name,) = START[path]
    assert assert_error(served.post(path, {}), name)["code"] == "missing"


@pytest.mark.parametrize("path", BOTH)
@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"null", b"5", b'"text"', b"[]", b"\xff\xfe", b"{'prompt': 'x'}", b"[" * 100_000, b'{"a":' * 50_000,
     b'{"prompt": "x", "max_tokens": ' + b"9" * 5000 + b"}",
     "{\"prompt\": \"\udc80\"}".encode("utf-8", "surrogatepass"),
     b"\x00", b"prompt=x", b"{}{}",
     b'{"\\ud800": 1, "prompt": "x"}'],
    ids=lambda body: repr(body[:20]),
)  # fmt: skip
def test_invalid_bodies(served: RunningServer, path: str, body: bytes) -> None:
    answer = served.post(path, body)
    assert answer.status_code == 400, answer.text
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
@pytest.mark.parametrize("name", ["temperature", "top_p", "threshold", "policy_value", "max_tokens", "seed", "n"])
def test_infinite_numbers_and_nan(served: RunningServer, name: str, number: str) -> None:
    assert_error(served.post(BOTH[0], f'{{"prompt": "x", "{name}": {number}}}'.encode()), name)


def test_other_content_types(served: RunningServer) -> None:
    body = b'{"prompt": "x"}'
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        answer = served.post(BOTH[0], body, headers={"content-type": kind})
        assert answer.status_code == 400, answer.text


def test_unusual_characters(served: RunningServer) -> None:
    """Prompts with unusual characters work; a lone surrogate in another field causes no internal error."""
    for text in ("\x00", "\ufeff", "\u202e", "👍🏽", "\n\n", "<mask></s>"):
        assert text_of(served.complete(text, seed=1, max_tokens=3)) == expected_output(text, seed=1, max_tokens=3).text
    assert served.complete("x", stop="\ud800", max_tokens=2).status_code in (200, 400)
    assert served.complete("x", user="\ud800", max_tokens=2).status_code in (200, 400)
    assert served.complete("x", model="\ud800").status_code in (400, 404)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"mode": "ar", "threshold": 0.5}, "threshold"),
        ({"mode": "ar", "policy": "threshold"}, "policy"),
        ({"mode": "mock_ar", "block_size": 8}, "block_size"),
        ({"mode": "ar", "policy_value": 1}, "policy_value"),
        ({"mode": "ar", "steps": 4}, "steps"),
        ({"mode": "verified", "steps": 4}, "steps"),
        ({"mode": "diffusion", "draft_steps": 1}, "draft_steps"),
        ({"draft_steps": 1}, "draft_steps"),
        ({"mode": "ar", "acceptance": 1}, "acceptance"),
        ({"threshold": 0.5, "policy_value": 0.5}, "threshold"),
        ({"threshold": 0.5, "policy": "factor"}, "threshold"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream_denoising": True}, "stream_denoising"),
        ({"stream_denoising": True, "stream": True, "mode": "ar"}, "stream_denoising"),
        ({"response_format": {"type": "json_object"}, "mode": "diffusion"}, "response_format"),
    ],
)
@pytest.mark.parametrize("path", BOTH)
def test_fields_that_exclude_each_other(served: RunningServer, path: str, fields: dict[str, Any], param: str) -> None:
    error = assert_error(served.post(path, START[path] | fields), param)
    assert param in error["message"]


def test_top_logprobs_needs_logprobs(served: RunningServer) -> None:
    assert_error(served.chat(top_logprobs=2), "top_logprobs")


def test_too_many_choices(served: RunningServer) -> None:
    assert_error(served.complete(["a"] * 33, n=2), "n")
    with served.limited(choices=3):
        assert_error(served.complete(n=4), "n")
        assert served.complete(n=3, max_tokens=1).status_code == 200


def test_too_many_tokens(served: RunningServer) -> None:
    assert_error(served.complete([5] * 500, max_tokens=13), "max_tokens")
    assert_error(served.complete([5] * 600, max_tokens=0), "max_tokens")
    assert served.complete([5] * 500, max_tokens=12, mode="ar").status_code == 200


@pytest.mark.parametrize("path", BOTH)
def test_unknown_model(served: RunningServer, path: str) -> None:
    error = assert_error(served.post(path, START[path] | {"model": "other"}), "model", 404)
    assert error["code"] == "model_not_found"
    assert served.post(path, START[path] | {"model": NAME, "max_tokens": 1}).status_code == 200


# --- the other routes -------------------------------------------------------------------------------------------------


def test_models(served: RunningServer) -> None:
    listed = served.get("/v1/models").json()
    assert listed["object"] == "list"
    (model,) = listed["data"]
    assert model["id"] == NAME
    assert model["max_model_len"] == LENGTH
    assert set(MODES) <= set(model["modes"])
    assert model["mask_token_id"] == tiny_model().config.mask_token
    assert served.get(f"/v1/models/{NAME}").json() == model
    for name in ("other", "tiny/other", "%ff", "%ed%a0%80"):
        assert_error(served.get(f"/v1/models/{name}"), "model", 404)


def test_health_and_ready(served: RunningServer) -> None:
    assert served.get("/health").json() == {"status": "ok"}
    assert served.get("/ready").json() == {"status": "ready"}
    served.service.draining = True
    try:
        assert_error(served.get("/ready"), None, 503)
        assert served.get("/health").status_code == 200
        answer = served.complete()
        assert int(answer.headers["retry-after"]) > 0
        assert_error(answer, None, 503)
    finally:
        served.service.draining = False


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v1/completions", 405), ("DELETE", "/health", 405), ("GET", "/nothing", 404), ("GET", "/redoc", 404),
     ("POST", "/v1/embeddings", 404), ("PUT", "/v1/models", 405), ("GET", "/%00", 404), ("GET", "/..%2f..%2fetc", 404)],
)  # fmt: skip
def test_other_paths(served: RunningServer, method: str, path: str, status: int) -> None:
    with served.client() as client:
        answer = client.request(method, path)
    assert_error(answer, None, status)
    assert ("allow" in answer.headers) == (status == 405)


def test_the_schema_names_every_field_and_status(served: RunningServer) -> None:
    schema = served.get("/openapi.json").json()
    assert {"/v1/completions", "/v1/chat/completions", "/v1/models", "/health", "/ready", "/metrics"} <= set(
        schema["paths"]
    )
    for path, request_model in zip(BOTH, ("CompletionRequest", "ChatCompletionRequest"), strict=True):
        operation = schema["paths"][path]["post"]
        assert {"200", "400", "401", "404", "408", "413", "429", "503", "504"} <= set(operation["responses"])
        assert "422" not in operation["responses"]
        assert set(operation["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
        fields = schema["components"]["schemas"][request_model]
        assert fields["additionalProperties"] is False
        known = {"CompletionRequest": CompletionRequest, "ChatCompletionRequest": ChatCompletionRequest}[
            request_model
        ].model_fields
        assert set(fields["properties"]) == set(known)
    assert json.dumps(schema).count("HTTPValidationError") == 0


def test_every_response_has_a_request_id(served: RunningServer) -> None:
    answers = [served.complete(max_tokens=1), served.complete(5), served.get("/nothing"), served.get("/health")]
    numbers = [answer.headers["x-request-id"] for answer in answers]
    assert len(set(numbers)) == len(answers)
    assert all(answer.headers.get("server") is None for answer in answers)


def test_an_internal_error_is_500_and_logged(served: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise Broken("a secret of the server")

    monkeypatch.setattr(served.service._builder, "build", broken)
    served.finish_requests()
    before = served.counts().get(("twotower_requests_total", BOTH[0], "500"), 0)
    with captured_log() as lines:
        answer = served.complete()
        number = answer.headers["x-request-id"]
        served.finish_requests()
    assert "secret" not in answer.text
    assert_error(answer, None, 500)
    assert served.counts()["twotower_requests_total", BOTH[0], "500"] == before + 1
    ours = [line for line in lines if line["id"] == number]
    assert [line["event"] for line in ours] == ["error", "request"]
    assert "a secret of the server" in ours[0]["trace"]


def test_concurrent_requests_equal_single_requests(served: RunningServer) -> None:
    """More requests than rows, in all modes, complete and streamed."""
    from concurrent.futures import ThreadPoolExecutor

    def ask(number: int) -> str:
        fields = {"seed": number, "max_tokens": 1 + number, **list(MODES.values())[number % 4]}
        if number % 3:
            return text_of(served.complete(**fields))
        return texts_of(events_of(served.complete(**fields, stream=True).text))[0]

    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(ask, range(16)))
    for number, text in enumerate(found):
        fields = {"seed": number, "max_tokens": 1 + number, **list(MODES.values())[number % 4]}
        assert text == expected_output(PROMPT, **fields).text, number
    wait_until(served.is_idle)
