"""Calls of Nemotron 3, Qwen3-Coder and Qwen3.5, with one tag for each argument:

<tool_call>
<function=look>
<parameter=city>
Ulm
</parameter>
</function>
</tool_call>
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from twotower.server.parsers.json_scanner import Status, arguments_text
from twotower.server.parsers.marked_calls import CallReader, MarkedCalls
from twotower.server.parsers.pieces import ParsedCall, Tool
from twotower.server.parsers.schema_types import argument_value

FUNCTION, PARAMETER = "<function=", "<parameter="
FUNCTION_END, PARAMETER_END = "</function>", "</parameter>"
NAME = re.compile(r"[^\s<>=\"']{1,128}")


class TaggedCall:
    """Reads one function with its parameters. given: the beginning of its text that the marker has."""

    def __init__(self, tools: Mapping[str, Tool], given: str) -> None:
        self.calls: list[ParsedCall] = []
        self._tools = tools
        self._tag = given  # white space and the tag that is being read
        self._name = self._parameter = ""
        self._value: list[str] | None = None  # of the parameter that is being read
        self._arguments: dict[str, object] = {}

    def push(self, character: str) -> Status:
        if self._value is not None:
            self._push_value(self._value, character)
            return Status.MORE
        self._tag += character
        tag = self._tag.lstrip()
        if tag == FUNCTION_END and self._name:
            return self._finish()
        starts = (PARAMETER, FUNCTION_END) if self._name else (FUNCTION,)
        if any(start.startswith(tag) for start in starts):
            return Status.MORE
        if not tag.startswith(starts) or tag.startswith(FUNCTION_END):
            return Status.BAD
        name = tag.partition("=")[2]
        if character == ">" and NAME.fullmatch(name[:-1]):
            self._start(name[:-1])
            return Status.MORE
        return Status.MORE if NAME.fullmatch(name) else Status.BAD

    def _start(self, name: str) -> None:
        """The tag of the function or of a parameter is complete."""
        self._tag = ""
        if self._name:
            self._parameter, self._value = name, []
        else:
            self._name = name

    def _push_value(self, value: list[str], character: str) -> None:
        value.append(character)
        if character == ">" and "".join(value[-len(PARAMETER_END) :]) == PARAMETER_END:
            text = "".join(value[: -len(PARAMETER_END)]).removeprefix("\n").removesuffix("\n")
            tool = self._tools.get(self._name, Tool(self._name))
            self._arguments[self._parameter] = argument_value(text, tool.parameters, self._parameter)
            self._value = None

    def _finish(self) -> Status:
        try:
            self.calls = [ParsedCall(self._name, arguments_text(self._arguments))]
        except (ValueError, RecursionError):  # a number that is too large
            return Status.BAD
        return Status.DONE


class Qwen3CoderCalls(MarkedCalls):
    """`<tool_call>` and the tags of a function. `<tool_call>` may be absent, because some models leave it out."""

    start_markers = ("<tool_call>", FUNCTION)
    end_markers = ("</tool_call>",)

    def reader(self, marker: str) -> CallReader:
        return TaggedCall(self.tools, FUNCTION if marker == FUNCTION else "")
