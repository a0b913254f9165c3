"""The openai package: tools, results, streams, parsed calls and reasoning."""

import sys
from typing import Literal

import openai
from pydantic import BaseModel

client = openai.OpenAI(base_url=sys.argv[1], api_key="x", max_retries=0)
ASK = {"role": "user", "content": "Is it warm in Ulm?"}


class weather(BaseModel):
    """The weather of a city."""

    city: Literal["Ulm", "Bonn"]


TOOLS = [openai.pydantic_function_tool(weather)]
COMMON = {"model": "small", "tools": TOOLS}

message = client.chat.completions.create(messages=[ASK], **COMMON).choices[0].message
(call,) = message.tool_calls
assert call.function.name == "weather"
result = {"role": "tool", "tool_call_id": call.id, "content": "21"}
answer = client.chat.completions.create(messages=[ASK, message, result], **COMMON).choices[0]
assert "21" in answer.message.content
assert answer.finish_reason == "stop"

with client.chat.completions.stream(messages=[ASK], **COMMON) as stream:
    for _ in stream:
        pass
    choice = stream.get_final_completion().choices[0]
assert choice.finish_reason == "tool_calls"
assert choice.message.tool_calls[0].function.parsed_arguments == weather(city="Ulm")

for tool_choice in ("required", {"type": "function", "function": {"name": "weather"}}):
    parsed = client.chat.completions.parse(messages=[ASK], tool_choice=tool_choice, parallel_tool_calls=False, **COMMON)
    assert isinstance(parsed.choices[0].message.tool_calls[0].function.parsed_arguments, weather)

thought = client.chat.completions.create(model="small", messages=[{"role": "user", "content": "think"}])
assert thought.choices[0].message.reasoning_content == "Ulm is a city."
