"""Random requests from the OpenAPI schema: every response matches the schema, and none is 5xx."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS
from serving import RunningServer, serving, wait_until
from test_history import CALL, CHAT, SENT_BACK, TEMPLATE
from test_stopping import TOKENIZER

from twotower.decoding.modes import MODES_OF_FIELD
from twotower.server.message_schemas import Message
from twotower.server.settings import Limits

OPERATIONS = [
    ("/v1/completions", "POST"), ("/v1/chat/completions", "POST"), ("/v1/responses", "POST"), ("/v1/messages", "POST"),
    ("/v1/messages/count_tokens", "POST"), ("/v1/models", "GET"), ("/v1/models/{name}", "GET"),
    ("/health", "GET"), ("/ready", "GET"), ("/metrics", "GET"), ("/version", "GET"), ("/ping", "GET"),
    ("/ping", "POST"), ("/tokenizer_info", "GET"), ("/tokenize", "POST"), ("/detokenize", "POST"),
]  # fmt: skip
WRITING = 5  # the first operations have a body and get most of the cases
SHORT = ("/tokenize", "/detokenize")  # operations with a body and few cases
BOUNDED = ("max_tokens", "max_completion_tokens", "max_output_tokens", "n")  # fields with limits of this server
OF_TOOLS = ("tools", "tool_choice", "chat_template_kwargs")  # fields that depend on each other or on the template
KNOWN = Message.model_fields.keys()
CHECKED = ("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance")


@pytest.fixture(scope="module")
def served() -> Iterator[RunningServer]:
    limits = Limits(output_tokens=8, choices=4, prompt_tokens=300, request_seconds=60)
    with serving(rows=4, limits=limits) as found:
        yield found
        wait_until(found.is_idle)


# A history with every field that clients send back, off and in use.
HISTORY: list[dict[str, Any]] = [
    {"role": "user", "content": [{"type": "text", "text": "hi", "refusal": None}], "name": "Ann"} | SENT_BACK,
    {"role": "assistant", "content": None, "refusal": "no", "tool_calls": [], "annotations": []},
    {"role": "assistant", "content": "yes", "reasoning_content": "hm", "reasoning": "hm"},
]
TOOLS: list[dict[str, Any]] = [
    {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None},
    {"role": "tool", "content": "42", "tool_call_id": "a1", "name": None},
]


TOOL = {"type": "function", "function": {"name": "look", "description": "d", "parameters": {"type": "object"}}}
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=9,
)
# Fields of a request about tools, off, in use and with any value.
TOOL_FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "tools": st.sampled_from([None, [], [TOOL]]) | st.lists(ANY_JSON, max_size=2) | ANY_JSON,
        "tool_choice": st.sampled_from([None, "none", "auto", "required", {"type": "function"}]) | ANY_JSON,
        "parallel_tool_calls": st.none() | st.booleans() | ANY_JSON,
        "functions": st.sampled_from([None, [], [TOOL["function"]]]) | ANY_JSON,
        "function_call": st.sampled_from([None, "none", "auto"]) | ANY_JSON,
    },
)


def simplified(message: dict[str, Any]) -> dict[str, Any]:
    """A message that matches the schema, without what only some chat templates read."""
    kept = {name: value for name, value in message.items() if name in KNOWN and name != "tool_calls"}
    kept["role"] = "user" if message["role"] == "tool" else message["role"]
    return kept | {"content": kept["content"] if isinstance(kept.get("content"), str) else "x"}


def run(
    served: RunningServer,
    path: str,
    method: str,
    cases: int,
    valid: bool,
    history: Sequence[object] = (),
    fields: st.SearchStrategy[dict[str, Any]] = st.just({}),  # noqa: B008  a strategy is immutable
) -> Counter[int]:
    """Sends `cases` requests of an operation and counts the statuses.

    history: turns before those of each chat. fields: further fields of a body.
    """
    schema = schemathesis.openapi.from_url(f"{served.address}/openapi.json")
    mode = GenerationMode.POSITIVE if valid else GenerationMode.NEGATIVE
    strategy = schema[path][method].as_strategy(generation_mode=mode)
    statuses: Counter[int] = Counter()
    checks = [CHECKS.get_one(name) for name in CHECKED]

    @seed(20)
    @settings(
        max_examples=cases, deadline=None, database=None, phases=[Phase.generate], verbosity=Verbosity.quiet,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(case=strategy, more=fields)
    def ask(case: Any, more: dict[str, Any]) -> None:
        # The schema does not express the server's model, limits and policies, nor which fields a mode accepts.
        if valid and isinstance(case.body, dict) and statuses.total() % 2:
            for name in ("model", *MODES_OF_FIELD, *BOUNDED, *OF_TOOLS, "stream_denoising", "stream_options"):
                case.body.pop(name, None)
            if path.startswith("/v1/messages"):
                case.body["messages"] = [{"role": "user", "content": "x"}]
                case.body |= {"max_tokens": 4} if path.endswith("messages") else {}
            elif case.body.get("messages"):
                case.body["messages"] = [simplified(message) for message in case.body["messages"]]
        if history and isinstance(case.body, dict) and isinstance(case.body.get("messages"), list):
            case.body["messages"] = [*history, *case.body["messages"]]
        if isinstance(case.body, dict):
            case.body |= more
        answer = case.call()
        statuses[answer.status_code] += 1
        case.validate_response(answer, checks=checks)

    ask()
    assert max(statuses) < 500
    return statuses


def run_all(served: RunningServer, cases: int) -> Counter[int]:
    """For operations with a body, half of the cases match the schema; other operations get few cases.

    Chats are sent four times: as they are, after a history, after a history with tools to a chat template, and with
    fields about tools.
    """
    statuses: Counter[int] = Counter()
    for valid in (True, False):
        found = run(served, CHAT, "POST", cases // 2, valid, HISTORY)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TOKENIZER, "chat_template", TEMPLATE)
            found += run(served, CHAT, "POST", cases // 2, valid, [*HISTORY, *TOOLS])
            statuses += run(served, CHAT, "POST", cases // 4, valid, [*HISTORY, *TOOLS], TOOL_FIELDS)
        assert found[200] > cases // 10 or not valid
        statuses += found
    for place, (path, method) in enumerate(OPERATIONS):
        share = (cases if place < 2 else cases // 3) if place < WRITING else max(cases // 20, 5)
        for valid in (True, False) if place < WRITING or path in SHORT else (True,):
            statuses += run(served, path, method, share // 2, valid)
    return statuses


def test_operations_exist(served: RunningServer) -> None:
    paths = served.get("/openapi.json").json()["paths"]
    assert {(path, method.upper()) for path, methods in paths.items() for method in methods} >= set(OPERATIONS)


def test_no_request_causes_a_5xx(served: RunningServer) -> None:
    statuses = run_all(served, 75)
    assert statuses[200] > 20
    assert statuses[400] > 20
    print(dict(statuses))


@pytest.mark.slow
def test_no_request_causes_a_5xx_full(served: RunningServer) -> None:
    statuses = run_all(served, 1200)
    assert statuses.total() >= 2000
    print(dict(statuses))
