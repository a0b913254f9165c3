"""Documents → rows. Every document occupies whole blocks of its row, so no block spans two."""

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
    """What is placed: a document, or what is left of one that is longer than a row.

    tokens: (N,) int32; context: how many of the first are never masked; lead < block_size: padding columns before
    them; ends: the rest of the last block is EOS; prompted: the context is a prompt that came with the text.
    """

    tokens: np.ndarray
    context: int
    lead: int
    ends: bool
    prompted: bool = False

    def columns(self, block_size: int) -> int:
        """The columns of its whole blocks."""
        return round_up(self.lead + len(self.tokens), block_size)

    def cut(self, columns: int) -> tuple[Piece, Piece]:
        """The part that fills `columns`, and the rest, which starts from zero state in a row of its own.

        A prompt longer than the first part goes on being context in the rest.
        """
        room = columns - self.lead
        first = replace(self, tokens=self.tokens[:room], context=min(self.context, room), ends=False)
        return first, Piece(self.tokens[room:], max(0, self.context - room), 0, self.ends, self.prompted)


def round_up(columns: int, block_size: int) -> int:
    """Rounded up to whole blocks."""
    return -(-columns // block_size) * block_size


def to_piece(document: Document, block_size: int, offset: Offset, *key: int | str) -> Piece:
    """A document with its lead.

    A prompted document's blocks begin where its prompt ends. Otherwise offset "random" draws the lead by the key,
    uniformly from 0 … block_size−1, so that block edges fall anywhere in the text; "fixed" has none.
    """
    lead = 0
    if document.prompted:
        lead = -document.context % block_size
    elif offset == "random":
        lead = int(uniform("lead", *key) * block_size)
    return Piece(document.tokens, document.context, lead, document.ends, document.prompted)


def fill_row(waiting: list[Piece], refill: Callable[[], None], row_length: int, block_size: int) -> list[Piece]:
    """One row's pieces, taken out of `waiting`: the oldest first, then always the longest that still fits.

    refill: tops `waiting` up again, before each choice. A piece longer than a row is cut to fill it, and what is
    left of it comes first in the next one.
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

    Blocks that hold lead padding or a context-only token are not denoised: in generation no block does.
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
