"""LlamaIndex: calls of tools, and structured output."""

import sys
from typing import Literal

from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel

llm = OpenAILike(
    model="small", api_base=sys.argv[1], api_key="x", is_chat_model=True, is_function_calling_model=True,
    context_window=4096, max_tokens=300, temperature=0, max_retries=0,
)  # fmt: skip


def weather(city: str) -> str:
    """The weather of a city."""
    return f"21 degrees in {city}"


tool = FunctionTool.from_defaults(weather)
ask = ChatMessage(role="user", content="Is it warm in Ulm?")
answer = llm.chat_with_tools([tool], chat_history=[ask])
(call,) = llm.get_tool_calls_from_response(answer)
assert (call.tool_name, call.tool_kwargs) == ("weather", {"city": "Ulm"})
result = ChatMessage(role="tool", content="21", additional_kwargs={"tool_call_id": call.tool_id})
assert "21" in llm.chat([ask, answer.message, result]).message.content

*_, last = llm.stream_chat_with_tools([tool], chat_history=[ask])
assert llm.get_tool_calls_from_response(last)[0].tool_kwargs == {"city": "Ulm"}

response = llm.predict_and_call([tool], user_msg="Is it warm in Ulm?")
assert "21" in str(response)


class Trip(BaseModel):
    """A trip."""

    city: Literal["Ulm", "Bonn"]
    days: Literal[1, 2]


assert isinstance(llm.as_structured_llm(Trip).complete("A trip to Ulm.").raw, Trip)
