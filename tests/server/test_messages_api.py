"""`/v1/messages`: scripted replies, the bundled model, and the form of errors. tests/clients has the real client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from api_replies import PARAMETERS, REPLIES, last_prompt, named_events, scripted_server
from serving import RunningServer, serving, wait_until

from twotower import TwoTowerForCausalLM, bundled_model

PATH = "/v1/messages"
LOOK: Any = {"name": "look", "description": "weather", "input_schema": PARAMETERS}
NOW: Any = {"name": "now", "input_schema": {"type": "object", "properties": {}}}
ASK = [{"role": "user", "content": "Is it warm in Ulm?"}]
DELTAS = {"text_delta": "text", "thinking_delta": "thinking", "input_json_delta": "partial_json"}


@pytest.fixture(scope="module")
def served() -> Iterator[RunningServer]:
    with scripted_server() as found:
        yield found


@pytest.fixture(scope="module")
def bundled() -> Iterator[RunningServer]:
    model = TwoTowerForCausalLM.from_pretrained(bundled_model(), dtype="float32")
    with serving(rows=2, model=model, decoding={"mode": "verified"}) as found:
        yield found
        wait_until(found.is_idle)


def body_of(kind: str, **fields: Any) -> dict[str, Any]:
    asked = [{"role": "user", "content": f"reply: {kind}"}]
    return {"messages": asked, "max_tokens": 500, "tools": [LOOK, NOW]} | fields


def create(served: RunningServer, kind: str, **fields: Any) -> dict[str, Any]:
    answer = served.post(PATH, body_of(kind, **fields))
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def without_ids(content: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in block.items() if name != "id"} for block in content]


def joined(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The blocks of a stream. Each begins, gets its text and ends before the next one."""
    blocks: list[dict[str, Any]] = []
    texts: list[str] = []
    for event in events:
        match event["type"]:
            case "content_block_start":
                assert event["index"] == len(blocks)
                blocks.append(event["content_block"])
                texts = []
            case "content_block_delta":
                assert event["index"] == len(blocks) - 1
                if event["delta"]["type"] != "signature_delta":
                    texts.append(event["delta"][DELTAS[event["delta"]["type"]]])
            case "content_block_stop":
                block = blocks[event["index"]]
                text = "".join(texts)
                name = "input" if block["type"] == "tool_use" else block["type"]
                block[name] = json.loads(text) if name == "input" else text
    return blocks


# --- replies ----------------------------------------------------------------------------------------------------------


def test_blocks_of_a_reply(served: RunningServer) -> None:
    message = create(served, "both")
    assert without_ids(message["content"]) == [
        {"type": "thinking", "thinking": "I look.", "signature": ""},
        {"type": "tool_use", "name": "look", "input": {"city": "Ülm", "days": 1}},
        {"type": "tool_use", "name": "now", "input": {}},
    ]
    assert (message["type"], message["role"], message["stop_reason"]) == ("message", "assistant", "tool_use")
    usage = message["usage"]
    tokens = served.service.tokenizer.encode_prompt(REPLIES["both"])
    before = served.service.tokenizer.encode_prompt(REPLIES["both"].partition("</think>")[0])
    assert usage["output_tokens"] == len(tokens) + 1  # and the end of the text
    assert usage["output_tokens_details"] == {"thinking_tokens": len(before)}
    assert usage["input_tokens"] == len(served.service.tokenizer.encode_prompt(last_prompt(served)))
    assert create(served, "text")["stop_reason"] == "end_turn"
    assert create(served, "empty")["content"] == []


@pytest.mark.parametrize("kind", REPLIES)
def test_streams_have_the_same_message(served: RunningServer, kind: str) -> None:
    whole = create(served, kind)
    events = named_events(served.post(PATH, body_of(kind, stream=True)).text)
    assert [event["type"] for event in (events[0], *events[-2:])] == ["message_start", "message_delta", "message_stop"]
    start, end = events[0]["message"], events[-2]
    assert (start["content"], start["stop_reason"], start["usage"]["input_tokens"]) == (
        [], None, whole["usage"]["input_tokens"],
    )  # fmt: skip
    assert without_ids(joined(events)) == without_ids(whole["content"])
    assert end["delta"] == {name: whole[name] for name in ("stop_reason", "stop_sequence")}
    assert end["usage"] == whole["usage"]


@pytest.mark.parametrize("stream", [False, True])
def test_stop_reasons(served: RunningServer, stream: bool) -> None:
    for fields, reason, sequence, text in (
        ({"stop_sequences": ["is", "it is"]}, "stop_sequence", "it is", "Yes, "),
        ({"max_tokens": 3}, "max_tokens", None, "Yes,"),
        ({}, "end_turn", None, "Yes, it is."),
    ):
        answer = served.post(PATH, body_of("text", stream=stream) | fields)
        if stream:
            events = named_events(answer.text)
            (block,), found = joined(events), events[-2]["delta"]
        else:
            (block,), found = answer.json()["content"], answer.json()
        assert (found["stop_reason"], found["stop_sequence"], block["text"]) == (reason, sequence, text)


def test_the_context_ends_before_max_tokens(served: RunningServer) -> None:
    """Clients must name a limit, and many name a high one: no error. The text ends where the context ends."""
    most = served.service.engine.stats.max_seq_len
    asked = [{"role": "user", "content": "reply: text"}]
    used = served.post(f"{PATH}/count_tokens", {"messages": asked}).json()["input_tokens"]
    asked[0]["content"] += "y" * (most - used - 5)  # a token each
    message = served.post(PATH, {"messages": asked, "max_tokens": 10**6}).json()
    assert (message["usage"]["input_tokens"], message["usage"]["output_tokens"]) == (most - 5, 5)
    assert message["stop_reason"] == "model_context_window_exceeded"
    asked[0]["content"] += "y" * 5
    answer = served.post(PATH, {"messages": asked, "max_tokens": 10**6})
    assert answer.status_code == 400
    assert "maximum context length" in answer.json()["error"]["message"]


def test_decoding_fields_work_as_in_a_chat(bundled: RunningServer) -> None:
    for fields in ({"mode": "ar"}, {"mode": "diffusion", "steps": 4, "threshold": 0.5}):
        shared = fields | {"seed": 3, "max_tokens": 24, "temperature": 1}
        chat = bundled.chat(ASK[0]["content"], **shared).json()["choices"][0]
        found = bundled.post(PATH, {"messages": ASK} | shared).json()
        assert found["content"][0]["text"] == chat["message"]["content"]
        assert (found["decoding"]["mode"], found["decoding"]["seed"]) == (fields["mode"], 3)
    body = {"messages": ASK, "max_tokens": 24, "stream": True, "stream_denoising": True, "mode": "diffusion"}
    kinds = {event["type"] for event in named_events(bundled.post(PATH, body).text)}
    assert {"denoising", "committed"} <= kinds


@pytest.mark.parametrize(
    "choice", [{"type": "any", "disable_parallel_tool_use": True}, {"type": "tool", "name": "look"}]
)
def test_forced_calls(bundled: RunningServer, choice: Any) -> None:
    body = {"messages": ASK, "tools": [LOOK, NOW], "tool_choice": choice, "temperature": 0, "max_tokens": 300}
    message = bundled.post(PATH, body).json()
    (block,) = message["content"]
    assert message["stop_reason"] == "tool_use"
    assert block["input"] == {} or block["input"]["days"] in (1, 2)
    events = named_events(bundled.post(PATH, body | {"stream": True}).text)
    assert without_ids(joined(events)) == without_ids(message["content"])
    cut = bundled.post(PATH, body | {"max_tokens": 4, "tool_choice": {"type": "tool", "name": "look"}}).json()
    assert (cut["stop_reason"], cut["content"][0]["input"]) == ("max_tokens", {})


# --- input ------------------------------------------------------------------------------------------------------------


def test_blocks_become_the_turns_of_a_chat(served: RunningServer) -> None:
    """The prompt is that of the same chat. A message of results is a turn for each of them."""
    first = create(served, "both")
    thought, look, now = first["content"]
    cached = {"cache_control": {"type": "ephemeral"}}
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "reply: both", **cached}]},
        {"role": "assistant", "content": [thought, {"type": "redacted_thinking", "data": "x"}, look, now]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": look["id"], "content": [{"type": "text", "text": "21"}], **cached},
            {"type": "tool_result", "tool_use_id": now["id"], "content": "noon", "is_error": False},
            {"type": "text", "text": "reply: text"},
        ]},
    ]  # fmt: skip
    system = [{"type": "text", "text": "Be brief.", **cached}, {"type": "text", "text": "Be kind."}]
    body = {"messages": turns, "system": system, "tools": [LOOK | cached, NOW], "max_tokens": 100}
    assert served.post(PATH, body).status_code == 200
    prompt = last_prompt(served)
    chat = [
        {"role": "system", "content": "Be brief.\nBe kind."},
        {"role": "user", "content": "reply: both"},
        {"role": "assistant", "content": None, "reasoning_content": "I look.", "tool_calls": [
            {"id": call["id"], "type": "function", "function": {"name": call["name"], "arguments": call["input"]}}
            for call in (look, now)
        ]},
        {"role": "tool", "tool_call_id": look["id"], "content": "21"},
        {"role": "tool", "tool_call_id": now["id"], "content": "noon"},
        {"role": "user", "content": "reply: text"},
    ]  # fmt: skip
    tools = [
        {"type": "function", "function": {"name": tool["name"], "parameters": tool["input_schema"]} | (
            {"description": tool["description"]} if "description" in tool else {})}
        for tool in (LOOK, NOW)
    ]  # fmt: skip
    assert served.post("/v1/chat/completions", {"messages": chat, "tools": tools}).status_code == 200
    assert last_prompt(served) == prompt
    counted = served.post(f"{PATH}/count_tokens", {name: body[name] for name in ("messages", "system", "tools")})
    assert counted.json() == {"input_tokens": len(served.service.tokenizer.encode_prompt(prompt))}


def test_thinking_is_a_variable_of_the_template(served: RunningServer) -> None:
    create(served, "text", thinking={"type": "disabled"})
    assert last_prompt(served).endswith("<think>\n\n</think>\n\n")
    create(served, "text", thinking={"type": "enabled", "budget_tokens": 1024})
    assert last_prompt(served).endswith("<|im_start|>assistant\n")


def test_a_reply_continues_the_last_turn_of_the_assistant(served: RunningServer) -> None:
    answer = served.post(PATH, body_of("text", messages=[*ASK, {"role": "assistant", "content": "It is"}]))
    assert answer.status_code == 200, answer.text
    assert last_prompt(served).endswith("<|im_start|>assistant\nIt is")


# --- errors -----------------------------------------------------------------------------------------------------------

IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}
USE = {"type": "tool_use", "id": "a", "name": "b", "input": {}}
RESULT = {"type": "tool_result", "tool_use_id": "a", "content": [IMAGE]}
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages is []"),
    ({"messages": [{"role": "user", "content": [IMAGE]}]}, '"image"'),
    ({"messages": [{"role": "user", "content": [RESULT]}]}, '"image"'),
    ({"messages": [{"role": "user", "content": [USE]}]}, "only a message of the assistant"),
    ({"messages": [{"role": "assistant", "content": [{"type": "tool_result", "tool_use_id": "a"}]}]}, "of the user"),
    ({"messages": [*ASK, {"role": "assistant", "content": [USE]}]}, "messages.1 is the last message and has"),
    ({"messages": [{"role": "cat", "content": "x"}]}, "messages.0.role"),
    ({"messages": [{"role": "user", "content": [{"text": "x"}]}]}, '"type"'),
    ({"max_tokens": 0}, "max_tokens is 0"),
    ({"max_tokens": None}, "max_tokens is null"),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "web_search_20250305"),
    ({"tools": [{"name": "a", "input_schema": {"type": "array"}}]}, "input_schema"),
    ({"tools": [NOW], "tool_choice": {"type": "tool", "name": "x"}}, "'x'"),
    ({"tool_choice": {"type": "any"}}, "no tools"),
    ({"tools": [NOW], "tool_choice": {"type": "any"}, "mode": "diffusion"}, "mode ar or verified"),
    ({"container": "c"}, "container"),
    ({"mcp_servers": [{}]}, "mcp_servers"),
    ({"stop_sequences": [""]}, "stop_sequences"),
    ({"cats": 1}, "cats is an unknown field"),
    ({"n": 2}, "n is an unknown field"),
    ({"steps": 3, "mode": "ar"}, "no effect"),
    ({"output_config": {"format": {"type": "json_schema", "schema": {"type": "cat"}}}}, "cat"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "words"), WRONG)
def test_errors_have_the_form_of_the_api(served: RunningServer, fields: dict[str, Any], words: str) -> None:
    for stream in (False, True):
        answer = served.post(PATH, {"messages": ASK, "max_tokens": 8, "stream": stream} | fields)
        assert answer.status_code == 400, answer.text
        found = answer.json()
        assert found.keys() == {"type", "error", "request_id"}
        assert (found["type"], found["error"]["type"]) == ("error", "invalid_request_error")
        assert found["request_id"] == answer.headers["x-request-id"]
        assert words in found["error"]["message"]
        assert "\n" not in found["error"]["message"]


def test_statuses_of_errors(served: RunningServer) -> None:
    body = {"messages": ASK, "max_tokens": 8}
    cases = [
        (served.post(PATH, body | {"model": "other"}), 404, "not_found_error"),
        (served.post(PATH, b"{"), 400, "invalid_request_error"),
        (served.get(PATH), 405, "invalid_request_error"),
        (served.post(f"{PATH}/batches", body), 404, "not_found_error"),
        (served.post(f"{PATH}/count_tokens", {}), 400, "invalid_request_error"),
    ]
    with served.limited(body_bytes=10):
        cases.append((served.post(PATH, body), 413, "request_too_large"))
    for answer, status, kind in cases:
        assert answer.status_code == status, answer.text
        assert answer.json()["error"]["type"] == kind


def test_the_key_of_the_api() -> None:
    with serving(rows=1, api_keys=("secret",)) as served:
        body = {"messages": ASK, "max_tokens": 2}
        for headers, status in (({}, 401), ({"x-api-key": "no"}, 401), ({"x-api-key": "secret"}, 200)):
            answer = served.post(PATH, body, headers=headers)
            assert answer.status_code == status
            assert status == 200 or answer.json()["error"]["type"] == "authentication_error"


def test_an_error_in_a_stream(served: RunningServer) -> None:
    body = body_of("text", stream=True, tool_choice={"type": "any"}, mode="ar")  # forced: the real engine decodes
    with served.limited(request_seconds=0.3), served.step_gate.closed():
        answer = served.post(PATH, body)
    error = named_events(answer.text)[-1]
    assert (error["type"], error["error"]["type"]) == ("error", "timeout_error")
    wait_until(served.is_idle)


@pytest.mark.parametrize("stream", [False, True])
def test_a_disconnect_aborts_the_request(bundled: RunningServer, stream: bool) -> None:
    body = json.dumps({"messages": ASK, "stream": stream, "max_tokens": 200}).encode()
    head = f"POST {PATH} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    with bundled.step_gate.closed():
        with bundled.connect() as connection:
            connection.sendall(head.encode() + body)
            bundled.step_gate.wait_blocked()
        bundled.step_gate.allow(3)
        wait_until(bundled.is_idle)
