"""Finds the end of a JSON object or list in a text that arrives character by character."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from enum import Enum

from twotower.server.parsers.pieces import ParsedCall

WORD = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?|true|false|null", re.ASCII)
WORD_CHARACTERS = frozenset("-+.0123456789eEtrufalsn")
WHITESPACE = frozenset(" \t\r\n")
CLOSING = {"{": "}", "[": "]"}


class Status(Enum):
    """State of a reader after a character.

    MORE: more text is needed. DONE: the value is complete. BAD: the text is not valid. OTHER: the text is complete and
    valid, but it is no call.
    """

    MORE = "more"
    DONE = "done"
    BAD = "bad"
    OTHER = "other"


class JsonScanner:
    """Reads one JSON object or list. Strings may have raw line breaks, which models write."""

    def __init__(self) -> None:
        self._open: list[str] = []  # brackets that are open
        self._expects = "value"
        self._in_string = self._escaped = False
        self._word = ""  # of a number, true, false or null

    def push(self, character: str) -> Status:
        """Adds a character."""
        if self._in_string:
            return self._push_in_string(character)
        if self._word:
            if character in WORD_CHARACTERS:
                self._word += character
                return Status.MORE
            if not WORD.fullmatch(self._word):
                return Status.BAD
            self._word, self._expects = "", "comma"
        if character in WHITESPACE:
            return Status.MORE
        return self._push_symbol(character)

    def _push_in_string(self, character: str) -> Status:
        if self._escaped:
            self._escaped = False
        elif character == "\\":
            self._escaped = True
        elif character == '"':
            self._in_string = False
            self._expects = "colon" if self._expects == "key" else "comma"
        return Status.MORE

    def _push_symbol(self, character: str) -> Status:
        expects = self._expects
        if character in "]}":
            return self._close(character)
        if character == '"' and expects in ("key", "first_key", "value", "first_value") and self._open:
            self._in_string = True
            self._expects = "key" if "key" in expects else "value"
        elif character in CLOSING and expects in ("value", "first_value"):
            self._open.append(character)
            self._expects = "first_key" if character == "{" else "first_value"
        elif character == ":" and expects == "colon":
            self._expects = "value"
        elif character == "," and expects == "comma":
            self._expects = "key" if self._open[-1] == "{" else "value"
        elif character in WORD_CHARACTERS and expects in ("value", "first_value") and self._open:
            self._word = character
        else:
            return Status.BAD
        return Status.MORE

    def _close(self, character: str) -> Status:
        first = "first_key" if character == "}" else "first_value"
        if not self._open or CLOSING[self._open[-1]] != character or self._expects not in ("comma", first):
            return Status.BAD
        self._open.pop()
        self._expects = "comma"
        return Status.MORE if self._open else Status.DONE


def calls_of_json(text: str, known: Collection[str] | None = None) -> list[ParsedCall]:
    """The calls in the JSON text of one call or of a list; an empty list: the text has something else.

    known: names of functions that count as calls; None: all names.
    """
    try:
        value = json.loads(text, strict=False, parse_constant=_refuse)
        found = [_call(one) for one in (value if isinstance(value, list) else [value])]
    except (ValueError, RecursionError):
        return []
    if known is not None and any(call.name not in known for call in found):
        return []
    return found


def _call(value: object) -> ParsedCall:
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = {"id": value.get("id")} | value["function"]
    if not isinstance(value, dict) or not isinstance(name := value.get("name"), str) or not name:
        raise ValueError("not a call")
    arguments = value.get("arguments", value.get("parameters"))
    if isinstance(arguments, str):
        arguments = json.loads(arguments, strict=False, parse_constant=_refuse) if arguments.strip() else {}
    if not isinstance(arguments, dict | None):
        raise ValueError("the arguments are not an object")
    call_id = value.get("id")
    return ParsedCall(name, arguments_text(arguments or {}), call_id if isinstance(call_id, str) else "")


def arguments_text(arguments: Mapping[str, object]) -> str:
    """The JSON text of arguments. Raises ValueError for NaN and infinity."""
    text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return json.dumps(arguments, allow_nan=False)
    return text


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a JSON number")
