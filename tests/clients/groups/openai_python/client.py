"""The openai package: tools, results, streams, parsed calls and reasoning, in both APIs."""

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

# The Responses API.
FLAT = {"type": "function", "name": "weather", "parameters": weather.model_json_schema()}
turns = [ASK]
response = client.responses.create(model="small", input=turns, tools=[FLAT], instructions="Be brief.")
assert response.output_text == "I look."
(item,) = [item for item in response.output if item.type == "function_call"]
turns += [*response.output, {"type": "function_call_output", "call_id": item.call_id, "output": "21"}]
assert "21" in client.responses.create(model="small", input=turns, tools=[FLAT]).output_text

with client.responses.stream(model="small", input=[ASK], tools=[FLAT]) as stream:
    numbers = [event.sequence_number for event in stream]
    final = stream.get_final_response()
assert numbers == list(range(len(numbers)))
assert [one.type for one in final.output] == ["message", "function_call"]

parsed = client.responses.parse(model="small", input=[ASK], text_format=weather, max_output_tokens=300)
assert isinstance(parsed.output_parsed, weather), parsed
thought = client.responses.create(model="small", input="think", store=True)
assert [one.type for one in thought.output] == ["reasoning", "message"]
assert thought.output[0].content[0].text == "Ulm is a city."
assert thought.usage.output_tokens_details.reasoning_tokens > 0
try:
    client.responses.create(model="small", input="think", previous_response_id=thought.id)
except openai.BadRequestError as error:
    refused = error.param
assert refused == "previous_response_id"
