"""Which parsers read the replies of a model: those that were asked for by name, or those of its chat template."""

from __future__ import annotations

from functools import lru_cache

from twotower.errors import ArgumentError
from twotower.server.parsers.hermes import HermesCalls
from twotower.server.parsers.llama3_json import Llama3JsonCalls
from twotower.server.parsers.marked_calls import MarkedCalls
from twotower.server.parsers.mistral import MistralCalls
from twotower.server.parsers.nemotron_json import NemotronJsonCalls
from twotower.server.parsers.qwen3_coder import Qwen3CoderCalls

AUTO, NONE = "auto", "none"
TOOL_PARSERS: dict[str, type[MarkedCalls]] = {
    "hermes": HermesCalls,
    "qwen3_coder": Qwen3CoderCalls,
    "nemotron_json": NemotronJsonCalls,
    "llama3_json": Llama3JsonCalls,
    "mistral": MistralCalls,
}
REASONING_PARSERS = ("think",)
# Text of a chat template → the parser of its calls. The first that is found counts: the templates of Qwen3-Coder and
# Nemotron 3 have `<tool_call>` too, and Llama-Nemotron's have the headers of Llama 3.
TEMPLATE_MARKS = {
    "<TOOLCALL>": "nemotron_json",
    "<toolcall>": "nemotron_json",
    "<function=": "qwen3_coder",
    "<tool_call>": "hermes",
    "[TOOL_CALLS]": "mistral",
    "<|python_tag|>": "llama3_json",
    '"parameters": dictionary of argument name and its value': "llama3_json",
}


@lru_cache(maxsize=64)
def tool_parser(name: str, template: str) -> type[MarkedCalls] | None:
    """The parser of tool calls; None: there is none. name: that of `--tool-parser`; template: the chat template."""
    if name == AUTO:
        name = next((parser for mark, parser in TEMPLATE_MARKS.items() if mark in template), NONE)
    return TOOL_PARSERS.get(name)


@lru_cache(maxsize=64)
def has_reasoning(name: str, template: str) -> bool:
    """Whether the replies may begin with reasoning between `<think>` and `</think>`. Arguments as in `tool_parser`."""
    return name in REASONING_PARSERS or (name == AUTO and "</think>" in template)


def check_names(tool_parser: str, reasoning_parser: str) -> None:
    """Raises ArgumentError if there is no parser of one of these names."""
    given = ("--tool-parser", tool_parser, TOOL_PARSERS), ("--reasoning-parser", reasoning_parser, REASONING_PARSERS)
    for option, name, known in given:
        if name not in (names := (AUTO, NONE, *known)):
            raise ArgumentError(f"{option} is {name!r}; choose one of {', '.join(names)}")
