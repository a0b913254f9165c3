"""Pydantic AI: its default output, which is a forced call, tools, and streams, in both APIs."""

import asyncio
import os
import sys
from typing import Literal

from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.usage import UsageLimits

model = OpenAIChatModel("small", provider=OpenAIProvider(base_url=sys.argv[1], api_key="x"))
limits = UsageLimits(request_limit=4)


class Trip(BaseModel):
    """A trip."""

    city: Literal["Ulm", "Bonn"]
    days: Literal[1, 2]


planner = Agent(model, output_type=Trip, retries=0)
assert isinstance(planner.run_sync("A trip to Ulm.", usage_limits=limits).output, Trip)

agent = Agent(model, retries=0)


@agent.tool_plain
def weather(city: str) -> str:
    """The weather of a city."""
    return f"21 degrees in {city}"


assert "21" in agent.run_sync("Is it warm in Ulm?", usage_limits=limits).output


async def streamed() -> Trip:
    async with planner.run_stream("A trip to Ulm.", usage_limits=limits) as result:
        return await result.get_output()


assert isinstance(asyncio.run(streamed()), Trip)

# `openai:NAME` is the Responses API; its provider reads the address from the environment.
os.environ |= {"OPENAI_BASE_URL": sys.argv[1], "OPENAI_API_KEY": "x"}
responses = Agent("openai:small", tools=[weather], retries=0)
assert isinstance(responses.model, OpenAIResponsesModel)
assert "21" in responses.run_sync("Is it warm in Ulm?", usage_limits=limits).output
trip = Agent("openai:small", output_type=Trip, retries=0).run_sync("A trip to Ulm.", usage_limits=limits)
assert isinstance(trip.output, Trip)
native = Agent("openai:small", output_type=NativeOutput(Trip), retries=0)
assert isinstance(native.run_sync("A trip to Ulm.", usage_limits=limits).output, Trip)


async def streamed_text(agent: Agent) -> str:
    async with agent.run_stream("think", usage_limits=limits) as result:
        return await result.get_output()


thinker = Agent("openai:small")
thought = thinker.run_sync("think", usage_limits=limits)
assert thought.output == "Yes."
assert [part.part_kind for part in thought.response.parts] == ["thinking", "text"]
assert asyncio.run(streamed_text(thinker)) == "Yes."
