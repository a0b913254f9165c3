"""Arranges the pieces of a reply as parts in order: reasoning, texts and calls."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from twotower.server.parsers.pieces import CallArguments, CallStart, Piece, ReasoningPiece

PartKind = Literal["reasoning", "text", "call"]


@dataclass
class ReplyPart:
    """A part of a reply.

    index: its place among the parts. text: the text so far, or the JSON text of a call's arguments. call_id, name: of
    a call.
    """

    index: int
    kind: PartKind
    text: str = ""
    call_id: str = ""
    name: str = ""


@dataclass(frozen=True)
class PartStart:
    """A part begins."""

    part: ReplyPart


@dataclass(frozen=True)
class PartText:
    """The next text of a part, or of the arguments of a call."""

    part: ReplyPart
    text: str


@dataclass(frozen=True)
class PartEnd:
    """A part is complete, or the reply was cut off in it."""

    part: ReplyPart


PartEvent = PartStart | PartText | PartEnd


class ReplyParts:
    """The parts of one reply. A part ends before the next one begins, and none is empty but a call or reasoning."""

    def __init__(self) -> None:
        self.parts: list[ReplyPart] = []
        self._open = False  # whether the last part can get more text

    def take(self, pieces: Sequence[Piece], last: bool) -> Iterator[PartEvent]:
        """Adds pieces → what happens to the parts. last: no piece follows."""
        for piece in pieces:
            if isinstance(piece, CallStart):
                yield from self._begin(ReplyPart(len(self.parts), "call", "", piece.id, piece.name))
                continue
            kind: PartKind = "call" if isinstance(piece, CallArguments) else "text"
            kind = "reasoning" if isinstance(piece, ReasoningPiece) else kind
            text, begins = piece.text, not self._open or self.parts[-1].kind != kind
            if begins and kind == "text" and self.parts:
                text = text.lstrip()  # white space beside a call or reasoning
            if not text:
                continue
            if begins:
                yield from self._begin(ReplyPart(len(self.parts), kind))
            part = self.parts[-1]
            part.text += text
            yield PartText(part, text)
        if last:
            yield from self._end()

    def _begin(self, part: ReplyPart) -> Iterator[PartEvent]:
        yield from self._end()
        self.parts.append(part)
        self._open = True
        yield PartStart(part)

    def _end(self) -> Iterator[PartEvent]:
        if self._open:
            self._open = False
            yield PartEnd(self.parts[-1])
