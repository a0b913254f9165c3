"""Calls of Llama 3: `{"name": …, "parameters": {…}}`, several with `;` between them.

The text has no marker, so a JSON object counts as a call only if it names a tool of the request.
"""

from __future__ import annotations

from twotower.server.parsers.marked_calls import CallReader, JsonCalls, MarkedCalls


class Llama3JsonCalls(MarkedCalls):
    """JSON objects that name a tool, with or without `<|python_tag|>` before them."""

    start_markers = ("<|python_tag|>", "{")
    end_markers = (";",)

    def reader(self, marker: str) -> CallReader:
        return JsonCalls("{" if marker == "{" else "", frozenset(self.tools))
