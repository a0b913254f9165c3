"""Batches of text for measurements of both towers: files, or problems of the suite."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from twotower.config import TwoTowerConfig
from twotower.errors import ArgumentError
from twotower.evaluation.tasks.problem_sets import stream_problems
from twotower.training.data import Batch, Encoder, Piece, Record, Source, collate, fill_row, held_out_batches, to_piece

BLOCK_SIZE = 16
ROWS = 4  # of a batch


def check_towers(config: TwoTowerConfig, option: str) -> None:
    """Raises ArgumentError for a model whose denoiser is the context tower with adapters."""
    if config.denoiser.adapters is not None:
        raise ArgumentError(f"{option} needs a denoiser of its own, and this model's are adapters; leave {option} out")


def row_length(window: int) -> int:
    """Tokens of a row: 512, or the context window if it is shorter, in whole blocks."""
    return max(min(512, window) // BLOCK_SIZE, 1) * BLOCK_SIZE


def text_batches(data: Sequence[str], encoder: Encoder, tokens: int, length: int) -> list[Batch]:
    """About `tokens` tokens of text, in batches of 4 rows of `length` tokens.

    data: items as in `twotower train --data`, read in turn; without items, problems of the suite's test split.

    Raises:
        ArgumentError: the data cannot be read, or have no document.
    """
    count = max(tokens // (ROWS * length), 1)
    if data:
        sources = [Source(item) for item in data]
        batches = held_out_batches(sources, encoder, batch_size=ROWS, row_length=length, block_size=BLOCK_SIZE)
    else:
        batches = _suite_batches(encoder, length)
    found = list(itertools.islice(batches, count))
    if not any(bool(batch.denoised.any()) for batch in found):
        raise ArgumentError(f"{', '.join(data)}: no text has a whole block of {BLOCK_SIZE} tokens; give longer texts")
    return found


def _suite_batches(encoder: Encoder, length: int) -> Iterator[Batch]:
    pieces = (
        to_piece(encoder.encode(Record(problem.answer, problem.prompt, "a problem")), BLOCK_SIZE, "fixed")
        for problem in stream_problems("test", 1)
    )
    waiting: list[Piece] = []

    def refill() -> None:
        waiting.extend(itertools.islice(pieces, 64 - len(waiting)))

    for first in itertools.count(0, ROWS):
        rows = [fill_row(waiting, refill, length, BLOCK_SIZE) for _ in range(ROWS)]
        ids = {"eos": encoder.eos_token_id, "pad": encoder.pad_token_id}
        yield collate(rows, range(first, first + ROWS), length, BLOCK_SIZE, **ids)
