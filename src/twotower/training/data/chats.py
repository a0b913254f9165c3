"""Conversations as tokens, and which of the tokens are the assistant's.

The whole conversation is rendered and tokenised at once, as transformers' `apply_chat_template` does. A template with
`{% generation %}` says itself which text is the assistant's. With other templates, an assistant turn is what its
message adds to the conversation before it, where that ends with the beginning of an assistant turn.

A turn ends with the first token that ends a text (EOS). What the template writes after it, often a line break, is not
predicted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

from twotower.chat_template import ASSISTANT, ChatError, Message, render, require_template
from twotower.errors import ArgumentError

if TYPE_CHECKING:
    from twotower.tokenizer import Tokenizer as ModelTokenizer

MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")

Span = tuple[int, int]  # the first token or character, and the end
Encode = Callable[[str], list[int]]  # without special tokens


@dataclass(frozen=True)
class Chat:
    """tokens: of the whole conversation. turns: the spans of the assistant's tokens, in order, none empty."""

    tokens: list[int]
    turns: list[Span]


class ChatMismatch(ArgumentError):
    """The assistant's text cannot be told from the rest of a conversation."""


def encode_chat(tokenizer: object, messages: Sequence[Message], encode: Encode, eos: frozenset[int]) -> Chat:
    """Tokenises a conversation. eos: the tokens that end a text.

    Raises:
        ArgumentError: the tokenizer has no chat template.
        ChatError: the template rejects the messages; or no message is the assistant's.
        ChatMismatch: an earlier part of the conversation is rendered differently than the whole.
    """
    require_template(tokenizer)
    own = cast("ModelTokenizer", tokenizer)
    if not any(message["role"] == ASSISTANT for message in messages):
        raise ChatError("messages have no assistant turn")
    if MARKERS.search(str(getattr(own, "chat_template", ""))):
        tokens, spans = _marked(own, messages)
    else:
        tokens, spans = _by_prefixes(own, messages, encode)
    turns = [span for span in _merged([_trimmed(tokens, span, eos) for span in spans]) if span[0] < span[1]]
    if not turns:
        raise ChatError("the assistant turns are empty")
    return Chat(tokens, turns)


class _MarksTurns(Protocol):
    """A tokenizer of transformers, as its template marks the assistant's tokens."""

    def apply_chat_template(
        self, conversation: Sequence[Message], *, tokenize: bool, return_dict: bool, return_assistant_tokens_mask: bool
    ) -> Mapping[str, list[int]]: ...


def _marked(tokenizer: ModelTokenizer, messages: Sequence[Message]) -> tuple[list[int], list[Span]]:
    """The tokens of a conversation, and the runs that the template marks as generated."""
    render(tokenizer, messages)  # raises the errors of the user
    marking = cast(_MarksTurns, tokenizer)
    found = marking.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    marks = [0, *found["assistant_masks"], 0]
    edges = [place for place in range(1, len(marks)) if marks[place] != marks[place - 1]]
    return list(found["input_ids"]), [(edges[i] - 1, edges[i + 1] - 1) for i in range(0, len(edges), 2)]


def _by_prefixes(
    tokenizer: ModelTokenizer, messages: Sequence[Message], encode: Encode
) -> tuple[list[int], list[Span]]:
    text = render(tokenizer, messages)
    spans: list[Span] = []
    for number, message in enumerate(messages):
        if message["role"] != ASSISTANT:
            continue
        if not number:
            raise ChatError("messages begin with an assistant turn, which answers nothing")
        before = render(tokenizer, messages[:number], generation_prompt=True)
        after = render(tokenizer, messages[: number + 1])
        if not (text.startswith(after) and after.startswith(before)):
            raise ChatMismatch(
                f"the chat template renders messages 1 to {number + 1} differently within the conversation, so the "
                "assistant's text cannot be found; use a template with {% generation %}, or conversations of one answer"
            )
        spans.append((len(before), len(after)))
    return _tokenised(text, spans, encode)


def _tokenised(text: str, spans: Sequence[Span], encode: Encode) -> tuple[list[int], list[Span]]:
    """The tokens of a text, and the spans of characters as spans of tokens.

    The text is tokenised as a whole. Where a token would span the edge of a turn, the text is cut there, because in
    generation a prompt is tokenised by itself.
    """
    head: list[int] = []  # the tokens before the last cut
    cut, tail = 0, encode(text)
    edges: list[int] = []
    for place in [place for span in spans for place in span]:
        part = encode(text[cut:place])
        if tail[: len(part)] != part:
            head, cut, tail, part = [*head, *part], place, encode(text[place:]), []
        edges.append(len(head) + len(part))
    return [*head, *tail], list(zip(edges[::2], edges[1::2], strict=True))


def _trimmed(tokens: Sequence[int], span: Span, eos: frozenset[int]) -> Span:
    """The span up to its first EOS; or with an EOS directly after it, which a template may leave out of its marks."""
    begin, end = span
    for place in range(begin, min(end + 1, len(tokens))):
        if tokens[place] in eos:
            return begin, place + 1
    return span


def _merged(spans: Sequence[Span]) -> list[Span]:
    """Spans without those that follow each other directly."""
    out: list[Span] = []
    for begin, end in spans:
        if out and begin <= out[-1][1]:
            out[-1] = (out[-1][0], max(end, out[-1][1]))
        else:
            out.append((begin, end))
    return out
