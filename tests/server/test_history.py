"""Chats with history: every field that clients send back, null as "off" at every depth, and chat templates."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from serving import NAME, TIMEOUT, RunningServer, expected_output, serving, wait_until
from test_stopping import TOKENIZER

CHAT = "/v1/chat/completions"
ASK = {"role": "user", "content": "the quick"}
CALL = {"id": "a1", "type": "function", "function": {"name": "look", "arguments": '{"city": "Ulm"}'}}
# What the openai package's ChatCompletionMessage, LiteLLM's Message and vLLM's responses have beside role and content.
SENT_BACK: dict[str, Any] = {
    "refusal": None, "annotations": None, "audio": None, "function_call": None, "tool_calls": None,
    "reasoning_content": None, "reasoning": None, "name": None, "thinking_blocks": None,
    "provider_specific_fields": None,
}  # fmt: skip
TEMPLATE = """
{%- for m in messages %}<{{ m.role }}{{ ' ' + m.name if m.name is defined }}>{{ m.content }}
{%- if m.reasoning_content %}[{{ m.reasoning_content }}]{% endif %}
{%- if m.tool_calls %}{% for c in m.tool_calls %}{{ c.function.name }}({{ c.function.arguments.city }}){% endfor %}
{%- endif %}{%- if m.role == 'tool' %}={{ m.tool_call_id }}{% endif %}{%- if m.mood %}~{{ m.mood }}{% endif %}
{%- endfor %}<assistant>"""


@pytest.fixture(scope="module")
def served() -> Iterator[RunningServer]:
    with serving(rows=2) as found:
        yield found
        wait_until(found.is_idle)


@pytest.fixture
def template(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TOKENIZER, "chat_template", TEMPLATE)


def ask(served: RunningServer, *messages: Any, **fields: Any) -> Any:
    return served.post(CHAT, {"messages": list(messages), "max_tokens": 4, "seed": 1, **fields})


def prompt_of(served: RunningServer, *messages: Any) -> str:
    """The prompt that the engine gets for these messages."""
    with served.set(log_prompts=True):
        from serving import captured_log

        with captured_log() as lines:
            answer = ask(served, *messages)
            assert answer.status_code == 200, answer.text
            wait_until(lambda: any("prompts" in line for line in lines))
    (prompt,) = next(line["prompts"] for line in lines if "prompts" in line)
    return str(prompt)


# --- the openai package -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dumped", [False, True])
def test_a_reply_may_be_appended_to_the_messages(served: RunningServer, dumped: bool) -> None:
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{served.address}/v1", api_key="x", max_retries=0, timeout=TIMEOUT) as client:
        messages: list[Any] = [ASK]
        for turn in range(3):
            answer = client.chat.completions.create(model=NAME, messages=messages, max_tokens=4, seed=turn)
            message = answer.choices[0].message
            messages += [message.model_dump() if dumped else message, {"role": "user", "content": "and then?"}]
        assert len(messages) == 7


@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant"])
def test_null_fields_of_a_message_are_off(served: RunningServer, role: str) -> None:
    plain = ask(served, {"role": role, "content": "hello"}, ASK).json()["choices"][0]["message"]
    for off in (SENT_BACK, {"tool_calls": [], "annotations": []}):
        answer = ask(served, {"role": role, "content": "hello"} | off, ASK | off)
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["message"] == plain


def test_an_assistant_needs_no_content(served: RunningServer) -> None:
    for content in ({"content": None}, {}, {"content": ""}, {"content": []}):
        assert prompt_of(served, {"role": "assistant"} | content, ASK) == "Assistant:\nUser: the quick\nAssistant:"
    for role in ("user", "system"):
        assert ask(served, {"role": role, "content": None}).status_code == 400
    refused = {"role": "assistant", "content": None, "refusal": "no"}
    parts = {"role": "assistant", "content": [{"type": "refusal", "refusal": "no", "text": None}]}
    for message in (refused, parts):
        assert prompt_of(served, message, ASK) == "Assistant: no\nUser: the quick\nAssistant:"


@pytest.mark.parametrize(
    "fields",
    [
        {"stream": True, "stream_options": {"include_usage": None, "include_obfuscation": None}},
        {"response_format": {"type": "text", "json_schema": None, "regex": None, "grammar": None}},
        {
            "response_format": {
                "type": "json_schema",
                "regex": None,
                "json_schema": {"name": "a", "strict": None, "description": None, "schema": {"type": "object"}},
            }
        },
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "refusal": None}]}]},
        {"logprobs": None, "top_logprobs": None, "stop": None, "n": None},
    ],
)
def test_null_is_off_at_every_depth(served: RunningServer, fields: dict[str, Any]) -> None:
    answer = served.post(CHAT, {"messages": [ASK], "max_tokens": 4, "seed": 1} | fields)
    assert answer.status_code == 200, answer.text


# --- chat templates ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("template")
def test_the_template_gets_every_field_that_it_reads(served: RunningServer) -> None:
    messages = [
        {"role": "user", "content": "hi", "name": "Ann", "mood": "glad"},
        {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": [CALL]},
        {"role": "tool", "content": "42", "tool_call_id": "a1"},
    ]
    expected = "<user Ann>hi~glad<assistant>[hm]look(Ulm)<tool>42=a1<assistant>"
    assert prompt_of(served, *messages) == expected
    call = CALL | {"function": {"name": "look", "arguments": {"city": "Ulm"}}, "index": 0}
    messages[1]["tool_calls"] = [call]
    assert prompt_of(served, *messages) == expected
    reply = ask(served, *messages).json()["choices"][0]["message"]["content"]
    assert reply == expected_output(expected, max_tokens=4, seed=1).text


@pytest.mark.usefixtures("template")
def test_a_null_field_is_undefined_in_the_template(served: RunningServer) -> None:
    assert prompt_of(served, ASK | SENT_BACK) == "<user>the quick<assistant>"


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (ASK | {"colour": "red"}, "messages.0.colour"),
        (ASK | {"tool_calls": [CALL]}, "messages.0.tool_calls"),
        ({"role": "tool", "content": "42", "tool_call_id": "a1"}, "messages.0.role"),
        (ASK | {"annotations": [{"type": "url_citation"}]}, "messages.0.annotations"),
        (ASK | {"x" * 5000: 1}, "messages.0.xxx"),
    ],
)
def test_a_field_that_the_template_does_not_read_is_an_error(
    served: RunningServer, message: dict[str, Any], field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TOKENIZER, "chat_template", "{% for m in messages %}{{ m.content }}{% endfor %}")
    answer = ask(served, message)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == "messages"
    assert field in error["message"]
    assert len(error["message"]) <= 1000


def test_without_a_template_calls_and_results_are_lines(served: RunningServer) -> None:
    calls = {"role": "assistant", "content": "I look.", "tool_calls": [CALL, CALL]}
    written = '{"name": "look", "arguments": {"city": "Ulm"}}'
    assert prompt_of(served, ASK, calls, {"role": "tool", "content": "42", "tool_call_id": "a1"}) == (
        f"User: the quick\nAssistant: I look. [{written}, {written}]\nTool: 42\nAssistant:"
    )
    assert ask(served, ASK | {"tool_calls": [CALL]}).status_code == 400
    assert ask(served, ASK | {"colour": "red"}).status_code == 400


@pytest.mark.usefixtures("template")
def test_reasoning_is_another_name_of_reasoning_content(served: RunningServer) -> None:
    assert prompt_of(served, {"role": "assistant", "content": "a", "reasoning": "hm"}) == "<assistant>a[hm]<assistant>"


@pytest.mark.usefixtures("template")
@pytest.mark.parametrize("arguments", ["{", "[]", "5", 5, None, "[" * 5000])
def test_arguments_of_a_call_must_be_an_object(served: RunningServer, arguments: Any) -> None:
    call = {"type": "function", "function": {"name": "look", "arguments": arguments}}
    answer = ask(served, {"role": "assistant", "tool_calls": [call]}, ASK)
    assert answer.status_code == 400
    assert "messages.0.tool_calls.0.function.arguments" in answer.json()["error"]["message"]
