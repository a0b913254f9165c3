"""smolagents: a ToolCallingAgent, which forces every call. It passes on protocol, not on its answer."""

import sys

from smolagents import OpenAIModel, ToolCallingAgent, tool


@tool
def weather(city: str) -> str:
    """The weather of a city.

    Args:
        city: Its name.
    """
    return f"21 degrees in {city}"


model = OpenAIModel("small", api_base=sys.argv[1], api_key="x", max_tokens=60, temperature=0)
for stream in (False, True):
    agent = ToolCallingAgent(
        tools=[weather], model=model, max_steps=2, stream_outputs=stream, instructions="",
        prompt_templates=None, verbosity_level=0,
    )  # fmt: skip
    agent.run("Is it warm in Ulm?")
    steps = [step for step in agent.memory.steps if hasattr(step, "model_output_message")]
    assert steps
    assert all(step.error is None or "Error code" not in str(step.error) for step in steps), [
        step.error for step in steps
    ]
    assert any(step.tool_calls for step in steps)
