"""Packs documents into rows. A document occupies whole blocks, so no block spans two documents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from twotower.training.data.batch import Batch
from twotower.training.data.documents import Document
from twotower.training.data.keyed_random import uniform

Offset = Literal["random", "fixed"]


@dataclass(frozen=True)
class Piece:
    """A document, or a part of a document that is longer than a row.

    tokens: (N,) int32. context: number of first tokens that are never masked. lead: padding positions before the
    tokens, fewer than block_size. ends: the last block is filled with EOS. prompted: the context is a record's prompt.
    """

    tokens: np.ndarray
    context: int
    lead: int
    ends: bool
    prompted: bool = False

    def columns(self, block_size: int) -> int:
        """The number of positions of its blocks."""
        return round_up(self.lead + len(self.tokens), block_size)

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
    if document.prompted:
        lead = -document.context % block_size
    elif offset == "random":
        lead = int(uniform("lead", *key) * block_size)
    return Piece(document.tokens, document.context, lead, document.ends, document.prompted)


def fill_row(waiting: list[Piece], refill: Callable[[], None], row_length: int, block_size: int) -> list[Piece]:
    """Takes the pieces of one row out of `waiting`: first the oldest, then always the longest that fits.

    refill: called before each choice, to add pieces to `waiting`. A piece longer than a row is cut: its first part
    fills the row, its rest begins the next row.
    """
    row: list[Piece] = []
    free = row_length
    while free:
        refill()
        sizes = [piece.columns(block_size) for piece in waiting]
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
    shape = (len(rows), row_length)
    tokens, document = np.full(shape, pad, dtype=np.int64), np.full(shape, -1, dtype=np.int64)
    text, denoised, prompt = (np.zeros(shape, dtype=bool) for _ in range(3))
    for r, row in enumerate(rows):
        column = 0
        for number, piece in enumerate(row):
            start = column + piece.lead
            end = start + len(piece.tokens)
            stop = column + piece.columns(block_size)
            tokens[r, start:end] = piece.tokens
            text[r, start:end] = True
            prompt[r, start : start + piece.context * piece.prompted] = True
            trained = column + round_up(piece.lead + piece.context, block_size)
            if piece.ends:
                tokens[r, end:stop] = eos
                document[r, start:stop] = number
                denoised[r, trained:stop] = True
            else:
                document[r, start:end] = number
                denoised[r, trained : end - end % block_size] = True
            column = stop
    arrays = (tokens, document, text, denoised, prompt, np.asarray(index, dtype=np.int64))
    return Batch(*(torch.from_numpy(array) for array in arrays))
