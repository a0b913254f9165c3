"""Calls of Mistral: `[TOOL_CALLS][{"name": …, "arguments": {…}}]`, and since version 11 of its tokenizer
`[TOOL_CALLS]name[ARGS]{…}`, once for each call, with an optional `[CALL_ID]id` after the name.
"""

from __future__ import annotations

import re

from twotower.server.parsers.json_scanner import JsonScanner, Status, calls_of_json
from twotower.server.parsers.marked_calls import CallReader, JsonCalls, MarkedCalls
from twotower.server.parsers.pieces import ParsedCall

HEAD = re.compile(r"\s*(?P<name>[A-Za-z0-9_.:/-]+)(\[CALL_ID\](?P<id>[A-Za-z0-9_-]+))?(\[ARGS\])?\s*", re.ASCII)
HEAD_CHARACTERS = re.compile(r"[A-Za-z0-9_.:/\[\]\s-]", re.ASCII)
MAX_HEAD = 256  # characters


class ListOrName:
    """Reads a list of calls, or the name, the optional id and the arguments of one call."""

    def __init__(self) -> None:
        self.calls: list[ParsedCall] = []
        self._head = ""
        self._json: JsonCalls | None = None  # of a list
        self._scanner: JsonScanner | None = None  # of arguments
        self._arguments: list[str] = []

    def push(self, character: str) -> Status:
        if self._json is not None:
            status = self._json.push(character)
            self.calls = self._json.calls
            return status
        if self._scanner is not None:
            return self._push_argument(character)
        if character in "[{" and not self._head.strip():
            self._json = JsonCalls(character)
            return Status.MORE
        if character == "{":
            self._scanner = JsonScanner()
            return self._push_argument(character) if HEAD.fullmatch(self._head) else Status.BAD
        self._head += character
        allowed = HEAD_CHARACTERS.fullmatch(character) and len(self._head) <= MAX_HEAD
        return Status.MORE if allowed else Status.BAD

    def _push_argument(self, character: str) -> Status:
        assert self._scanner is not None
        self._arguments.append(character)
        status = self._scanner.push(character)
        if status is not Status.DONE:
            return status
        head = HEAD.fullmatch(self._head)
        assert head is not None
        call = f'{{"name": "{head["name"]}", "id": "{head["id"] or ""}", "arguments": {"".join(self._arguments)}}}'
        self.calls = calls_of_json(call)
        return Status.DONE if self.calls else Status.OTHER


class MistralCalls(MarkedCalls):
    """`[TOOL_CALLS]`, then a list of calls, or the name and the arguments of a call."""

    start_markers = ("[TOOL_CALLS]",)
    other_markers = ("[CALL_ID]", "[ARGS]")
    short_ids = True

    def reader(self, marker: str) -> CallReader:
        return ListOrName()
