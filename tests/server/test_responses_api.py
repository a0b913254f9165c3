"""`/v1/responses`: with the `openai` package, scripted replies, and the bundled model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import openai
import pytest
from api_replies import PARAMETERS, REPLIES, TWO_CALLS, last_prompt, named_events, scripted_server
from openai.types.responses import Response
from pydantic import BaseModel, Field
from serving import NAME, RunningServer, captured_log, serving, wait_until
from test_tools import client_of, template

from twotower import TwoTowerForCausalLM, bundled_model

PATH = "/v1/responses"
LOOK: Any = {"type": "function", "name": "look", "description": "weather", "parameters": PARAMETERS}
NOW: Any = {"type": "function", "name": "now"}
ASK = "Is it warm in Ulm?"
# What is inside of an item of each type: the events between output_item.added and output_item.done.
INNER = {
    "message": ["content_part.added", "output_text.delta", "output_text.done", "content_part.done"],
    "reasoning": ["content_part.added", "reasoning_text.delta", "reasoning_text.done", "content_part.done"],
    "summary": [
        f"reasoning_summary_{name}" for name in ("part.added", "text.delta", "text.done", "part.done")
    ],
    "function_call": ["function_call_arguments.delta", "function_call_arguments.done"],
}  # fmt: skip


@pytest.fixture(scope="module")
def served() -> Iterator[RunningServer]:
    with scripted_server() as found:
        yield found


@pytest.fixture(scope="module")
def client(served: RunningServer) -> Iterator[openai.OpenAI]:
    with client_of(served) as found:
        yield found


@pytest.fixture(scope="module")
def bundled() -> Iterator[RunningServer]:
    model = TwoTowerForCausalLM.from_pretrained(bundled_model(), dtype="float32")
    with serving(rows=2, model=model, decoding={"mode": "verified"}) as found:
        yield found
        wait_until(found.is_idle)


def without_ids(value: Any) -> Any:
    """A response without what is new in each response."""
    if isinstance(value, list):
        return [without_ids(one) for one in value]
    if not isinstance(value, dict):
        return value
    changing = ("id", "call_id", "item_id", "created_at", "completed_at", "decoding")
    return {name: without_ids(one) for name, one in value.items() if name not in changing}


def create(served: RunningServer, kind: str, **fields: Any) -> dict[str, Any]:
    answer = served.post(PATH, {"input": f"reply: {kind}", "tools": [LOOK, NOW]} | fields)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


# --- replies ----------------------------------------------------------------------------------------------------------


def test_items_of_a_reply(client: openai.OpenAI) -> None:
    response = client.responses.create(model=NAME, input="reply: after", tools=[LOOK, NOW])
    assert [item.type for item in response.output] == ["message", "function_call", "function_call", "message"]
    assert response.output_text == "I look.I have looked."  # the client joins the texts
    calls = [item for item in response.output if item.type == "function_call"]
    assert [(call.name, json.loads(call.arguments)) for call in calls] == [
        ("look", {"city": "Ülm", "days": 1}), ("now", {}),
    ]  # fmt: skip
    assert len({item.id for item in response.output} | {call.call_id for call in calls}) == 6
    assert (response.status, response.store, response.model, response.error) == ("completed", False, NAME, None)
    Response.model_validate(response.model_dump(), strict=False)


@pytest.mark.parametrize("summary", [None, "auto"])
@pytest.mark.parametrize("kind", REPLIES)
def test_streams_have_the_same_response(served: RunningServer, kind: str, summary: str | None) -> None:
    """Numbers without gaps, the frames of items in order, and pieces that join to the whole texts."""
    fields = {"reasoning": {"summary": summary}, "metadata": {"a": "b"}}
    whole = create(served, kind, **fields)
    events = named_events(
        served.post(PATH, {"input": f"reply: {kind}", "tools": [LOOK, NOW], "stream": True} | fields).text
    )
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    last = events[-1]["response"]
    assert events[-1]["type"] == "response.completed"
    assert without_ids(last) == without_ids(whole)
    assert {event["response"]["id"] for event in events if "response" in event} == {last["id"]}
    wanted = []
    for place, item in enumerate(last["output"]):
        own = [event for event in events if event.get("output_index") == place]
        assert own[0]["type"] == "response.output_item.added"
        assert own[0]["item"]["id"] == item["id"]
        assert own[0]["item"]["status"] == "in_progress"
        assert own[-1] == {
            "type": "response.output_item.done", "sequence_number": own[-1]["sequence_number"], "output_index": place,
            "item": item,
        }  # fmt: skip
        assert {event["item_id"] for event in own[1:-1]} == {item["id"]}
        kinds = INNER["summary" if item["type"] == "reasoning" and summary else item["type"]]
        deltas = "".join(event.get("delta", "") for event in own)
        found = list(dict.fromkeys(event["type"].removeprefix("response.") for event in own[1:-1]))
        assert found == [one for one in kinds if deltas or not one.endswith(".delta")]
        text = item["arguments"] if "arguments" in item else (item.get("content") or item["summary"])[0]["text"]
        assert deltas == text
        wanted += own
    assert events[2:-1] == wanted


@pytest.mark.parametrize("kind", ["calls", "both", "text"])
def test_the_stream_helper_of_the_client(client: openai.OpenAI, kind: str) -> None:
    with client.responses.stream(model=NAME, input=f"reply: {kind}", tools=[LOOK, NOW]) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_response()
    whole = client.responses.create(model=NAME, input=f"reply: {kind}", tools=[LOOK, NOW])
    assert without_ids(final.model_dump(exclude={"output": {"__all__": {"parsed_arguments"}}}, warnings=False))[
        "usage"
    ] == without_ids(whole.model_dump())["usage"]  # fmt: skip
    assert final.output_text == whole.output_text
    assert [item.type for item in final.output] == [item.type for item in whole.output]
    assert "response.completed" in kinds


def test_usage(served: RunningServer) -> None:
    usage = create(served, "both")["usage"]
    text = REPLIES["both"]
    tokens = served.service.tokenizer.encode_prompt(text)
    before = served.service.tokenizer.encode_prompt(text[: text.index("</think>")])
    assert usage["output_tokens"] == len(tokens) + 1  # and the end of the text
    assert usage["output_tokens_details"] == {"reasoning_tokens": len(before)}
    assert usage["input_tokens_details"] == {"cached_tokens": 0, "cache_write_tokens": 0}
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert create(served, "text")["usage"]["output_tokens_details"] == {"reasoning_tokens": 0}


@pytest.mark.parametrize("stream", [False, True])
def test_a_response_that_is_cut_off(served: RunningServer, stream: bool) -> None:
    body = {"input": "reply: thinking", "max_output_tokens": 14, "stream": stream}
    answer = served.post(PATH, body)
    found = named_events(answer.text)[-1]["response"] if stream else answer.json()
    assert (found["status"], found["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert [item["status"] for item in found["output"]] == ["incomplete"]
    assert found["usage"]["output_tokens"] == found["usage"]["output_tokens_details"]["reasoning_tokens"] == 14
    if stream:
        assert named_events(answer.text)[-1]["type"] == "response.incomplete"


def test_fields_of_the_request_are_repeated(served: RunningServer) -> None:
    fields = {
        "instructions": "Be brief.", "metadata": {"a": "b"}, "max_output_tokens": 99, "temperature": 0.5, "top_p": 0.9,
        "tool_choice": "auto", "parallel_tool_calls": False, "user": "u", "max_tool_calls": 3,
    }  # fmt: skip
    found = create(served, "text", **fields)
    assert {name: found[name] for name in fields} == fields
    assert [tool["name"] for tool in found["tools"]] == ["look", "now"]


def test_decoding_fields_work_as_in_a_chat(bundled: RunningServer) -> None:
    """The same text as the chat, in each mode, and the passes in a stream."""
    for fields in (
        {"mode": "ar"},
        {"mode": "verified", "draft_steps": 2},
        {"mode": "diffusion", "steps": 4, "threshold": 0.5},
    ):
        shared = fields | {"seed": 3, "temperature": 1}
        chat = bundled.chat(ASK, max_tokens=24, **shared).json()["choices"][0]
        found = bundled.post(PATH, {"input": ASK, "max_output_tokens": 24} | shared).json()
        assert found["output"][0]["content"][0]["text"] == chat["message"]["content"]
        assert found["decoding"]["mode"] == fields["mode"]
        assert found["decoding"]["seed"] == 3
    body = {"input": ASK, "max_output_tokens": 24, "stream": True, "stream_denoising": True, "mode": "diffusion"}
    events = named_events(bundled.post(PATH, body).text)
    assert {"response.denoising", "response.committed"} <= {event["type"] for event in events}
    assert events[-1]["response"]["decoding"]["mode"] == "diffusion"


# --- input ------------------------------------------------------------------------------------------------------------


def test_items_become_the_turns_of_a_chat(served: RunningServer, client: openai.OpenAI) -> None:
    first = client.responses.create(model=NAME, input="reply: both", tools=[LOOK, NOW])
    results = [
        {"type": "function_call_output", "call_id": item.call_id, "output": [{"type": "input_text", "text": "21"}]}
        for item in first.output if item.type == "function_call"
    ]  # fmt: skip
    turns: list[Any] = [
        {"role": "user", "content": [{"type": "input_text", "text": "reply: both"}]},
        *first.output, *results, {"type": "message", "role": "user", "content": "reply: text"},
    ]  # fmt: skip
    client.responses.create(model=NAME, instructions="Be brief.", input=turns, tools=[LOOK, NOW])
    prompt = last_prompt(served)
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "reply: both"},
        {"role": "assistant", "content": None, "reasoning_content": "I look.", "tool_calls": [
            {"id": item.call_id, "type": "function", "function": {"name": item.name, "arguments": item.arguments}}
            for item in first.output if item.type == "function_call"
        ]},
        *({"role": "tool", "tool_call_id": one["call_id"], "content": "21"} for one in results),
        {"role": "user", "content": "reply: text"},
    ]  # fmt: skip
    tools = [{"type": "function", "function": {n: v for n, v in tool.items() if n != "type"}} for tool in (LOOK, NOW)]
    assert served.post("/v1/chat/completions", {"messages": chat, "tools": tools}).status_code == 200
    assert last_prompt(served) == prompt


def test_turns_of_the_assistant(served: RunningServer) -> None:
    """Reasoning, text and calls that follow each other are a turn; a text after calls is the next one."""
    call = {"type": "function_call", "call_id": "a", "name": "now", "arguments": ""}
    text = {"role": "assistant", "content": [{"type": "output_text", "text": "T", "annotations": [], "logprobs": []}]}
    thought = {"type": "reasoning", "id": "r", "summary": [{"type": "summary_text", "text": "hm"}]}
    turns = [{"role": "user", "content": "x"}, thought, text, call, call, text, thought, call]
    assert served.post(PATH, {"input": turns, "tools": [NOW]}).status_code == 200
    written = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'
    thinks, start, end = "<think>hm</think>", "<|im_start|>assistant", "<|im_end|>"
    assert last_prompt(served).partition("user\nx<|im_end|>")[2].replace("\n", "") == (
        f"{start}{thinks}T{written * 2}{end}{start}T{end}{start}{thinks}{written}{end}{start}"
    )


def test_variables_of_the_template(served: RunningServer) -> None:
    create(served, "text", reasoning={"effort": "none"})
    assert last_prompt(served).endswith("<think>\n\n</think>\n\n")
    create(served, "text", reasoning={"effort": "none"}, chat_template_kwargs={"enable_thinking": True})
    assert last_prompt(served).endswith("<|im_start|>assistant\n")


# --- formats and forced calls -----------------------------------------------------------------------------------------


class Trip(BaseModel):
    city: Annotated[str, Field(max_length=6)]
    days: Literal[1, 2]


def test_parse(bundled: RunningServer) -> None:
    with client_of(bundled) as client:
        parsed = client.responses.parse(model=NAME, input=ASK, text_format=Trip, max_output_tokens=200)
        assert isinstance(parsed.output_parsed, Trip)
        with client.responses.stream(model=NAME, input=ASK, text_format=Trip, max_output_tokens=200) as stream:
            assert isinstance(stream.until_done().get_final_response().output_parsed, Trip)


def test_formats(bundled: RunningServer) -> None:
    for kind, more in (("json_object", {}), ("regex", {"regex": "[ab]{3}"}), ("grammar", {"grammar": 'start: "yes"'})):
        body = {"input": ASK, "text": {"format": {"type": kind, **more}}, "max_output_tokens": 40, "seed": 1}
        found = bundled.post(PATH, body).json()
        text = found["output"][0]["content"][0]["text"]
        if kind == "grammar":
            assert text == "yes"
        elif kind == "regex":
            assert len(text) == 3
        elif found["status"] == "completed":
            assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize(
    "choice",
    ["required", {"type": "function", "name": "look"}, {"type": "allowed_tools", "mode": "required", "tools": [
        {"type": "function", "name": "look"}]}],
)  # fmt: skip
def test_forced_calls(bundled: RunningServer, choice: Any) -> None:
    body = {
        "input": ASK, "tools": [LOOK, NOW], "tool_choice": choice, "parallel_tool_calls": False, "temperature": 0,
        "max_output_tokens": 300,
    }  # fmt: skip
    found = bundled.post(PATH, body).json()
    (call,) = found["output"]
    assert found["tool_choice"] == choice
    assert call["name"] == "look" or choice == "required"
    arguments = json.loads(call["arguments"])
    assert arguments == {} or arguments["days"] in (1, 2)
    events = named_events(bundled.post(PATH, body | {"stream": True}).text)
    deltas = [event["delta"] for event in events if event["type"].endswith("arguments.delta")]
    assert "".join(deltas) == call["arguments"]
    assert len(deltas) > 1 or call["name"] == "now"  # arguments arrive in pieces


# --- errors -----------------------------------------------------------------------------------------------------------

WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"previous_response_id": "resp_1"}, "previous_response_id", "keeps no responses"),
    ({"conversation": "conv_1"}, "conversation", "keeps no responses"),
    ({"background": True}, "background", "background"),
    ({"prompt": {"id": "p"}}, "prompt", "instructions"),
    ({"truncation": "auto"}, "truncation", "shorten"),
    ({"include": ["message.output_text.logprobs"]}, "include", "log-probabilities"),
    ({"top_logprobs": 2}, "top_logprobs", "log-probabilities"),
    ({"tools": [{"type": "web_search"}]}, "tools", '"web_search"'),
    ({"tools": [{"type": "\ud800"}]}, "tools", '"\\ud800"'),
    ({"tools": [{"type": "mcp", "server_url": "x"}]}, "tools", '"mcp"'),
    ({"tools": [{"type": "function", "name": "a", "function": {}}]}, "tools", "tools.0.function"),
    ({"tools": [LOOK], "tool_choice": {"type": "file_search"}}, "tool_choice", "file_search"),
    ({"tools": [LOOK], "tool_choice": {"type": "function", "name": "x"}}, "tool_choice", "'x'"),
    ({"tool_choice": "required"}, "tool_choice", "no tools"),
    ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input", "store: false"),
    ({"input": [{"type": "web_search_call", "id": "w"}]}, "input", "web_search_call"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input", "input_image"),
    ({"input": [{"type": "function_call", "call_id": "a", "name": "b", "arguments": "{"}]}, "input", "JSON text"),
    ({"input": [{"role": "user", "content": "x", "cats": 1}]}, "input", "input.0.cats"),
    ({"input": []}, "input", "at least 1"),
    ({"cats": 1}, "cats", "unknown"),
    ({"stop": "x"}, "stop", "unknown"),
    ({"max_output_tokens": 10**6}, "max_output_tokens", "input has"),
    ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text", '"schema"'),
    ({"text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": "cat"}}}}, "text", "cat"),
    ({"text": {"format": {"type": "json_object"}}, "mode": "diffusion"}, "text", "mode ar or verified"),
    ({"tools": [LOOK], "tool_choice": "required", "mode": "diffusion"}, "tool_choice", "mode ar or verified"),
    ({"steps": 3, "mode": "ar"}, "steps", "no effect"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "messages"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param", "words"), WRONG)
def test_errors_name_the_field(served: RunningServer, fields: dict[str, Any], param: str, words: str) -> None:
    for stream in (False, True):
        answer = served.post(PATH, {"input": ASK, "stream": stream} | fields)
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert error["param"] == param
        assert words in error["message"]
        assert "\n" not in error["message"]


def test_responses_are_not_kept(client: openai.OpenAI) -> None:
    response = client.responses.create(model=NAME, input="reply: text", store=True)
    with pytest.raises(openai.NotFoundError, match="responses are not kept"):
        client.responses.retrieve(response.id)


def test_fields_without_an_effect_are_accepted(served: RunningServer) -> None:
    fields = {
        "store": True, "service_tier": "flex", "prompt_cache_key": "k", "safety_identifier": "s", "background": False,
        "truncation": "disabled", "include": ["reasoning.encrypted_content"], "max_tool_calls": 2, "conversation": None,
        "prompt_cache_retention": "24h", "stream_options": {"include_obfuscation": True}, "previous_response_id": None,
        "text": {"verbosity": "low"}, "top_logprobs": 0,
    }  # fmt: skip
    assert create(served, "text", **fields)["store"] is False


def test_an_error_in_a_stream(served: RunningServer) -> None:
    """The time limit: an event of the type error, and a response that failed."""
    with served.limited(request_seconds=0.3), served.step_gate.closed(), template("hermes"):
        format_ = {"format": {"type": "json_object"}}  # with a format the real engine decodes, which the gate blocks
        answer = served.post(PATH, {"input": ASK, "stream": True, "text": format_, "mode": "ar"})
    *_, error, failed = named_events(answer.text)
    assert (error["type"], error["code"]) == ("error", "timeout")
    assert failed["type"] == "response.failed"
    assert failed["response"]["status"] == "failed"
    assert failed["response"]["error"] == {"code": "server_error", "message": error["message"]}
    assert failed["sequence_number"] == error["sequence_number"] + 1
    wait_until(served.is_idle)


@pytest.mark.parametrize("stream", [False, True])
def test_a_disconnect_aborts_the_request(bundled: RunningServer, stream: bool) -> None:
    body = json.dumps({"input": ASK, "stream": stream, "max_output_tokens": 200}).encode()
    head = f"POST {PATH} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    with captured_log() as lines, bundled.step_gate.closed():
        with bundled.connect() as connection:
            connection.sendall(head.encode() + body)
            bundled.step_gate.wait_blocked()
        bundled.step_gate.allow(3)
        wait_until(bundled.is_idle)
        wait_until(lambda: any(line.get("path") == PATH for line in lines))


def test_the_log_has_the_prompt_only_if_asked(served: RunningServer) -> None:
    with served.set(log_prompts=True), captured_log() as lines:
        create(served, "text", user="Ann")
        wait_until(lambda: any("prompts" in line for line in lines))
    line = next(line for line in lines if "prompts" in line)
    assert "reply: text" in line["prompts"][0]
    assert line["user"] == "Ann"


def test_calls_without_a_parser_are_text(served: RunningServer) -> None:
    with served.set(tool_parser="none", reasoning_parser="none"):
        (item,) = create(served, "calls")["output"]
    assert item["content"][0]["text"] == TWO_CALLS
