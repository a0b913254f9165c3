"""Documents: a record's text as tokens, and how many of the tokens are context only."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer

from twotower.chat_template import ChatError, Message
from twotower.errors import ArgumentError
from twotower.training.data.chats import ChatMismatch, Span, encode_chat

if TYPE_CHECKING:
    from twotower.tokenizer import Tokenizer as ModelTokenizer

    AnyTokenizer = Tokenizer | ModelTokenizer


class BadRecord(Exception):
    """A record that cannot become a document. The text of the exception is the reason."""


@dataclass(frozen=True)
class Record:
    """A text and its prompt, if any, or the messages of a conversation, without a text.

    place: the record's name in messages (`wiki.jsonl line 17`). ends: False for a text that was cut off.
    """

    text: str
    prompt: str | None
    place: str
    messages: tuple[Message, ...] | None = None
    ends: bool = True

    @property
    def content(self) -> str:
        """All text of the record."""
        if self.messages is None:
            return (self.prompt or "") + self.text
        return "\n".join(f"{message['role']}: {message.get('content')}" for message in self.messages)


@dataclass(frozen=True)
class Document:
    """One document. The model starts from zero state and attends to no other document.

    tokens: (N,) int32.
    context: number of first tokens that are never masked: the prompt; 1 if the document begins with BOS; else 0.
    prompted: the document has a prompt, so its blocks begin where the prompt ends, as in generation.
    ends: the last block is filled with EOS. If False, it is filled with padding and not trained unless it is full.
    turns: the spans of tokens that are trained, if not all tokens after the context are: the assistant's turns, each
    from where its first block begins.
    aligned: blocks begin where turns begin; False for next-token prediction, which has no blocks.
    """

    tokens: np.ndarray
    context: int = 0
    prompted: bool = False
    ends: bool = True
    turns: tuple[Span, ...] = ()
    aligned: bool = True


class Encoder:
    """Encodes records as documents.

    A prompt and its text are tokenised separately and joined, as in generation. Tokens that the tokenizer puts in
    front (BOS) come before the first part. EOS is appended unless the text ends with it.

    Args:
        tokenizer: a `tokenizers.Tokenizer` or a transformers tokenizer.
        vocab_size: of the model.
        eos_token_id, mask_token_id, bos_token_id, pad_token_id: of the model.
        add_eos: False for fragments of texts, so that the model does not learn an end where there is none.
        eos_token_ids: all tokens that end a text or a turn; None: eos_token_id alone.
        align_turns: False for next-token prediction, which needs no blocks that begin where turns begin.

    Raises:
        ArgumentError: the tokenizer has ids that the model lacks; special ids outside the vocabulary, or equal.
    """

    def __init__(
        self,
        tokenizer: AnyTokenizer,
        *,
        vocab_size: int,
        eos_token_id: int,
        mask_token_id: int,
        bos_token_id: int | None = None,
        pad_token_id: int = 0,
        add_eos: bool = True,
        eos_token_ids: Collection[int] = (),
        align_turns: bool = True,
    ) -> None:
        self._tokenizer, self._align_turns = tokenizer, align_turns
        self._ends = frozenset((eos_token_id, *eos_token_ids))
        self.vocab_size = vocab_size
        self.eos_token_id, self.mask_token_id = eos_token_id, mask_token_id
        self.bos_token_id, self.pad_token_id = bos_token_id, pad_token_id
        self.add_eos = add_eos
        self._shift, self._spread = 0, 1
        special = {"eos": eos_token_id, "mask": mask_token_id, "bos": bos_token_id, "pad": pad_token_id}
        for name, token in special.items():
            if token is not None and not 0 <= token < vocab_size:
                raise ArgumentError(
                    f"{name}_token_id is {token}, but the vocabulary is 0 to {vocab_size - 1}; give the model's id"
                )
        for name in ("eos", "bos"):
            if special[name] == mask_token_id:
                raise ArgumentError(f"{name}_token_id and mask_token_id are both {mask_token_id}; they must differ")
        self._ids, highest = _reader(tokenizer)
        if highest >= vocab_size:
            raise ArgumentError(
                f"the tokenizer has ids up to {highest}, but the model's vocabulary is 0 to {vocab_size - 1}; "
                "use the tokenizer that belongs to the model"
            )

    def place_blocks(self, shift: int, spread: int = 1) -> None:
        """Where blocks begin in the following documents.

        shift: of the predictions; with 1, blocks begin at the last token of a prompt. spread: in half of the documents
        blocks begin there, in the others up to spread − 1 tokens later, by a hash of the text.
        """
        self._shift, self._spread = shift, spread

    def _context(self, given: int, tokens: np.ndarray) -> int:
        if self._spread == 1 and not self._shift:
            return given
        drawn = zlib.crc32(tokens.tobytes())
        later = 0 if drawn % 2 else drawn // 2 % self._spread
        start = max(min(given + later, len(tokens) - 3 + self._shift), given)  # at least three tokens are left
        return max(start - self._shift, 0)

    def encode(self, record: Record) -> Document:
        """Encodes one record.

        Raises:
            ArgumentError: the text contains the mask token or an id outside the vocabulary; names the record.
            BadRecord: the tokenizer returns no tokens for the text.
        """
        if record.messages is not None:
            return self._encode_chat(record)
        prompted = bool(record.prompt)
        first = self._ids(record.prompt, True) if record.prompt else []
        rest = self._ids(record.text, not prompted)
        has_bos = (first or rest)[:1] == [self.bos_token_id]
        if len(rest) <= (has_bos and not prompted):
            raise BadRecord("the tokenizer returns no tokens for its text")
        ends = self.add_eos and record.ends
        if ends and rest[-1] != self.eos_token_id:
            rest.append(self.eos_token_id)
        tokens = self._checked(first + rest, record)
        context = self._context(len(first) if prompted else int(has_bos), tokens)
        return Document(tokens, context, prompted, ends)

    def _encode_chat(self, record: Record) -> Document:
        """Turns are trained, each from the token at which its first block begins."""
        assert record.messages is not None
        try:
            chat = encode_chat(self._tokenizer, record.messages, lambda text: self._ids(text, False), self._ends)
        except ChatMismatch as error:
            raise ArgumentError(f"{record.place}: {error}") from None
        except ChatError as error:
            raise BadRecord(str(error)) from None
        last = chat.turns[-1][1]
        ids, ends = chat.tokens[:last], self.add_eos and record.ends
        if ids[-1] in self._ends and not record.ends:
            ids.pop()
        elif ids[-1] not in self._ends and ends:
            ids.append(self.eos_token_id)
        tokens = self._checked(ids, record)
        turns = [(begin, min(end, len(ids))) for begin, end in chat.turns]
        turns[-1] = (turns[-1][0], len(ids))
        if self._align_turns:
            floors = [0, *(end for _, end in turns)]
            turns = [
                (max(self._context(begin, tokens[:end]), floor), end)
                for (begin, end), floor in zip(turns, floors, strict=False)
            ]
        turns = [(begin, end) for begin, end in turns if begin < end]
        if not turns:
            raise BadRecord("the assistant turns are empty")
        return Document(tokens, turns[0][0], True, ends, tuple(turns), self._align_turns)

    def _checked(self, ids: list[int], record: Record) -> np.ndarray:
        tokens = np.array(ids, dtype=np.int32)
        if tokens.max() >= self.vocab_size or tokens.min() < 0:
            strange = int(tokens[(tokens >= self.vocab_size) | (tokens < 0)][0])
            raise ArgumentError(
                f"{record.place}: token id {strange}, but the vocabulary is 0 to {self.vocab_size - 1}; "
                "use the tokenizer that belongs to the model"
            )
        if (tokens == self.mask_token_id).any():
            raise ArgumentError(
                f"{record.place}: its text contains the mask token (id {self.mask_token_id}), which training uses for "
                "masked positions; remove it from the text, or give the model's mask_token_id"
            )
        return tokens


def _reader(tokenizer: AnyTokenizer) -> tuple[Callable[[str, bool], list[int]], int]:
    """→ a function (text, add special tokens) → ids, and the highest id."""
    fast = tokenizer if isinstance(tokenizer, Tokenizer) else getattr(tokenizer, "backend_tokenizer", None)
    if isinstance(fast, Tokenizer):
        own = Tokenizer.from_str(fast.to_str())  # a copy, because the file may enable truncation or padding
        own.no_truncation()
        own.no_padding()
        highest = max(own.get_vocab(with_added_tokens=True).values(), default=0)
        return (lambda text, special: own.encode(text, add_special_tokens=special).ids), highest
    assert not isinstance(tokenizer, Tokenizer)
    return (lambda text, special: list(tokenizer(text, add_special_tokens=special)["input_ids"])), len(tokenizer) - 1
