"""Grammars of texts that begin with reasoning, or that may begin with a mark which lifts the constraint."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from twotower.tokenizer import Tokenizer

ANY_TEXT = r"/(.|\n)*/"
BLANK = r"/[ \n\r\t]*/"


@dataclass(frozen=True, kw_only=True)
class Thinking:
    """Reasoning before the text of a constraint.

    start, end: the marks around the reasoning. opened: the prompt ends with `start`, so the text begins inside the
    reasoning and must end it. Otherwise the reasoning is optional.
    """

    start: str = "<think>"
    end: str = "</think>"
    opened: bool = False


@dataclass(frozen=True, kw_only=True)
class Exemption:
    """Texts that a constraint does not apply to: those that begin with one of `starts`.

    marks: special tokens that such a text may have, beside `starts`.
    """

    starts: tuple[str, ...]
    marks: tuple[str, ...] = ()


def composed(
    body: dict[str, object], thinking: Thinking | None, exemption: Exemption | None, tokenizer: Tokenizer
) -> str:
    """The grammar of a text with reasoning, white space and `body` or an exempt text, in llguidance's JSON format.

    body: one entry of llguidance's list of grammars.
    """
    lines = [f"start: {_reasoning(thinking, tokenizer)} {'(body | exempt)' if exemption else 'body'}", "body: @body"]
    if exemption is not None:
        starts = [_token(mark, tokenizer) or json.dumps(mark) for mark in exemption.starts]
        tokens = [token for mark in (*exemption.starts, *exemption.marks) if (token := _token(mark, tokenizer))]
        rest = " | ".join(["any", *tokens])
        lines += [f"exempt: ({' | '.join(starts)}) ({rest})*", f"any: {ANY_TEXT}"]
    if thinking is not None:
        end = _token(thinking.end, tokenizer)
        lines.append(f"thinking: reasoning {end or ''} {BLANK}")
        lines.append(f"reasoning: {ANY_TEXT}" if end else f"reasoning[suffix={json.dumps(thinking.end)}]: {ANY_TEXT}")
    return json.dumps({"grammars": [{"name": "text", "lark_grammar": "\n".join(lines)}, {**body, "name": "body"}]})


def _reasoning(thinking: Thinking | None, tokenizer: Tokenizer) -> str:
    """The reasoning at the beginning of a text, as a part of a rule."""
    if thinking is None:
        return ""
    start = _token(thinking.start, tokenizer) or json.dumps(thinking.start)
    return f"({start})? thinking" if thinking.opened else f"({start} thinking)?"


def _token(mark: str, tokenizer: Tokenizer) -> str | None:
    """The mark as a token in llguidance's notation; None: the tokenizer has no such token and encodes it as text."""
    ids = [token for token, added in tokenizer.added_tokens_decoder.items() if added.content == mark]
    return f"<[{ids[0]}]>" if ids else None
