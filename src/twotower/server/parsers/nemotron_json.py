"""Calls of Nemotron Nano 2, Llama-Nemotron and Nemotron-Mini: `<TOOLCALL>[{"name": …, "arguments": {…}}]</TOOLCALL>`.

The template of Nemotron-Mini writes the tags in small letters, and one object instead of a list.
"""

from __future__ import annotations

from twotower.server.parsers.marked_calls import CallReader, JsonCalls, MarkedCalls


class NemotronJsonCalls(MarkedCalls):
    """`<TOOLCALL>` and the JSON of all calls."""

    start_markers = ("<TOOLCALL>", "<toolcall>")
    end_markers = ("</TOOLCALL>", "</toolcall>")

    def reader(self, marker: str) -> CallReader:
        return JsonCalls()
