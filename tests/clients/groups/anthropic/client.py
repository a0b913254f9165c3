"""The anthropic package: texts, streams, tools, results, thinking, counted tokens, and errors."""

import sys
from typing import Literal

import anthropic
from pydantic import BaseModel

client = anthropic.Anthropic(base_url=sys.argv[1].removesuffix("/v1"), api_key="x", max_retries=0)
ASK = {"role": "user", "content": "Is it warm in Ulm?"}
WEATHER = {
    "name": "weather", "description": "The weather of a city.",
    "input_schema": {"type": "object", "properties": {"city": {"enum": ["Ulm", "Bonn"]}}, "required": ["city"]},
}  # fmt: skip
COMMON = {"model": "small", "max_tokens": 300}

message = client.messages.create(messages=[ASK], tools=[WEATHER], system="Be brief.", **COMMON)
text, call = message.content
assert (message.stop_reason, text.text, call.name, call.input) == ("tool_use", "I look.", "weather", {"city": "Ulm"})
assert message.usage.input_tokens > 0 and message.usage.output_tokens > 0  # noqa: PT018
result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "21"}]}
turns = [ASK, {"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
answer = client.messages.create(messages=turns, tools=[WEATHER], **COMMON)
assert answer.stop_reason == "end_turn"
assert "21" in answer.content[0].text

with client.messages.stream(messages=[ASK], tools=[WEATHER], **COMMON) as stream:
    kinds = [event.type for event in stream]
    joined = stream.get_final_message()
assert [(block.type, getattr(block, "input", None)) for block in joined.content] == [
    ("text", None), ("tool_use", {"city": "Ulm"}),
]  # fmt: skip
assert joined.usage.output_tokens == message.usage.output_tokens
assert {"message_start", "text", "input_json", "content_block_stop", "message_stop"} <= set(kinds)

for choice in ({"type": "any"}, {"type": "tool", "name": "weather", "disable_parallel_tool_use": True}):
    forced = client.messages.create(messages=[ASK], tools=[WEATHER], tool_choice=choice, **COMMON)
    assert forced.content[0].input["city"] in ("Ulm", "Bonn")
    assert forced.stop_reason in ("tool_use", "max_tokens")

thought = client.messages.create(messages=[{"role": "user", "content": "think"}], **COMMON)
assert [block.type for block in thought.content] == ["thinking", "text"]
assert thought.content[0].thinking == "Ulm is a city."
with client.messages.stream(messages=[{"role": "user", "content": "think"}], **COMMON) as stream:
    assert [block.type for block in stream.get_final_message().content] == ["thinking", "text"]

stopped = client.messages.create(messages=[{"role": "user", "content": "think"}], stop_sequences=["es"], **COMMON)
assert (stopped.stop_reason, stopped.stop_sequence, stopped.content[-1].text) == ("stop_sequence", "es", "Y")


class Trip(BaseModel):
    """A trip."""

    city: Literal["Ulm", "Bonn"]
    days: Literal[1, 2]


parsed = client.messages.parse(messages=[ASK], output_format=Trip, **COMMON)
assert isinstance(parsed.parsed_output, Trip)

count = client.messages.count_tokens(model="small", messages=[ASK], tools=[WEATHER], system="Be brief.")
assert count.input_tokens == message.usage.input_tokens + (message.usage.cache_read_input_tokens or 0)

for fields, kind in (({"model": "other"}, anthropic.NotFoundError), ({"container": "c"}, anthropic.BadRequestError)):
    try:
        client.messages.create(messages=[ASK], **(COMMON | fields))
    except kind as error:
        body = error.body
    assert body["type"] == "error"
    assert next(iter(fields)) in body["error"]["message"]
