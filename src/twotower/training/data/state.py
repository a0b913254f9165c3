"""The position of a run in its data, as checkpoints store it."""

from __future__ import annotations

from typing import NotRequired, TypedDict

from torch import Tensor


class ReaderState(TypedDict, total=False):
    """records: number of records, with random access. Other fields: a mark in a stream, see `readers._InOrder`."""

    records: int
    at: int
    pass_start: int
    passes: int
    stream: str


class WaitingState(TypedDict):
    """Pieces not placed yet: their tokens, and their properties (n, 5).

    turns: (m, 4), the number of a piece, a span of its turns, and whether the turns begin blocks.
    """

    tokens: Tensor
    waiting: Tensor
    turns: NotRequired[Tensor]


class RowStreamState(WaitingState):
    """One row. number: documents read. positions: in each source."""

    number: int
    positions: list[int]


class LoaderState(TypedDict):
    """All that the next batch depends on. merged: 1 if the states of several ranks were merged."""

    step: int
    block_size: int
    layout: dict[str, int | str]
    counts: list[int]
    row_streams: dict[str, RowStreamState]
    readers: list[ReaderState]
    bad: list[dict[str, str]]
    merged: NotRequired[int]
