"""Reads replies: the pieces of a reply from the events of the engine."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from twotower.decoding.structured_thinking import Exemption, Thinking
from twotower.server.conversation import ToolUse
from twotower.server.parsers.forced import ForcedArguments, ForcedCalls
from twotower.server.parsers.marked_calls import MarkedCalls
from twotower.server.parsers.pieces import Parser, Piece, PlainText, ReasoningPiece, TextPiece, joined
from twotower.server.parsers.thinking import END, START, Opening, ThinkingParser
from twotower.server.text_offsets import TextOffsets
from twotower.server.tokenizer_adapter import TokenizerAdapter


@dataclass(frozen=True)
class ReplyFormat:
    """How the text of a reply is read.

    reasoning: whether the reply may begin with reasoning, of which the prompt has `opening`. calls: the parser of calls
    that the model decides to make; None: such calls are content.
    """

    reasoning: bool = False
    opening: Opening = "none"
    calls: type[MarkedCalls] | None = None
    tool_use: ToolUse = field(default_factory=ToolUse)

    @property
    def thinking(self) -> Thinking | None:
        """The reasoning before a constrained text; None: the constraint begins with the text."""
        if not self.reasoning or self.opening == "closed":
            return None
        return Thinking(start=START, end=END, opened=self.opening == "open")

    @property
    def markers(self) -> tuple[str, ...]:
        """Texts that the parsers look for."""
        reasoning = (START, END) if self.reasoning else ()
        return (*reasoning, *(self.exemption.starts + self.exemption.marks if self.exemption else ()))

    @property
    def exemption(self) -> Exemption | None:
        """Calls that the model decides to make, which a response format does not apply to."""
        if self.calls is None or self.tool_use.rule != "auto":
            return None
        return Exemption(starts=self.calls.start_markers, marks=self.calls.end_markers + self.calls.other_markers)

    def call_parser(self) -> Parser:
        """A parser for the text after the reasoning."""
        use, short_ids = self.tool_use, self.calls is not None and self.calls.short_ids
        if use.rule == "named":
            return ForcedArguments(use.tools[0].name, short_ids)
        if use.rule == "required":
            return ForcedCalls(short_ids)
        if use.rule == "auto" and self.calls is not None:
            return self.calls(use.tools, use.parallel)
        return PlainText()


PLAIN = ReplyFormat()


class ReplyReader:
    """Reads one reply. strip_leading_space: whether white space before the content is left out."""

    def __init__(
        self,
        reply_format: ReplyFormat,
        tokenizer: TokenizerAdapter,
        eos: Collection[int],
        strip_leading_space: bool,
        *,
        special_tokens_in_text: bool = False,
    ) -> None:
        self._thinking: Parser = PlainText()
        if reply_format.reasoning:
            self._thinking = ThinkingParser(reply_format.opening == "open")
        self._calls = reply_format.call_parser()
        self._tokenizer, self._eos = tokenizer, eos
        self._markers = {} if special_tokens_in_text else tokenizer.special_markers(reply_format.markers)
        self._skip_special = not special_tokens_in_text
        self._marked_text = MarkedText(tokenizer, eos, self._markers) if self._markers else None
        self._stripping = strip_leading_space
        self._reasons = reply_format.reasoning
        self._marked: list[str] = []  # the text with its markers
        self._has_reasoning = False

    def take(self, tokens: Sequence[int], text: str, last: bool) -> list[Piece]:
        """Adds new tokens and the text that became final with them → the pieces that became final.

        last: no token and no text follows.
        """
        if self._marked_text is not None:
            text = self._marked_text.take(tokens, text)
        if self._reasons:
            self._marked.append(text)
        pieces = self._thinking.feed(text)
        if last:
            pieces += self._thinking.finish()
        self._has_reasoning |= any(isinstance(piece, ReasoningPiece) for piece in pieces)
        out: list[Piece] = []
        for piece in pieces:
            out += self._calls.feed(piece.text) if isinstance(piece, TextPiece) else [piece]
        if last:
            out += self._calls.finish()
        return self._stripped(joined(out))

    def reasoning_tokens(self, tokens: Sequence[int]) -> int:
        """The number of tokens before the end of the reasoning. tokens: all tokens of the reply."""
        if not self._has_reasoning:
            return 0
        end = "".join(self._marked).find(END)
        if end < 0:
            return len(tokens)
        offsets, count, inserted = TextOffsets(self._tokenizer, "", self._eos, self._skip_special), 0, 0
        for token in tokens:
            if offsets.span(token)[0] + inserted >= end:
                break
            inserted += len(self._markers.get(token, ""))
            count += 1
        return count

    def _stripped(self, pieces: list[Piece]) -> list[Piece]:
        out: list[Piece] = []
        for piece in pieces:
            if self._stripping and isinstance(piece, TextPiece):
                piece = TextPiece(piece.text.lstrip())
                self._stripping = not piece.text
            if not isinstance(piece, TextPiece) or piece.text:
                out.append(piece)
        return out


class MarkedText:
    """Inserts special tokens that are markers into the text, which lacks special tokens.

    markers: token → its text.
    """

    def __init__(self, tokenizer: TokenizerAdapter, eos: Collection[int], markers: dict[int, str]) -> None:
        self._offsets = TextOffsets(tokenizer, eos=eos)
        self._markers = markers
        self._found: list[tuple[int, str]] = []  # offset in the text, and marker
        self._final = 0  # characters

    def take(self, tokens: Sequence[int], text: str) -> str:
        """Adds new tokens and the text that became final with them → this text with the markers in it."""
        for token in tokens:
            start, _ = self._offsets.span(token)
            if token in self._markers:
                self._found.append((start, self._markers[token]))
        begin, self._final = self._final, self._final + len(text)
        out, at = [], begin
        while self._found and self._found[0][0] <= self._final:
            offset, marker = self._found.pop(0)
            out += [text[at - begin : offset - begin], marker]
            at = max(at, offset)
        return "".join([*out, text[at - begin :]])
