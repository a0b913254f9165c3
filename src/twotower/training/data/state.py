"""Where a run stands in its data: what a checkpoint keeps of it."""

from __future__ import annotations

from typing import NotRequired, TypedDict

from torch import Tensor


class ReaderState(TypedDict, total=False):
    """records: how many a source at random access has. The rest: a mark in a stream, see `readers._InOrder`."""

    records: int
    at: int
    pass_start: int
    passes: int
    stream: str


class RowStreamState(TypedDict):
    """One row. number: of documents read; positions: in each source; tokens, waiting (n, 5): pieces not placed yet."""

    number: int
    positions: list[int]
    tokens: Tensor
    waiting: Tensor


class LoaderState(TypedDict):
    """Everything that the next batch depends on. merged: 1 where the states of several ranks are joined."""

    step: int
    block_size: int
    layout: dict[str, int | str]
    counts: list[int]
    row_streams: dict[str, RowStreamState]
    readers: list[ReaderState]
    bad: list[dict[str, str]]
    merged: NotRequired[int]
