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


class RowStreamState(TypedDict):
    """One row. number: documents read. positions: in each source. tokens, waiting (n, 5): pieces not placed yet."""

    number: int
    positions: list[int]
    tokens: Tensor
    waiting: Tensor


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
