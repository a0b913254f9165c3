"""The package of Ollama: chats, prompts, streams, tools, formats and the list of models."""

import json
import sys

import ollama

client = ollama.Client(host=sys.argv[1].removesuffix("/v1"))
ASK = [{"role": "user", "content": "Is Ulm a city?"}]
assert "small" in [model.model for model in client.list().models]
reply = client.chat(model="small", messages=ASK, options={"num_predict": 60})
assert reply.message.content.strip() == "Yes."
assert reply.message.thinking.strip() == "Ulm is a city."
assert reply.done_reason == "stop"
parts = list(client.chat(model="small", messages=ASK, stream=True))
assert "".join(part.message.content or "" for part in parts).strip() == "Yes."
assert parts[-1].eval_count > 0
assert client.generate(model="small", prompt="Is Ulm a city?").response.strip() == "Yes."


def weather(city: str) -> str:
    """The weather of a city.

    Args:
        city: Name of the city.
    """
    return f"21 degrees in {city}"


called = client.chat(model="small", messages=[{"role": "user", "content": "How warm is it in Ulm?"}], tools=[weather])
(call,) = called.message.tool_calls
assert (call.function.name, call.function.arguments) == ("weather", {"city": "Ulm"})
turns = [*ASK, called.message, {"role": "tool", "tool_name": "weather", "content": weather(**call.function.arguments)}]
assert "21 degrees" in client.chat(model="small", messages=turns, tools=[weather]).message.content
schema = {"type": "object", "properties": {"city": {"enum": ["Ulm"]}}, "required": ["city"]}
formatted = client.chat(model="small", messages=ASK, format=schema, options={"num_predict": 200})
assert formatted.message.content
status = None
try:
    client.chat(model="other", messages=ASK)
except ollama.ResponseError as error:
    status = error.status_code
assert status == 404
json.dumps(called.model_dump())
