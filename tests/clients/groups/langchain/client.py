"""LangChain and LangGraph: bind_tools, streams, structured output by function calling, and an agent."""

import sys
from typing import Literal

from langchain_core.messages import HumanMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langgraph.prebuilt import create_react_agent
from pydantic import BaseModel

llm = ChatOpenAI(base_url=sys.argv[1], api_key="x", model="small", temperature=0, max_retries=0)
ASK = HumanMessage("Is it warm in Ulm?")


@tool
def weather(city: Literal["Ulm", "Bonn"]) -> str:
    """The weather of a city."""
    return f"21 degrees in {city}"


bound = llm.bind_tools([weather])
answer = bound.invoke([ASK])
(call,) = answer.tool_calls
assert (call["name"], call["args"]) == ("weather", {"city": "Ulm"})
final = bound.invoke([ASK, answer, weather.invoke(call)])
assert "21" in final.content
assert not final.tool_calls

total = None
for chunk in bound.stream([ASK]):
    total = chunk if total is None else total + chunk
assert [(call["name"], call["args"]) for call in total.tool_calls] == [("weather", {"city": "Ulm"})]


class Trip(BaseModel):
    """A trip."""

    city: Literal["Ulm", "Bonn"]
    days: Literal[1, 2]


assert isinstance(llm.with_structured_output(Trip, method="function_calling").invoke("A trip to Ulm."), Trip)
forced = llm.bind_tools([weather], tool_choice="any").invoke([ASK])
assert forced.tool_calls[0]["name"] == "weather"

agent = create_react_agent(llm, [weather])
messages = agent.invoke({"messages": [ASK]}, {"recursion_limit": 6})["messages"]
assert [message.type for message in messages] == ["human", "ai", "tool", "ai"]
