"""Fields without effect: neutral values at every depth, hints for chat templates, and `--strict-fields`."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from command import Result
from serving import RunningServer, events_of, serving, texts_of, wait_until
from test_stopping import TOKENIZER

from twotower.server import neutral_fields, uvicorn_server
from twotower.server.completion_requests import ChatCompletionRequest, CompletionRequest
from twotower.server.neutral_fields import FILE, WITHOUT_EFFECT, body_fields, nested_fields, neutral_values
from twotower.server.service import Service

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
PATHS = (COMPLETIONS, CHAT)
ASK = {"role": "user", "content": "the quick"}
START: dict[str, dict[str, Any]] = {COMPLETIONS: {"prompt": "the quick"}, CHAT: {"messages": [ASK]}}
MODEL: dict[str, type[CompletionRequest] | type[ChatCompletionRequest]] = {
    COMPLETIONS: CompletionRequest,
    CHAT: ChatCompletionRequest,
}
PACKED = {"seed": 3, "max_tokens": 8}
GENERATOR = Path(__file__).resolve().parents[2] / "tools" / "generate_fields.py"
# Values that would change the text, or the response.
CHANGES: dict[str, Any] = {
    "use_beam_search": True, "length_penalty": 1.5, "include_stop_str_in_output": True, "allowed_token_ids": [5],
    "truncate_prompt_tokens": 3, "prompt_logprobs": 1, "logprob_token_ids": [5], "cache_salt": "a",
    "repetition_detection": {"max_pattern_size": 3}, "thinking_token_budget": 5, "return_token_ids": True,
    "prompt_embeds": "AA==", "watermarking": True, "vllm_xargs": {"a": 1}, "chat_template": "{{ x }}",
    "spaces_between_special_tokens": False, "include_reasoning": False, "documents": [{"text": "a"}],
    "modalities": ["audio"], "moderation": {"model": "a"}, "web_search_options": {"a": 1}, "prediction": {"a": 1},
    "functions": [{"name": "a"}], "function_call": {"name": "a"}, "suffix": "end",
}  # fmt: skip


@pytest.fixture(scope="module")
def served() -> Iterator[RunningServer]:
    with serving(rows=2) as found:
        yield found
        wait_until(found.is_idle)


def text_of(answer: Any) -> str:
    assert answer.status_code == 200, answer.text
    (choice,) = answer.json()["choices"]
    return str(choice["text"] if "text" in choice else choice["message"]["content"])


def route(path: str) -> str:
    return path.removeprefix("/v1/")


def vllm_defaults(path: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(FILE.read_text("utf-8"))["vllm"][route(path)]
    return found


def test_the_list_is_that_of_the_installed_package() -> None:
    """A new version of the package fails here: run the tool, and decide about each new field."""
    pytest.importorskip("openai")
    spec = importlib.util.spec_from_file_location("generate_fields", GENERATOR)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert json.loads(FILE.read_text("utf-8"))["openai"] == module.openai_fields()


@pytest.mark.parametrize("path", PATHS)
def test_null_and_the_defaults_of_other_servers_change_nothing(served: RunningServer, path: str) -> None:
    plain = text_of(served.post(path, START[path] | PACKED))
    nulls = dict.fromkeys(body_fields())
    assert len(nulls) > 60
    assert text_of(served.post(path, nulls | START[path] | PACKED)) == plain
    assert text_of(served.post(path, vllm_defaults(path) | START[path] | PACKED)) == plain
    neutral = {name: own for name, own in neutral_values(route(path)).items() if name not in MODEL[path].model_fields}
    for place in range(max(map(len, neutral.values()))):
        fields = {name: values[place] for name, values in neutral.items() if place < len(values)}
        assert text_of(served.post(path, START[path] | PACKED | fields)) == plain


@pytest.mark.parametrize("path", PATHS)
def test_fields_without_effect_may_have_any_value(served: RunningServer, path: str) -> None:
    plain = text_of(served.post(path, START[path] | PACKED))
    for value in (True, "a", {"a": [1]}, 7):
        fields = dict.fromkeys(WITHOUT_EFFECT, value)
        assert text_of(served.post(path, START[path] | PACKED | fields)) == plain


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", CHANGES)
def test_fields_that_would_change_the_text_are_refused_by_name(served: RunningServer, path: str, name: str) -> None:
    answer = served.post(path, START[path] | {name: CHANGES[name]})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == (name, "unsupported")
    assert name in error["message"]


@pytest.mark.parametrize(
    ("name", "remedy"),
    [("functions", "use tools"), ("function_call", "use tool_choice"), ("suffix", "into prompt")],
)
def test_a_refusal_says_what_to_do(served: RunningServer, name: str, remedy: str) -> None:
    assert remedy in served.post(COMPLETIONS, START[COMPLETIONS] | {name: CHANGES[name]}).json()["error"]["message"]


@pytest.mark.parametrize("half", [0, 1])  # an object may have at most 128 fields
def test_null_fields_of_nested_objects_change_nothing(served: RunningServer, half: int) -> None:
    """Every field of any object of the OpenAI API and of vLLM, in every object of a body that has fixed fields."""
    nulls = dict.fromkeys(sorted(nested_fields())[half::2])

    def filled(value: Any) -> Any:
        if isinstance(value, list):
            return [filled(part) for part in value]
        if not isinstance(value, dict) or "properties" in value:
            return value
        return nulls | {name: filled(part) for name, part in value.items()}

    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
    call = {"id": "a", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    schema = {"name": "a", "schema": {"type": "object", "properties": {}}}
    inner = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "hi"}]},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "a", "content": "42"},
            ASK,
        ],
        "tools": [tool],
        "tool_choice": "none",
        "response_format": {"type": "json_schema", "json_schema": schema},
        "stream_options": {"include_usage": True},
        "stream": True,
    }
    body = {name: filled(value) for name, value in inner.items()} | PACKED
    assert texts_of(events_of(served.post(CHAT, body).text)) == texts_of(
        events_of(served.post(CHAT, inner | PACKED).text)
    )
    named = {"tools": [tool], "tool_choice": {"type": "function", "function": {"name": "look"}}}
    assert served.post(CHAT, {"messages": [ASK]} | {name: filled(value) for name, value in named.items()}).is_success


def test_hints_of_caches_in_contents_and_tools(served: RunningServer) -> None:
    cached = {"cache_control": {"type": "ephemeral"}, "prompt_cache_breakpoint": {"mode": "auto"}}
    message = {"role": "user", "content": [{"type": "text", "text": "the quick"} | cached]}
    assert text_of(served.post(CHAT, {"messages": [message | cached]} | PACKED)) == text_of(
        served.post(CHAT, {"messages": [ASK]} | PACKED)
    )
    tool = {"type": "function", "function": {"name": "look", "defer_loading": True}, "defer_loading": True} | cached
    assert served.post(CHAT, {"messages": [ASK], "tools": [tool]} | PACKED).status_code == 200


def test_hints_reach_a_chat_template_that_reads_them(served: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    message = ASK | {"id": "m1", "name": "Ann"}
    hints = {"reasoning_effort": "low", "verbosity": "high"}
    body = {"messages": [message], **hints, **PACKED}
    plain = text_of(served.post(CHAT, {"messages": [ASK]} | PACKED))
    assert text_of(served.post(CHAT, {"messages": [ASK]} | hints | PACKED)) == plain
    assert served.post(CHAT, body).status_code == 200
    template = "{{ messages[0].id }} {{ messages[0].name }} {{ reasoning_effort }} {{ verbosity }}"
    monkeypatch.setattr(TOKENIZER, "chat_template", template)
    shown = text_of(served.post(COMPLETIONS, {"prompt": "m1 Ann low high"} | PACKED))
    assert text_of(served.post(CHAT, body)) == shown
    own = {"chat_template_kwargs": {"verbosity": "low"}}  # counts before the hint
    assert text_of(served.post(CHAT, body | own)) == text_of(
        served.post(COMPLETIONS, {"prompt": "m1 Ann low low"} | PACKED)
    )


STRICT: list[dict[str, Any]] = [
    {"store": True},
    {"metadata": {"a": "b"}},
    {"prompt_cache_key": "a"},
    {"use_beam_search": False},
    {"moderation": None},
    {"reasoning_effort": "low"},
    {"verbosity": "low"},
    {"messages": [ASK | {"id": "m1"}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {}}]}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "image_url": None}]}]},
]


@pytest.mark.parametrize("fields", STRICT, ids=str)
def test_strict_fields(served: RunningServer, fields: dict[str, Any]) -> None:
    body = START[CHAT] | PACKED | fields
    assert served.post(CHAT, body).status_code == 200
    with served.set(strict_fields=True):
        answer = served.post(CHAT, body)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == next(iter(fields))
        assert served.post(CHAT, START[CHAT] | PACKED | {"store": False, "reasoning_effort": None}).status_code == 200


def test_the_option_reaches_the_server(cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Service] = []
    monkeypatch.setattr(uvicorn_server, "serve_until_signal", lambda service, *_: found.append(service))
    assert cli("serve", "--port", "0", "--rows", "1", "--length", "64", "--strict-fields").code == 0
    (service,) = found
    service.close()
    assert service.settings.strict_fields
    assert not neutral_fields.strict_fields.get()
