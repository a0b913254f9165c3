"""Calls of Hermes and Qwen: `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, once for each call."""

from __future__ import annotations

from twotower.server.parsers.marked_calls import CallReader, JsonCalls, MarkedCalls


class HermesCalls(MarkedCalls):
    """`<tool_call>` and JSON. The end tag may be absent, because some models end their text before it."""

    start_markers = ("<tool_call>",)
    end_markers = ("</tool_call>",)

    def reader(self, marker: str) -> CallReader:
        return JsonCalls()
