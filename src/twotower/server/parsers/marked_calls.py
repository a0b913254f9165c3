"""The frame of all tool parsers: text, calls after a marker, and text again.

A marker starts a call. A reader consumes the call character by character. If the text after the marker is not a call,
the marker is content, and the text after the marker is searched again. A call that the text does not complete is
content too. White space beside calls is left out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import ClassVar, Protocol

from twotower.server.parsers.json_scanner import JsonScanner, Status, calls_of_json
from twotower.server.parsers.pieces import (
    SHORT_ID_LENGTH,
    CallArguments,
    CallStart,
    ParsedCall,
    Piece,
    TextPiece,
    Tool,
    joined,
    new_call_id,
)


class CallReader(Protocol):
    """Reads the text after a marker. `calls` are the calls, once `push` has returned DONE."""

    calls: list[ParsedCall]

    def push(self, character: str) -> Status: ...


class JsonCalls:
    """Reads one call as a JSON object, or a list of calls. given: text that the marker has in common with the JSON.

    known: names of functions that count as calls; None: all names.
    """

    def __init__(self, given: str = "", known: frozenset[str] | None = None) -> None:
        self.calls: list[ParsedCall] = []
        self._known = known
        self._scanner = JsonScanner()
        self._text: list[str] = []
        for character in given:
            self.push(character)

    def push(self, character: str) -> Status:
        self._text.append(character)
        status = self._scanner.push(character)
        if status is Status.DONE:
            self.calls = calls_of_json("".join(self._text), self._known)
            return Status.DONE if self.calls else Status.OTHER
        return status


class MarkedCalls:
    """A tool parser whose calls begin with a marker.

    tools: the tools of the request. parallel: whether a reply may have several calls; if not, the first call counts.
    """

    start_markers: ClassVar[tuple[str, ...]]
    end_markers: ClassVar[tuple[str, ...]] = ()  # may follow a call
    other_markers: ClassVar[tuple[str, ...]] = ()  # inside of calls
    short_ids: ClassVar[bool] = False

    def __init__(self, tools: Sequence[Tool] = (), parallel: bool = True) -> None:
        self.tools = {tool.name: tool for tool in tools}
        self._parallel = parallel
        self._calls = 0
        self._has_text = False
        self._pieces: list[Piece] = []
        self._state: Callable[[str], None] = self._in_text
        self._pending: deque[str] = deque()
        self._held = ""  # in text: white space, then the possible beginning of a marker; after a call: likewise
        self._space = ""  # white space before the current or last call
        self._marker = ""
        self._raw: list[str] = []  # text after the marker
        self._ends: tuple[str, ...] = ()
        self._reader: CallReader

    def reader(self, marker: str) -> CallReader:
        """A reader for the text after a marker."""
        raise NotImplementedError

    def feed(self, text: str) -> list[Piece]:
        self._pending.extend(text)
        while self._pending:
            self._state(self._pending.popleft())
        out, self._pieces = joined(self._pieces), []
        return out

    def finish(self) -> list[Piece]:
        out: list[Piece] = []
        while self._state == self._in_call:
            self._reject_call()
            out += self.feed("")
        if self._state == self._in_text:
            self._emit_text(self._held)
        out, self._pieces, self._held = joined([*out, *self._pieces]), [], ""
        return out

    def _in_text(self, character: str) -> None:
        self._held += character
        start = self._held.lstrip()
        if start in self.start_markers:
            self._space, self._marker, self._raw = self._held[: -len(start)], start, []
            self._held, self._state, self._reader = "", self._in_call, self.reader(start)
        elif start and not _begins(start, self.start_markers):
            keep = _held_length(self._held, self.start_markers)
            self._emit_text(self._held[: len(self._held) - keep])
            self._held = self._held[len(self._held) - keep :]

    def _in_call(self, character: str) -> None:
        self._raw.append(character)
        status = self._reader.push(character)
        if status is Status.DONE:
            self._emit_calls(self._reader.calls)
            self._state, self._ends = self._after_call, self.end_markers
        elif status is Status.BAD:
            self._reject_call()
        elif status is Status.OTHER:
            self._emit_text(self._space + self._marker + "".join(self._raw))
            self._state = self._in_text

    def _reject_call(self) -> None:
        """The marker was content; the text after it is read again."""
        self._emit_text(self._space + self._marker)
        self._pending.extendleft(reversed(self._raw))
        self._state = self._in_text

    def _after_call(self, character: str) -> None:
        self._held += character
        start = self._held.lstrip()
        if start in self._ends:
            self._held, self._ends = "", ()
        elif start and not _begins(start, self._ends):
            if self._has_text:  # the white space between two texts
                start = (self._space or self._held[: -len(start)]) + start
            self._pending.extendleft(reversed(start))
            self._held, self._state = "", self._in_text

    def _emit_text(self, text: str) -> None:
        if text:
            self._has_text = True
            self._pieces.append(TextPiece(text))

    def _emit_calls(self, calls: Sequence[ParsedCall]) -> None:
        for call in calls:
            if self._calls and not self._parallel:
                return
            own = self.short_ids and len(call.id) == SHORT_ID_LENGTH and call.id.isalnum()
            call_id = call.id if own else new_call_id(self.short_ids)
            self._pieces += [CallStart(self._calls, call_id, call.name), CallArguments(self._calls, call.arguments)]
            self._calls += 1


def _begins(text: str, markers: Sequence[str]) -> bool:
    """Whether a marker begins with the text."""
    return any(marker.startswith(text) for marker in markers)


def _held_length(text: str, markers: Sequence[str]) -> int:
    """Length of the longest end of the text that is white space and then the beginning of a marker."""
    longest = max(map(len, markers)) - 1
    for length in range(min(longest, len(text)), -1, -1):
        if _begins(text[len(text) - length :], markers):
            return len(text) - len(text[: len(text) - length].rstrip())
    return 0
