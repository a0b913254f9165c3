"""Packs documents into rows. A document occupies whole blocks, so no block spans two documents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from twotower.training.data.batch import Batch
from twotower.training.data.chats import Span
from twotower.training.data.documents import Document
from twotower.training.data.keyed_random import uniform

Offset = Literal["random", "fixed"]


@dataclass(frozen=True)
class Piece:
    """A document, or a part of a document that is longer than a row.

    tokens: (N,) int32. context: number of first tokens that are never masked. lead: padding positions before the
    tokens, fewer than block_size. ends: the last block is filled with EOS. prompted: the context is a record's prompt.
    turns, aligned: as in `Document`.
    """

    tokens: np.ndarray
    context: int
    lead: int
    ends: bool
    prompted: bool = False
    turns: tuple[Span, ...] = ()
    aligned: bool = True

    def columns(self, block_size: int) -> int:
        """The number of positions of its blocks."""
        if self.turns and self.aligned:
            return self.turn_columns(block_size)[-1][1]
        return round_up(self.lead + len(self.tokens), block_size)

    def turn_columns(self, block_size: int) -> list[Span]:
        """The columns of each turn: from the block that begins where the turn begins to the end of its last block."""
        out, column, done = [], self.lead, 0
        for begin, end in self.turns:
            first = round_up(column + begin - done, block_size)
            column, done = round_up(first + end - begin, block_size), end
            out.append((first, column))
        return out

    def whole_turns(self, columns: int, block_size: int) -> Piece | None:
        """The piece with as many first turns as `columns` positions hold; None if they hold no token of a turn.

        If not even the first turn fits, the piece ends within it, as a long text is cut.
        """
        places = self.turn_columns(block_size) if self.aligned else self.turns
        fitting = sum(round_up(end, block_size) <= columns for _, end in places)
        if fitting == len(self.turns):
            return self
        if fitting:
            kept = self.turns[:fitting]
            return replace(self, tokens=self.tokens[: kept[-1][1]], turns=kept, ends=True)
        room, begin = columns - self.lead, self.turns[0][0]
        if room <= begin:
            return None
        return replace(self, tokens=self.tokens[:room], turns=((begin, room),), ends=False)

    def cut(self, columns: int) -> tuple[Piece, Piece]:
        """Splits into a part that fills `columns` positions and the rest, which starts from zero state in another row.

        If the prompt is longer than the first part, the prompt's rest is context of the second part.
        """
        room = columns - self.lead
        first = replace(self, tokens=self.tokens[:room], context=min(self.context, room), ends=False)
        return first, Piece(self.tokens[room:], max(0, self.context - room), 0, self.ends, self.prompted)


def round_up(columns: int, block_size: int) -> int:
    """Rounds up to a multiple of the block size."""
    return -(-columns // block_size) * block_size


def to_piece(document: Document, block_size: int, offset: Offset, *key: int | str) -> Piece:
    """Gives a document its lead.

    With a prompt, the lead lets a block begin where the prompt ends. Without a prompt, offset "random" draws the lead
    uniformly from 0 … block_size−1 by the key, so that blocks begin anywhere in a text; "fixed" means no lead.
    """
    lead = 0
    if document.turns and not document.aligned:
        return Piece(document.tokens, document.context, 0, document.ends, True, document.turns, False)
    if document.prompted:
        lead = -document.context % block_size
    elif offset == "random":
        lead = int(uniform("lead", *key) * block_size)
    return Piece(document.tokens, document.context, lead, document.ends, document.prompted, document.turns)


def fill_row(waiting: list[Piece], refill: Callable[[], None], row_length: int, block_size: int) -> list[Piece]:
    """Takes the pieces of one row out of `waiting`: first the oldest, then always the longest that fits.

    refill: called before each choice, to add pieces to `waiting`. A piece longer than a row is cut: its first part
    fills the row, its rest begins the next row. Of a conversation, the first turns that fit are kept as a whole, and
    its rest is left out.
    """
    row: list[Piece] = []
    free = row_length
    while free:
        refill()
        sizes = [piece.columns(block_size) for piece in waiting]
        if not row and sizes and sizes[0] > free and waiting[0].turns:
            kept = waiting.pop(0).whole_turns(free, block_size)
            if kept is not None:
                return [kept]
            continue
        if not row and sizes and sizes[0] > free:
            first, waiting[0] = waiting[0].cut(free)
            return [first]
        chosen = max(
            (i for i, size in enumerate(sizes) if size <= free and (row or i == 0)),
            key=lambda i: (sizes[i], -i),
            default=None,
        )
        if chosen is None:
            break
        row.append(waiting.pop(chosen))
        free -= sizes[chosen]
    return row


def collate(
    rows: Sequence[Sequence[Piece]], index: Sequence[int], row_length: int, block_size: int, *, eos: int, pad: int
) -> Batch:
    """Rows of pieces → a batch of (len(rows), row_length).

    Blocks with a lead or a context-only token are not denoised, because generation has no such blocks.
    """
    arrays = _Arrays.of(len(rows), row_length, pad)
    for r, row in enumerate(rows):
        column = 0
        for number, piece in enumerate(row):
            if piece.turns and not piece.aligned:
                arrays.put_unaligned_chat(r, number, column, piece)
            elif piece.turns:
                arrays.put_chat(r, number, column, piece, block_size, eos)
            else:
                arrays.put_text(r, number, column, piece, block_size, eos)
            column += piece.columns(block_size)
    chats = any(piece.turns for row in rows for piece in row)
    found = (torch.from_numpy(array) for array in (*arrays.usual, np.asarray(index, dtype=np.int64)))
    return Batch(*found, *(torch.from_numpy(array) for array in (arrays.filler, arrays.target) if chats))


@dataclass(frozen=True)
class _Arrays:
    """The tensors of a batch, (B, S) each, before they are tensors; see `Batch`."""

    tokens: np.ndarray
    document: np.ndarray
    text: np.ndarray
    denoised: np.ndarray
    prompt: np.ndarray
    filler: np.ndarray
    target: np.ndarray

    @classmethod
    def of(cls, rows: int, row_length: int, pad: int) -> _Arrays:
        shape = (rows, row_length)
        ids = np.full(shape, pad, dtype=np.int64), np.full(shape, -1, dtype=np.int64)
        return cls(*ids, *(np.zeros(shape, dtype=bool) for _ in range(5)))

    @property
    def usual(self) -> tuple[np.ndarray, ...]:
        """Those of every batch, in the order of `Batch`."""
        return self.tokens, self.document, self.text, self.denoised, self.prompt

    def put_text(self, r: int, number: int, column: int, piece: Piece, block_size: int, eos: int) -> None:
        """Writes a document of a text into row r, from its first column on."""
        start = column + piece.lead
        end = start + len(piece.tokens)
        stop = column + piece.columns(block_size)
        self.tokens[r, start:end] = piece.tokens
        self.text[r, start:end] = True
        self.prompt[r, start : start + piece.context * piece.prompted] = True
        trained = column + round_up(piece.lead + piece.context, block_size)
        if piece.ends:
            self.tokens[r, end:stop] = eos
            self.document[r, start:stop] = number
            self.denoised[r, trained:stop] = True
        else:
            self.document[r, start:end] = number
            self.denoised[r, trained : end - end % block_size] = True
        self.target[r, start:stop] = True

    def put_chat(self, r: int, number: int, column: int, piece: Piece, block_size: int, eos: int) -> None:
        """Writes a conversation. Padding may precede a turn, which begins a block, and EOS fills its last block.

        Later blocks do not read this EOS, unless it ends the document.
        """
        at, done = column + piece.lead, 0
        self.prompt[r, at : at + piece.turns[0][0]] = True
        for (begin, end), (first, stop) in zip(piece.turns, piece.turn_columns(block_size), strict=True):
            start, stop = column + first, column + stop
            last, inner = start + end - begin, end < len(piece.tokens)
            self._put(r, number, at, piece.tokens[done:begin])
            self._put(r, number, start, piece.tokens[begin:end])
            self.target[r, start:last] = True
            if inner or piece.ends:
                self.tokens[r, last:stop], self.document[r, last:stop] = eos, number
                self.target[r, last:stop] = True
                self.filler[r, last:stop] = inner
                self.denoised[r, start:stop] = True
            else:
                self.denoised[r, start : last - last % block_size] = True
            at, done = stop, end

    def put_unaligned_chat(self, r: int, number: int, column: int, piece: Piece) -> None:
        """Writes a conversation without blocks, for next-token prediction."""
        self._put(r, number, column, piece.tokens)
        self.prompt[r, column : column + piece.turns[0][0]] = True
        for begin, end in piece.turns:
            self.target[r, column + begin : column + end] = True

    def _put(self, r: int, number: int, column: int, tokens: np.ndarray) -> None:
        place = slice(column, column + len(tokens))
        self.tokens[r, place], self.document[r, place], self.text[r, place] = tokens, number, True
