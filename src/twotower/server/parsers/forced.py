"""Forced calls: the grammar that a reply must follow, and the parser of such a reply.

The reply has a form of our own, so that any model can be forced: the arguments of a named function, or a list
`[{"name": "look", "arguments": {…}}, …]`. The grammar fixes everything but the arguments.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

from twotower.server.parsers.json_scanner import JsonScanner, Status
from twotower.server.parsers.pieces import CallArguments, CallStart, Piece, Tool, joined, new_call_id

MAX_CALLS = 8  # of one reply; a weak model may repeat calls until the end of the text
HEAD = re.compile(r'[\[},\s]*\{"name": "(?P<name>[^"]*)", "arguments": ')
# llguidance's options of the arguments: no white space but a blank after a comma and a colon.
SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
COMBINING = ("allOf", "anyOf", "oneOf", "$ref")


def arguments_schema(tool: Tool) -> Mapping[str, object]:
    """The JSON schema of the arguments of a tool, which are an object.

    A function without parameters has no arguments. Arguments that the schema does not name are allowed only if it says
    so, because functions refuse them.
    """
    if not tool.parameters:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    schema = dict(tool.parameters)
    if not schema.keys() & set(COMBINING):
        schema.setdefault("type", "object")
        if "properties" in schema:
            schema.setdefault("additionalProperties", False)
    return schema


def forced_grammar(tools: Sequence[Tool], named: bool, parallel: bool) -> str:
    """The grammar of forced calls, in llguidance's Lark notation.

    named: the arguments of the only tool; else a list of calls. parallel: whether the list may have several calls.
    """
    schemas = [json.dumps({**arguments_schema(tool), "x-guidance": SPACING}) for tool in tools]
    if named:
        return f"start: %json {schemas[0]}"
    more = f'(", " call){{0,{MAX_CALLS - 1}}} ' if parallel else ""
    lines = [f'start: "[" call {more}"]"', "call: " + " | ".join(f"call_{place}" for place in range(len(tools)))]
    for place, (tool, schema) in enumerate(zip(tools, schemas, strict=True)):
        head = json.dumps(f'{{"name": "{tool.name}", "arguments": ')
        lines += [f'call_{place}: {head} arguments_{place} "}}"', f"arguments_{place}: %json {schema}"]
    return "\n".join(lines)


class ForcedArguments:
    """The parser of a reply that is the arguments of a named function."""

    def __init__(self, name: str, short_ids: bool = False) -> None:
        self._start = CallStart(0, new_call_id(short_ids), name)
        self._started = False

    def feed(self, text: str) -> list[Piece]:
        if not text:
            return []
        start = [] if self._started else [self._start]
        self._started = True
        return [*start, CallArguments(0, text)]

    def finish(self) -> list[Piece]:
        return []


class ForcedCalls:
    """The parser of a reply that is a list of calls. The arguments are pieces as they arrive."""

    def __init__(self, short_ids: bool = False) -> None:
        self._short_ids = short_ids
        self._calls = 0
        self._head = ""  # text before the arguments of the next call
        self._scanner: JsonScanner | None = None

    def feed(self, text: str) -> list[Piece]:
        out: list[Piece] = []
        for character in text:
            if self._scanner is None:
                self._head += character
                if found := HEAD.fullmatch(self._head):
                    out.append(CallStart(self._calls, new_call_id(self._short_ids), found["name"]))
                    self._head, self._scanner = "", JsonScanner()
                continue
            out.append(CallArguments(self._calls, character))
            if self._scanner.push(character) is Status.DONE:
                self._calls += 1
                self._head, self._scanner = "", None
        return joined(out)

    def finish(self) -> list[Piece]:
        return []
