"""What a reply consists of: content, reasoning and tool calls. Parsers yield it in pieces, as the text arrives."""

from __future__ import annotations

import secrets
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

SHORT_ID_LENGTH = 9  # of ids in the chat templates of Mistral
SHORT_ID_CHARACTERS = string.ascii_letters + string.digits


@dataclass(frozen=True)
class Tool:
    """A function that the model may call. parameters: JSON schema of its arguments; None: it has no arguments."""

    name: str
    description: str | None = None
    parameters: Mapping[str, object] | None = None


@dataclass(frozen=True)
class ParsedCall:
    """A complete call in a text. arguments: the JSON text of an object. id: the model's own id of the call, or ""."""

    name: str
    arguments: str
    id: str = ""


@dataclass(frozen=True)
class TextPiece:
    """The next part of the content."""

    text: str


@dataclass(frozen=True)
class ReasoningPiece:
    """The next part of the reasoning."""

    text: str


@dataclass(frozen=True)
class CallStart:
    """The beginning of a tool call; its arguments follow."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class CallArguments:
    """The next part of the arguments of a tool call, which are the JSON text of an object."""

    index: int
    text: str


Piece = TextPiece | ReasoningPiece | CallStart | CallArguments


class Parser(Protocol):
    """Splits a text into pieces. The joined pieces do not depend on how the text was split into calls of `feed`."""

    def feed(self, text: str) -> list[Piece]:
        """Adds text → the pieces that became final."""
        ...

    def finish(self) -> list[Piece]:
        """The text has ended → the remaining pieces."""
        ...


class PlainText:
    """The parser without a format: all text is content."""

    def feed(self, text: str) -> list[Piece]:
        return [TextPiece(text)] if text else []

    def finish(self) -> list[Piece]:
        return []


@dataclass
class ReplyCall:
    """A tool call of a reply."""

    id: str
    name: str
    arguments: str = ""


@dataclass
class Reply:
    """A reply, joined from its pieces."""

    content: str = ""
    reasoning: str = ""
    calls: list[ReplyCall] = field(default_factory=list)

    @classmethod
    def of(cls, pieces: Iterable[Piece]) -> Reply:
        """The reply that consists of these pieces."""
        found, contents, reasonings = cls(), [], []
        for piece in pieces:
            match piece:
                case TextPiece(text):
                    contents.append(text)
                case ReasoningPiece(text):
                    reasonings.append(text)
                case CallStart(_, call_id, name):
                    found.calls.append(ReplyCall(call_id, name))
                case CallArguments(index, text):
                    found.calls[index].arguments += text
        found.content, found.reasoning = "".join(contents), "".join(reasonings)
        return found


def joined(pieces: Sequence[Piece]) -> list[Piece]:
    """The pieces, with neighbours of one kind as one."""
    out: list[Piece] = []
    for piece in pieces:
        match (out[-1] if out else None), piece:
            case TextPiece(before), TextPiece(text):
                out[-1] = TextPiece(before + text)
            case ReasoningPiece(before), ReasoningPiece(text):
                out[-1] = ReasoningPiece(before + text)
            case CallArguments(index, before), CallArguments(other, text) if index == other:
                out[-1] = CallArguments(index, before + text)
            case _:
                out.append(piece)
    return out


def new_call_id(short: bool = False) -> str:
    """An id for a tool call. short: nine letters and digits, which the chat templates of Mistral require."""
    if short:
        return "".join(secrets.choice(SHORT_ID_CHARACTERS) for _ in range(SHORT_ID_LENGTH))
    return f"call_{secrets.token_hex(12)}"
