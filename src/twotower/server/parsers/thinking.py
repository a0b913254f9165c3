"""Reasoning: the text between `<think>` and `</think>` at the beginning of a reply."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Literal

from twotower.server.parsers.pieces import Piece, ReasoningPiece, TextPiece, joined

START, END = "<think>", "</think>"

# What a prompt has at its end: the beginning of the reasoning, all of the reasoning, or neither.
Opening = Literal["open", "closed", "none"]


def opening_of(prompt: str) -> Opening:
    """How a prompt, which ends where the reply begins, has begun the reasoning."""
    end = prompt.rstrip()
    return "open" if end.endswith(START) else "closed" if end.endswith(END) else "none"


class ThinkingParser:
    """Splits a text into reasoning and content. White space at both ends of the reasoning is left out.

    opened: the prompt ends with `<think>`, so that the text begins with reasoning.
    """

    start_markers = (START,)
    other_markers = (END,)

    def __init__(self, opened: bool) -> None:
        self._opened = opened
        self._state: Callable[[str], None] = self._before
        self._pending: deque[str] = deque()
        self._held = ""  # white space, then the possible beginning of a tag
        self._has_reasoning = False
        self._pieces: list[Piece] = []

    def feed(self, text: str) -> list[Piece]:
        if self._state == self._in_content:
            return [TextPiece(text)] if text else []
        self._pending.extend(text)
        while self._pending:
            self._state(self._pending.popleft())
        out, self._pieces = joined(self._pieces), []
        return out

    def finish(self) -> list[Piece]:
        held, self._held = self._held, ""
        if self._state == self._before and not self._opened:
            return [TextPiece(held)] if held else []
        if self._state in (self._before, self._in_reasoning) and held.strip():
            return [ReasoningPiece(held if self._has_reasoning else held.lstrip())]
        return []

    def _before(self, character: str) -> None:
        self._held += character
        start = self._held.lstrip()
        if start == START:
            self._held, self._state = "", self._in_reasoning
        elif not START.startswith(start):
            self._state = self._in_reasoning if self._opened else self._in_content
            self._pending.extendleft(reversed(self._held))
            self._held = ""

    def _in_reasoning(self, character: str) -> None:
        self._held += character
        start = self._held.lstrip()
        if start == END:
            self._held, self._state = "", self._after
        elif start and not END.startswith(start):
            keep = _held_length(self._held)
            text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
            text = text if self._has_reasoning else text.lstrip()
            if text:
                self._has_reasoning = True
                self._pieces.append(ReasoningPiece(text))

    def _after(self, character: str) -> None:
        if not character.isspace():
            self._state = self._in_content
            self._pieces.append(TextPiece(character))

    def _in_content(self, character: str) -> None:
        self._pieces.append(TextPiece(character))


def _held_length(text: str) -> int:
    """Length of the longest end of the text that is white space and then the beginning of `</think>`."""
    for length in range(min(len(END) - 1, len(text)), -1, -1):
        if END.startswith(text[len(text) - length :]):
            return len(text) - len(text[: len(text) - length].rstrip())
    return 0
