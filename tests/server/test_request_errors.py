"""Errors name their parameter: the engine's name in Python, the request's field over HTTP."""

from __future__ import annotations

import ast
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from serving import LENGTH, RunningServer, serving, tiny_model, wait_until

import twotower.server
from twotower import LLM, GenerationParams, Request
from twotower.decoding.presets import parse_setting
from twotower.decoding.prompts import read_prompts
from twotower.decoding.structured import Constraint
from twotower.engine.admission import check_model
from twotower.engine.jobs import engine_for, read_lines, run_job
from twotower.errors import ArgumentError
from twotower.server.completion_requests import ChatCompletionRequest, CompletionRequest
from twotower.server.request_errors import request_error
from twotower.server.settings import Limits

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
REQUEST_MODEL = {COMPLETIONS: CompletionRequest, CHAT: ChatCompletionRequest}
START: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": "x"},
    CHAT: {"messages": [{"role": "user", "content": "x"}]},
}
SCHEMA = {"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}}
TOOL = {"type": "function", "function": {"name": "a", "parameters": {"type": "object", "properties": {}}}}
NONSENSE = {"name": "a", "parameters": {"type": "object", "properties": {"b": {"type": "nonsense"}}}}

# Field → invalid values, each with the other fields of its request. The request's schema, GenerationParams, the engine
# or the server's limits reject the value.
BAD: dict[str, list[tuple[Any, dict[str, Any]]]] = {
    "model": [(5, {})],
    "temperature": [(-1, {}), ("1", {})],
    "top_p": [(0, {}), (2, {})],
    "top_k": [(-1, {})],
    "stop": [("", {}), ([5], {})],
    "seed": [(-2, {})],
    "n": [(0, {}), (65, {}), (20, {})],
    "stream": [("yes", {})],
    "stream_options": [({"include_usage": True}, {})],
    "user": [(5, {})],
    "response_format": [
        ({"type": "regex"}, {}),
        ([{}], {}),
        ("text", {}),
        ({"type": "regex", "regex": "("}, {"mode": "ar"}),
        ({"type": "grammar", "grammar": "nonsense"}, {"mode": "ar"}),
        (SCHEMA, {"mode": "verified"}),
        ({"type": "json_object"}, {"mode": "diffusion"}),
        ({"type": "json_object"}, {"mode": "mock_ar"}),
        ({"type": "regex", "regex": "a", "schema": {}}, {}),
    ],
    "mode": [("fast", {})],
    "threshold": [(2, {}), (0.5, {"mode": "ar"})],
    "policy": [("unknown", {}), ("threshold", {"mode": "ar"})],
    "policy_value": [(-1, {"policy": "threshold"}), (0, {"policy": "top-k"})],
    "block_size": [(0, {}), (17, {}), (17, {"mode": "verified"}), (17, {"mode": "auto"})],
    "steps": [(0, {}), (4, {"mode": "verified"})],
    "draft_steps": [(-1, {"mode": "verified"}), (1, {"mode": "diffusion"})],
    "acceptance": [(2, {"mode": "verified"})],
    "deterministic": [("yes", {}), (1, {})],
    "stream_denoising": [(True, {}), (True, {"stream": True, "mode": "ar"})],
    "max_tokens": [(-1, {}), (LENGTH, {}), (10**9, {}), (10**30, {})],
    "max_completion_tokens": [(-1, {}), (LENGTH, {}), (10**9, {"max_tokens": 10**9})],
    "prompt": [("", {}), ([], {}), ([320], {}), ([5, 10**6], {}), ([5] * LENGTH, {}), ([5] * (LENGTH + 9), {})],
    "messages": [([], {}), ([{"role": "user", "content": "x " * LENGTH}], {})],
    "echo": [(1, {})],
    "logprobs": [("yes", {}), (1.5, {})],
    "top_logprobs": [(21, {"logprobs": True}), (2, {})],
    "tools": [
        (5, {}),
        ([5], {}),
        ([TOOL, TOOL], {}),
        ([{"type": "function", "function": {"name": "a b"}}], {}),
        ([{"type": "function", "function": {"name": "a", "parameters": {"type": "array"}}}], {}),
        ([{"type": "function", "function": NONSENSE}], {"tool_choice": "required"}),
    ],
    "tool_choice": [
        ("always", {}),
        ("required", {}),
        ({"type": "function", "function": {"name": "b"}}, {"tools": [TOOL]}),
        ("required", {"tools": [TOOL], "mode": "diffusion"}),
        ("required", {"tools": [TOOL], "mode": "mock_ar"}),
    ],
    "parallel_tool_calls": [("yes", {}), (1, {})],
    "chat_template_kwargs": [([], {}), ("x", {})],
    "denoiser": [(5, {}), ("unknown", {})],
    "min_p": [(2, {}), ("1", {})],
    "repetition_penalty": [(0, {}), (1000, {})],
    "frequency_penalty": [(3, {})],
    "presence_penalty": [(-2.5, {})],
    "logit_bias": [
        ({"9": 101}, {}),
        ({"x": 1}, {}),
        ({"99999": 1}, {}),
        ({"-1": 1}, {}),
        ({str(token): 1 for token in range(5000)}, {}),
        ([1], {}),
    ],
    "bad_words": [
        ([""], {"mode": "ar"}),
        (["o"] * 300, {"mode": "ar"}),
        (["o" * 300], {}),
        (["o"], {"mode": "diffusion"}),
        (["o"], {"mode": "auto"}),
    ],
    "stop_token_ids": [([99999], {}), ([-1], {}), ([5] * 300, {})],
    "min_tokens": [(-1, {}), (30, {"max_tokens": 20})],
    "ignore_eos": [(1, {})],
    "skip_special_tokens": [("no", {})],
    "best_of": [(1, {"n": 2}), (3, {"stream": True}), (65, {}), (0, {})],
    "guided_json": [("{", {"mode": "ar"}), (5, {}), ({"type": "nonsense"}, {"mode": "ar"})],
    "guided_regex": [("(", {"mode": "ar"}), ("a" * 5000, {}), ("a", {"mode": "diffusion"})],
    "guided_choice": [([], {}), (["b"], {"guided_regex": "a"}), ([""], {"mode": "ar"})],
    "guided_grammar": [("nonsense", {"mode": "ar"})],
    "guided_decoding_backend": [(5, {})],
    "grammar": [("root ::= (", {"mode": "ar"}), ("root ::= other", {"mode": "ar"})],
    "json_schema": [({"type": "nonsense"}, {"mode": "ar"})],
    "structured_outputs": [({}, {}), ({"regex": "a", "choice": ["b"]}, {}), ({"regex": "("}, {"mode": "ar"})],
    "add_generation_prompt": [("no", {})],
    "continue_final_message": [(1, {}), (True, {"add_generation_prompt": True})],
    "reasoning_effort": [(5, {}), ("x" * 65, {})],
    "verbosity": [([], {})],
}
# Names of Python parameters, types and libraries, which mean nothing to an HTTP client.
INTERNAL = re.compile(
    r"max_new_tokens|confidence_threshold|steps_per_block|eos_token_id|mask_token_id|prompt_logprobs|input_ids|towers="
    r"|constr|pydantic|dictionary|None|True|False|Value error|Union|function-|raise (length|memory)"
)
LENGTHS = ("max_tokens", "max_completion_tokens", "prompt", "messages")
CASES = [
    (path, field, value, others)
    for path, request_model in REQUEST_MODEL.items()
    for field in request_model.model_fields
    for value, others in BAD[field]
]


@pytest.fixture(scope="module")
def served() -> Iterator[RunningServer]:
    with serving(limits=Limits(queue=4)) as found:
        yield found
        wait_until(found.is_idle)


@pytest.mark.parametrize(("path", "field", "value", "others"), CASES, ids=lambda part: str(part)[:40])
def test_a_bad_field_is_named(served: RunningServer, path: str, field: str, value: Any, others: dict[str, Any]) -> None:
    answer = served.post(path, START[path] | ({} if field in LENGTHS else {"max_tokens": 4}) | others | {field: value})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == field, answer.text
    message = answer.json()["error"]["message"]
    assert not INTERNAL.search(message), message


# --- from Python ------------------------------------------------------------------------------------------------------

BAD_PARAMETERS: dict[str, list[Any]] = {
    "mode": ["fast", None], "max_new_tokens": [-1, 1.5, True], "temperature": [float("nan"), "1"], "top_k": [0],
    "top_p": [2], "seed": [-1, 2**63], "stop": [[""], 5], "block_size": [0], "steps_per_block": [0],
    "mask_token_id": [-1, 10**6], "confidence_threshold": [2], "policy": ["unknown", ()], "policy_value": [-1],
    "draft_steps": [-1], "acceptance": [-1], "deterministic": [1], "eos_token_id": [10**6, "x"],
    "denoiser": [5, "unknown"],
    "min_p": [1.5, None], "repetition_penalty": [0.0, float("nan"), 1e300], "frequency_penalty": [2.5],
    "presence_penalty": [float("-inf")], "bad_words": [[""], ["  "], [5], ["e" * 300], ["e"] * 300],
    "logit_bias": [
        {5: 101}, {5: float("nan")}, {5: 10**400}, {"x": 1}, {-1: 1}, {10**30: 1}, {True: 1}, 5, [5],
        dict.fromkeys(range(5000), 1),
    ],
    "stop_token_ids": [[99999], ["a"]], "min_tokens": [-1, 5, 1.5], "ignore_eos": [1], "skip_special_tokens": ["no"],
}  # fmt: skip


@pytest.mark.parametrize("name", GenerationParams.__dataclass_fields__)
def test_a_bad_parameter_is_named(name: str) -> None:
    llm = LLM(tiny_model(), rows=1, length=64)
    for value in BAD_PARAMETERS[name]:
        with pytest.raises(ArgumentError) as error:
            llm.add_request(Request([5], GenerationParams.of(**{"max_new_tokens": 4, name: value})))
        assert error.value.param == name, value


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("prompt", ["text", [], [5, "a"], [True], [-1], [320], None]),
        ("logprobs", [-1, 21, True]),
        ("prompt_logprobs", [1]),
        ("constraint", ["[a-z]+"]),
    ],
)
def test_a_bad_part_of_a_request_is_named(name: str, values: list[Any]) -> None:
    llm = LLM(tiny_model(), rows=1, length=64)
    for value in values:
        with pytest.raises(ArgumentError) as error:
            llm.add_request(Request(**{"prompt": [5], "params": GenerationParams(mode="ar"), name: value}))
        assert error.value.param == name, value


@pytest.mark.parametrize("kind", ["json_schema", "regex", "choice", "grammar"])
def test_a_bad_constraint_names_its_kind(kind: str) -> None:
    for value in ("(", "\ud800", 5):
        with pytest.raises(ArgumentError) as error:
            Constraint(tiny_model().tokenizer, **{kind: value})
        assert error.value.param == kind


def test_bad_prompts_and_settings_are_named() -> None:
    ids = torch.ones(1, 3, dtype=torch.long)
    for prompts, mask, name in (
        ([], None, "input_ids"), ([[]], None, "input_ids"), ([[999]], None, "input_ids"), (5, None, "input_ids"),
        (ids.float(), None, "input_ids"), ("x", None, "input_ids"), ([["a"]], None, "input_ids"),
        (ids, ids[:, :2], "attention_mask"), ("x", ids, "attention_mask"),
        (ids, torch.tensor([[1, 0, 1]]), "attention_mask"),
    ):  # fmt: skip
        with pytest.raises(ArgumentError) as error:
            read_prompts(prompts, mask, None, 320, 0)  # type: ignore[arg-type]
        assert error.value.param == name, prompts
    for text in ("fast", "diffusion:x", "ar:colour=1", "ar:top_k=x"):
        with pytest.raises(ArgumentError) as error:
            parse_setting(text)
        assert error.value.param == "setting"


def test_param_survives_pickling() -> None:
    found = pickle.loads(pickle.dumps(ArgumentError("top_k is 0", param="top_k")))
    assert (str(found), found.param) == ("top_k is 0", "top_k")


# --- messages are opaque ----------------------------------------------------------------------------------------------


def test_the_field_does_not_depend_on_the_message() -> None:
    request = CompletionRequest.model_validate({"prompt": "x", "max_tokens": 5})
    error = ArgumentError("top_k is 0; the prompt is empty", param="steps_per_block")
    assert request_error(error, request.field_of(error.param)).param == "steps"
    assert request_error(ArgumentError("top_k is 0"), request.field_of(None)).param is None


def test_fields_of_engine_parameters() -> None:
    whole = CompletionRequest.model_validate({"prompt": "x", "max_tokens": 5})
    short = CompletionRequest.model_validate({"prompt": "x"})
    chat = ChatCompletionRequest.model_validate(START[CHAT])
    newer = ChatCompletionRequest.model_validate(START[CHAT] | {"max_completion_tokens": 5})
    lengths = [request.field_of("max_new_tokens") for request in (whole, short, chat, newer)]
    assert lengths == ["max_tokens", "prompt", "messages", "max_completion_tokens"]
    assert (whole.field_of("prompt"), chat.field_of("prompt")) == ("prompt", "messages")
    assert (whole.field_of("prompt_logprobs"), chat.field_of("prompt_logprobs")) == ("echo", None)
    assert whole.field_of("constraint") == "response_format"
    assert whole.field_of("mask_token_id") is None  # the server's own


def test_no_server_code_parses_messages() -> None:
    """The server passes messages of exceptions on and never parses them."""
    for file in Path(twotower.server.__file__).parent.glob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            inner = node.value if isinstance(node, ast.Attribute | ast.Subscript) else None
            if isinstance(node, ast.Compare):
                inner = next((part for part in (node.left, *node.comparators) if _is_message(part)), None)
            assert not _is_message(inner), f"{file.name}:{getattr(node, 'lineno', 0)} reads a message"


def _is_message(node: ast.AST | None) -> bool:
    """Whether a node is str(error), error.args or error.message of a variable named error."""
    match node:
        case ast.Call(func=ast.Name(id="str"), args=[ast.Name(id="error")]):
            return True
        case ast.Attribute(value=ast.Name(id="error"), attr="args" | "message"):
            return True
    return False


# --- same message everywhere ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "values"),
    [
        ({"max_tokens": 4, "block_size": 17}, {"max_new_tokens": 4, "block_size": 17}),
        ({"max_tokens": 4, "policy": "unknown"}, {"max_new_tokens": 4, "policy": "unknown"}),
    ],
)
def test_the_server_returns_the_engine_s_message(
    served: RunningServer, fields: dict[str, Any], values: dict[str, Any]
) -> None:
    with pytest.raises(ArgumentError) as error:
        LLM(tiny_model(), rows=1, length=LENGTH).add_request(Request([5], GenerationParams.of(**values)))
    assert served.complete([5], **fields).json()["error"]["message"] == str(error.value)


def test_a_batch_job_has_the_engine_s_message(tmp_path: Path) -> None:
    """Also for errors that only the engine finds: one line has the error, the other lines have outputs."""
    path, out, model = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tiny_model()
    path.write_text('{"prompt": "x"}\n{"prompt": "x", "max_new_tokens": 999999999}\n{"prompt": "x"}\n')
    shared = {"mode": "ar", "max_new_tokens": 4, "seed": 1}
    lines = read_lines(path, model, shared)
    with pytest.raises(ArgumentError) as error:
        check_model(model, GenerationParams(mode="ar", max_new_tokens=999999999), [1])
    assert lines[1].error == str(error.value)
    assert run_job(engine_for(model, lines, 2), lines, out) == (3, 1)
    out.unlink()
    with pytest.raises(ArgumentError) as error:
        LLM(model, rows=1, length=4).add_request(Request([5], GenerationParams(mode="ar", max_new_tokens=4)))
    assert run_job(LLM(model, rows=1, length=4), lines, out) == (3, 3)
    assert str(error.value) in out.read_text()
