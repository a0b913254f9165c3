"""openai-agents with its default model, which uses the Responses API: a loop with a tool, streams, and output types."""

import asyncio
import sys
from typing import Literal

from agents import Agent, ModelSettings, OpenAIResponsesModel, Runner, RunResult, function_tool, set_tracing_disabled
from openai import AsyncOpenAI
from pydantic import BaseModel

set_tracing_disabled(True)
loop = asyncio.new_event_loop()  # one for all runs, which share the connections of the client
client = AsyncOpenAI(base_url=sys.argv[1], api_key="x", max_retries=0)
model = OpenAIResponsesModel("small", client)
ASK = "Is it warm in Ulm?"


def run(agent: Agent, asked: object, max_turns: int) -> RunResult:
    return loop.run_until_complete(Runner.run(agent, asked, max_turns=max_turns))


@function_tool
def weather(city: Literal["Ulm", "Bonn"]) -> str:
    """The weather of a city."""
    return f"21 degrees in {city}"


class Trip(BaseModel):
    """A trip."""

    city: Literal["Ulm", "Bonn"]
    days: Literal[1, 2]


agent = Agent(name="a", instructions="Be brief.", model=model, tools=[weather])
result = run(agent, ASK, max_turns=4)
assert "21" in result.final_output
assert [item.type for item in result.new_items] == [
    "message_output_item", "tool_call_item", "tool_call_output_item", "message_output_item",
]  # fmt: skip
again = run(agent, [*result.to_input_list(), {"role": "user", "content": ASK}], max_turns=4)
assert "21" in again.final_output


async def streamed() -> list[str]:
    run = Runner.run_streamed(agent, ASK, max_turns=4)
    kinds = [event.data.type async for event in run.stream_events() if event.type == "raw_response_event"]
    assert "21" in run.final_output
    return kinds


found = loop.run_until_complete(streamed())
assert {"response.function_call_arguments.delta", "response.output_text.delta", "response.completed"} <= set(found)

planner = Agent(name="b", model=model, output_type=Trip)
assert isinstance(run(planner, "A trip to Ulm.", max_turns=2).final_output, Trip)

forced = Agent(
    name="c", model=model, tools=[weather], tool_use_behavior="stop_on_first_tool",
    model_settings=ModelSettings(tool_choice="required", parallel_tool_calls=False, max_tokens=300),
)  # fmt: skip
assert "21 degrees" in run(forced, ASK, max_turns=2).final_output

thought = run(Agent(name="d", model=model), "think", max_turns=1)
assert [item.type for item in thought.new_items] == ["reasoning_item", "message_output_item"]
assert thought.final_output == "Yes."
