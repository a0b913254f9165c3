"""Tools and reasoning in `/v1/chat/completions`: with the `openai` package, a scripted engine, and forced calls."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import openai
import pytest
from chat_templates import TEMPLATES
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel, Field
from scripted import ScriptedLLM
from serving import NAME, TIMEOUT, RunningServer, captured_log, events_of, serving, tiny_model, wait_until
from test_stopping import TOKENIZER
from transformers import PreTrainedTokenizerFast

from twotower import LLM, TwoTowerForCausalLM, bundled_model
from twotower.decoding.stopping import RowProgress
from twotower.server.conversation import ToolUse
from twotower.server.parsers.mistral import MistralCalls
from twotower.server.parsers.pieces import Reply, Tool
from twotower.server.reply import ReplyFormat, ReplyReader
from twotower.server.service import Service
from twotower.server.settings import ServerSettings
from twotower.server.tokenizer_adapter import TokenizerAdapter

CHAT = "/v1/chat/completions"
ASK = {"role": "user", "content": "Is it warm in Ulm?"}
PARAMETERS = {
    "type": "object", "properties": {"city": {"type": "string", "maxLength": 6}, "days": {"enum": [1, 2]}},
    "required": ["city", "days"],
}  # fmt: skip
LOOK: Any = {"type": "function", "function": {"name": "look", "description": "weather", "parameters": PARAMETERS}}
NOW: Any = {"type": "function", "function": {"name": "now"}}
TWO_CALLS = (
    'I look.\n<tool_call>\n{"name": "look", "arguments": {"city": "Ülm", "days": 1}}\n</tool_call>\n'
    '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
)
REPLIES = {
    "calls": TWO_CALLS,
    "thinking": "<think>\nWarm?\n</think>\n\nYes.",
    "both": "<think>\nI look.\n</think>\n\n" + TWO_CALLS.partition("\n")[2],
    "malformed": '<tool_call>{"name": "look", "arguments": {"ci</tool_call>',
    "text": "Yes, it is.",
}


@pytest.fixture(scope="module")
def served() -> Iterator[RunningServer]:
    """A server whose replies to chats are those of `REPLIES`, by the last word of the prompt."""
    patch = pytest.MonkeyPatch()
    patch.setattr(TOKENIZER, "chat_template", TEMPLATES["hermes"])
    engine = ScriptedLLM(LLM(tiny_model(), rows=2, length=2048), lambda prompt: REPLIES[_kind(prompt)])
    with serving(service=Service(engine, ServerSettings(name=NAME))) as found:
        yield found
        wait_until(found.is_idle)
    patch.undo()


def _kind(prompt: str) -> str:
    return next((kind for kind in REPLIES if f"reply: {kind}" in prompt), "text")


@pytest.fixture(scope="module")
def client(served: RunningServer) -> Iterator[openai.OpenAI]:
    with client_of(served) as found:
        yield found


def client_of(server: RunningServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.address}/v1", api_key="x", max_retries=0, timeout=TIMEOUT)


@contextmanager
def template(name: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TOKENIZER, "chat_template", TEMPLATES.get(name))
        yield


def ask(kind: str) -> list[Any]:
    return [{"role": "user", "content": f"reply: {kind}"}]


def last_prompt(served: RunningServer) -> str:
    assert isinstance(served.service.engine, ScriptedLLM)
    return served.service.engine.prompts[-1]


# --- auto -------------------------------------------------------------------------------------------------------------


def test_calls_of_a_reply(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=NAME, messages=ask("calls"), tools=[LOOK, NOW])
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "I look."
    calls = choice.message.tool_calls or []
    assert [(call.type, call.function.name, json.loads(call.function.arguments)) for call in calls] == [
        ("function", "look", {"city": "Ülm", "days": 1}), ("function", "now", {}),
    ]  # fmt: skip
    assert len({call.id for call in calls}) == 2
    ChatCompletion.model_validate(answer.model_dump(), strict=True)


@pytest.mark.parametrize("kind", REPLIES)
def test_streams_have_the_same_reply(served: RunningServer, client: openai.OpenAI, kind: str) -> None:
    """The stream helper of the client joins and checks the chunks."""
    fields: Any = {"model": NAME, "messages": ask(kind), "tools": [LOOK, NOW]}
    whole = client.chat.completions.create(**fields).choices[0]
    with client.chat.completions.stream(**fields) as stream:
        for _ in stream:
            pass
        joined = stream.get_final_completion().choices[0]
    assert joined.finish_reason == whole.finish_reason
    assert (joined.message.content or None) == (whole.message.content or None)
    for one, other in zip(joined.message.tool_calls or [], whole.message.tool_calls or [], strict=True):
        assert (one.function.name, one.function.arguments) == (other.function.name, other.function.arguments)
    events = events_of(served.post(CHAT, fields | {"stream": True}).text)
    for event in events:
        ChatCompletionChunk.model_validate(event, strict=False)
    deltas = [event["choices"][0]["delta"] for event in events]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == (
        getattr(whole.message, "reasoning_content", "") or ""
    )
    starts = [call for delta in deltas for call in delta.get("tool_calls", ()) if "id" in call]
    assert [call["index"] for call in starts] == list(range(len(whole.message.tool_calls or [])))


def test_reasoning_is_apart_from_content(client: openai.OpenAI) -> None:
    message = client.chat.completions.create(model=NAME, messages=ask("thinking")).choices[0].message
    assert (message.content, message.model_extra) == ("Yes.", {"reasoning_content": "Warm?"})
    choice = client.chat.completions.create(model=NAME, messages=ask("both"), tools=[LOOK]).choices[0]
    assert choice.message.content is None
    assert choice.message.model_extra == {"reasoning_content": "I look."}
    assert len(choice.message.tool_calls or []) == 2


def test_what_is_no_call_is_content(client: openai.OpenAI, served: RunningServer) -> None:
    for kind, tools in (("malformed", [LOOK]), ("text", [LOOK])):
        choice = client.chat.completions.create(model=NAME, messages=ask(kind), tools=tools).choices[0]
        assert (choice.message.content, choice.message.tool_calls) == (REPLIES[kind], None)
        assert choice.finish_reason == "stop"
    choice = client.chat.completions.create(
        model=NAME, messages=ask("calls"), tools=[LOOK], tool_choice="none"
    ).choices[0]
    assert choice.message.content == TWO_CALLS
    assert "<tools>" not in last_prompt(served)
    with served.set(tool_parser="none", reasoning_parser="none"):
        for kind in ("calls", "thinking"):
            answer = served.post(CHAT, {"messages": ask(kind), "tools": [LOOK]}).json()
            assert answer["choices"][0]["message"]["content"] == REPLIES[kind]


def test_the_first_call_only(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=NAME, messages=ask("calls"), tools=[LOOK, NOW], parallel_tool_calls=False
    )
    assert [call.function.name for call in answer.choices[0].message.tool_calls or []] == ["look"]


def test_a_reply_that_is_cut_off(client: openai.OpenAI) -> None:
    choice = client.chat.completions.create(model=NAME, messages=ask("calls"), tools=[LOOK], max_tokens=40).choices[0]
    assert choice.finish_reason == "length"
    assert choice.message.tool_calls is None
    assert TWO_CALLS.startswith(choice.message.content or "?")


# --- the chat template ------------------------------------------------------------------------------------------------


def test_the_template_gets_tools_calls_and_results(client: openai.OpenAI, served: RunningServer) -> None:
    answer = client.chat.completions.create(model=NAME, messages=ask("both"), tools=[LOOK, NOW])
    message = answer.choices[0].message
    results: list[Any] = [
        {"role": "tool", "tool_call_id": call.id, "content": "21"} for call in message.tool_calls or []
    ]
    messages = [*ask("both"), message.model_dump(), *results, {"role": "user", "content": "reply: text"}]
    client.chat.completions.create(model=NAME, messages=messages, tools=[LOOK, NOW])
    prompt = last_prompt(served)
    assert json.dumps(LOOK["function"]["parameters"]) in prompt
    assert '"name": "now", "parameters": {"type": "object", "properties": {}}' in prompt
    assert '<think>\nI look.\n</think>\n<tool_call>\n{"name": "look", "arguments": {"city": "' in re.sub(
        "\n+", "\n", prompt
    )
    assert f"<|im_start|>tool\n21 ={results[0]['tool_call_id']}<|im_end|>" in prompt


def test_arguments_of_the_template(client: openai.OpenAI, served: RunningServer) -> None:
    for thinking, end in ((False, "assistant\n<think>\n\n</think>\n\n"), (True, "assistant\n")):
        body: Any = {"chat_template_kwargs": {"enable_thinking": thinking, "unknown": {"a": 1}}}
        client.chat.completions.create(model=NAME, messages=ask("text"), extra_body=body)
        assert last_prompt(served).endswith(end)
    for name in ("chat_template", "tokenize", "messages", "tools", "conversation", "continue_final_message"):
        answer = served.post(CHAT, {"messages": ask("text"), "chat_template_kwargs": {name: "x"}})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "chat_template_kwargs"
        assert name in answer.json()["error"]["message"]


def test_a_prompt_that_begins_the_reasoning(served: RunningServer) -> None:
    """As Nemotron 3 does: the reply begins inside the reasoning."""
    with template("qwen3_coder"), pytest.MonkeyPatch.context() as patch:
        call = "<tool_call>\n<function=look>\n<parameter=days>\n2\n</parameter>\n</function>\n</tool_call>"
        patch.setitem(REPLIES, "text", f"hm, so\n</think>\n{call}")
        message = served.post(CHAT, {"messages": ask("text"), "tools": [LOOK]}).json()["choices"][0]["message"]
        assert message["reasoning_content"] == "hm, so"
        assert message["tool_calls"][0]["function"] == {"name": "look", "arguments": '{"days": 2}'}
        assert message["content"] is None
        patch.setitem(REPLIES, "text", "Yes.")
        body = {"messages": ask("text"), "chat_template_kwargs": {"enable_thinking": False}}
        message = served.post(CHAT, body).json()["choices"][0]["message"]
        assert message == {"role": "assistant", "content": "Yes.", "refusal": None}


def test_ids_that_the_template_of_mistral_accepts(served: RunningServer) -> None:
    with template("mistral"), pytest.MonkeyPatch.context() as patch:
        patch.setitem(REPLIES, "text", '[TOOL_CALLS][{"name": "now", "arguments": {}}]')
        message = served.post(CHAT, {"messages": ask("text"), "tools": [NOW]}).json()["choices"][0]["message"]
        (call,) = message["tool_calls"]
        result = {"role": "tool", "tool_call_id": call["id"], "content": "5"}
        answer = served.post(CHAT, {"messages": [*ask("text"), message, result], "tools": [NOW]})
        assert answer.status_code == 200, answer.text


def test_markers_that_are_special_tokens(served: RunningServer) -> None:
    """Texts of responses leave special tokens out, but parsers see those that they look for."""

    backend = type(TOKENIZER.backend_tokenizer).from_str(TOKENIZER.backend_tokenizer.to_str())
    backend.add_special_tokens(["[TOOL_CALLS]", "[ARGS]", "<think>", "</think>", "[OTHER]"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    text = '<think>hm [OTHER]ü</think>[TOOL_CALLS]look[ARGS]{"city": "Ülm"}'
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    use = ToolUse((Tool("look"),), (), "auto")
    adapter = TokenizerAdapter(tokenizer)
    for size in (1, 2, 3, 100):
        progress = RowProgress(1000, (), ("never", "nev"), tokenizer)
        reader = ReplyReader(ReplyFormat(True, "none", MistralCalls, use), adapter, (), False)
        pieces = []
        for start in range(0, len(tokens), size):
            now = tokens[start : start + size]
            _, shown = progress.take(now, complete=start + size >= len(tokens))
            pieces += reader.take(now, shown, start + size >= len(tokens))
        reply = Reply.of(pieces)
        assert (reply.reasoning, reply.content) == ("hm ü", "")
        assert [(call.name, call.arguments) for call in reply.calls] == [("look", '{"city": "Ülm"}')]


# --- forced calls -----------------------------------------------------------------------------------------------------

FORCED = {
    "required": ("required", [["look", "now"]]),
    "named": ({"type": "function", "function": {"name": "look"}}, [["look"]]),
    "allowed": (
        {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [
            {"type": "function", "function": {"name": "now"}}]}}, [["now"]],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def bundled() -> Iterator[RunningServer]:
    """The bundled model, which has no chat template, and writes the calls itself."""
    model = TwoTowerForCausalLM.from_pretrained(bundled_model(), dtype="float32")
    with serving(rows=2, model=model, decoding={"mode": "verified"}) as found:
        yield found
        wait_until(found.is_idle)


def calls_of(answer: dict[str, Any]) -> list[tuple[str, Any]]:
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    return [
        (call["function"]["name"], json.loads(call["function"]["arguments"]))
        for call in choice["message"]["tool_calls"]
    ]


def assert_matches(name: str, arguments: Any) -> None:
    if name == "now":
        assert arguments == {}
    else:
        assert arguments.keys() == {"city", "days"}
        assert len(arguments["city"]) <= 6
        assert arguments["days"] in (1, 2)


@pytest.mark.parametrize(("choice", "parallel"), [*((choice, False) for choice in FORCED), ("required", True)])
def test_forced_calls(bundled: RunningServer, choice: str, parallel: bool) -> None:
    """In both modes and streamed: the same calls, which match their schemas."""
    given, (names,) = FORCED[choice]
    body = {
        "messages": [ASK], "tools": [LOOK, NOW], "tool_choice": given, "parallel_tool_calls": parallel,
        "temperature": 0, "max_tokens": 300,
    }  # fmt: skip
    found = {}
    for mode in ("ar", "verified"):
        answer = bundled.post(CHAT, body | {"mode": mode})
        assert answer.status_code == 200, answer.text
        found[mode] = calls_of(answer.json())
        for name, arguments in found[mode]:
            assert name in names
            assert_matches(name, arguments)
    assert found["ar"] == found["verified"]
    assert 1 <= len(found["ar"]) <= (8 if parallel and choice != "named" else 1)
    with client_of(bundled) as client, client.chat.completions.stream(model=NAME, **body) as stream:
        pieces = [event for event in stream if event.type == "tool_calls.function.arguments.delta"]
        joined = stream.get_final_completion().choices[0].message.tool_calls or []
    assert [(call.function.name, json.loads(call.function.arguments)) for call in joined] == found["ar"]
    assert choice == "allowed" or len(pieces) > len(joined)  # arguments arrive in pieces


def test_parse_with_tools(bundled: RunningServer) -> None:
    class look(BaseModel):
        city: Annotated[str, Field(max_length=8)]
        days: Literal[1, 2]

    with client_of(bundled) as client:
        answer = client.chat.completions.parse(
            model=NAME, messages=[ASK], tools=[openai.pydantic_function_tool(look)], tool_choice="required",
            parallel_tool_calls=False, seed=1, max_tokens=300,
        )  # fmt: skip
    (call,) = answer.choices[0].message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, look)


def test_a_chat_with_results_without_a_template(bundled: RunningServer) -> None:
    body = {"messages": [ASK], "tools": [NOW], "tool_choice": "required", "parallel_tool_calls": False, "seed": 1}
    message = bundled.post(CHAT, body).json()["choices"][0]["message"]
    result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "noon"}
    with bundled.set(log_prompts=True), captured_log() as lines:
        answer = bundled.post(CHAT, {"messages": [ASK, message, result], "tools": [NOW], "max_tokens": 4})
        assert answer.status_code == 200, answer.text
        wait_until(lambda: any("prompts" in line for line in lines))
    (prompt,) = next(line["prompts"] for line in lines if "prompts" in line)
    assert (
        prompt == '<bos>User: Is it warm in Ulm?\nAssistant: [{"name": "now", "arguments": {}}]\nTool: noon\nAssistant:'
    )


def test_forced_calls_begin_after_the_reasoning(served: RunningServer) -> None:
    """The random model does not end the reasoning that the prompt begins, so all of its text is reasoning."""
    body = {
        "messages": ask("text"), "tools": [NOW], "tool_choice": "required", "parallel_tool_calls": False, "mode": "ar",
        "max_tokens": 60, "seed": 3,
    }  # fmt: skip
    with template("qwen3_coder"):
        choice = served.post(CHAT, body).json()["choices"][0]
        closed = served.post(CHAT, body | {"chat_template_kwargs": {"enable_thinking": False}}).json()
    assert choice["finish_reason"] == "length"
    assert choice["message"]["content"] == ""
    assert choice["message"]["reasoning_content"]
    assert calls_of(closed) == [("now", {})]
    assert "reasoning_content" not in closed["choices"][0]["message"]


# --- errors -----------------------------------------------------------------------------------------------------------

WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"tool_choice": "required"}, "tool_choice", "no tools"),
    ({"tools": [LOOK], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice", "'x'"),
    ({"tools": [LOOK, LOOK]}, "tools", "'look' twice"),
    ({"tools": [LOOK] * 129}, "tools", "128"),
    ({"tools": [{"type": "custom", "custom": {"name": "a"}}]}, "tools", "tools.0"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools", "tools.0.function.name"),
    ({"tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": "array"}}}]}, "tools", "object"),
    ({"tools": [LOOK], "tool_choice": "always"}, "tool_choice", "always"),
    ({"tools": [LOOK], "parallel_tool_calls": "yes"}, "parallel_tool_calls", "boolean"),
    ({"functions": [{"name": "f"}]}, "functions", "functions"),
    ({"chat_template_kwargs": []}, "chat_template_kwargs", "object"),
] + [
    ({"tools": [LOOK], "tool_choice": "required", "mode": mode}, "tool_choice", "mode ar or verified")
    for mode in ("diffusion", "mock_ar", "auto")
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param", "words"), WRONG)
def test_errors_name_the_field(served: RunningServer, fields: dict[str, Any], param: str, words: str) -> None:
    for stream in (False, True):
        answer = served.post(CHAT, {"messages": [ASK], "stream": stream} | fields)
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert error["param"] == param
        assert words in error["message"]


def test_a_response_format_beside_tools(served: RunningServer) -> None:
    """The reply has the format, or begins with a call. Calls of Llama 3 begin as JSON does."""
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    wanted = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    body = {"messages": [ASK], "tools": [NOW], "response_format": wanted, "max_tokens": 60, "mode": "ar"}
    for seed in range(4):
        choice = served.post(CHAT, body | {"seed": seed}).json()["choices"][0]
        message = choice["message"]
        if choice["finish_reason"] == "stop":
            assert json.loads(message["content"])["a"] in (1, 2)
        else:
            assert message.get("reasoning_content") or message["content"].startswith("<tool_call>")
    with template("llama3_json"):
        answer = served.post(CHAT, body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "response_format"


def test_a_schema_that_cannot_be_followed(served: RunningServer) -> None:
    function = {"name": "a", "parameters": {"type": "object", "properties": {"b": {"type": "nonsense"}}}}
    body = {"messages": [ASK], "tools": [{"type": "function", "function": function}]}
    answer = served.post(CHAT, body | {"tool_choice": "required"})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "tools"
    assert "nonsense" in answer.json()["error"]["message"]
    assert served.post(CHAT, body).status_code == 200


def test_without_a_parser_the_text_is_content(served: RunningServer) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TOKENIZER, "chat_template", "{% for m in messages %}{{ m.content }}{% endfor %}")
        answer = served.post(CHAT, {"messages": ask("calls"), "tools": [LOOK]}).json()
    assert answer["choices"][0]["message"]["content"] == TWO_CALLS
