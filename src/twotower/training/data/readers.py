"""Which records each row of the batches reads, and in which order. Record p of the run belongs to row p mod batch size.

The records of a row depend neither on how fast other rows read nor on the number of processes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from twotower.errors import ArgumentError, TwoTowerError
from twotower.training.data.documents import Record
from twotower.training.data.files import RawRecord
from twotower.training.data.keyed_random import permutation
from twotower.training.data.records import Records, Stream
from twotower.training.data.sources import Source
from twotower.training.data.state import ReaderState

MARK_EVERY = 256  # records of a stream between two positions from which reading can resume


class Reader(Protocol):
    """positions: for each row of this process, the number of the next record to read, counted over all epochs."""

    positions: dict[int, int]

    def next(self, row: int) -> Record | None:
        """The row's next usable record; None when `max_epochs` are over."""
        ...

    def state_dict(self) -> ReaderState:
        """The state of the reader, without `positions`."""
        ...

    def load_state_dict(self, state: ReaderState, positions: dict[int, int]) -> None: ...


def open_reader(
    source: Source, batch_size: int, rows: Sequence[int], max_epochs: int | None, *key: int | str
) -> Reader:
    """batch_size: rows over all processes; rows: those of this process; key: of the source's order."""
    if isinstance(source.records, Stream):
        return _InOrder(source, source.records, batch_size, rows, max_epochs)
    return _Shuffled(source, batch_size, rows, max_epochs, key)


class _Shuffled:
    """Reads each epoch in a new order, a permutation keyed by (key, epoch). The state is the positions alone."""

    def __init__(
        self, source: Source, batch_size: int, rows: Sequence[int], max_epochs: int | None, key: Sequence[int | str]
    ) -> None:
        assert not isinstance(source.records, Stream)
        self.source, self.records = source, source.records
        self.batch_size, self.max_epochs, self.key = batch_size, max_epochs, key
        self.positions = {row: row for row in rows}
        self._orders: dict[int, np.ndarray] = {}

    def next(self, row: int) -> Record | None:
        while True:
            epoch, place = divmod(self.positions[row], len(self.records))
            if self.max_epochs is not None and epoch >= self.max_epochs:
                return None
            self.positions[row] += self.batch_size
            record = self.source.parse(self.records[int(self._order(epoch)[place])])
            if record is not None:
                return record

    def state_dict(self) -> ReaderState:
        return {"records": len(self.records)}

    def load_state_dict(self, state: ReaderState, positions: dict[int, int]) -> None:
        if state["records"] != len(self.records):
            raise ArgumentError(
                f"{self.source.name}: has {len(self.records)} records, but the run to be resumed had "
                f"{state['records']}; give the same data, or start a new run"
            )
        self.positions = dict(positions)

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            if len(self._orders) > 2:  # rows are a few records apart: in two epochs at once, seldom more
                del self._orders[min(self._orders)]
            self._orders[epoch] = permutation(len(self.records), "order", *self.key, epoch)
        return self._orders[epoch]


class _InOrder:
    """A stream, epoch after epoch. Rows read at different speeds: records that the fastest row has passed are buffered.

    The state is a mark: a place in the stream that no row has passed yet. Resuming reads on from the mark and drops
    the records that were used before.
    """

    def __init__(
        self, source: Source, stream: Stream, batch_size: int, rows: Sequence[int], max_epochs: int | None
    ) -> None:
        self.source, self.stream = source, stream
        self.batch_size, self.max_epochs = batch_size, max_epochs
        self.positions = {row: row for row in rows}
        self._ahead: dict[int, RawRecord] = {}
        self._begin({"at": 0, "pass_start": 0, "passes": 0, "stream": ""})

    def next(self, row: int) -> Record | None:
        last = self.passes + 2
        while True:
            position = self.positions[row]
            while self.at <= position and (self.max_epochs is None or self.passes < self.max_epochs):
                self._advance()
            if self.at <= position:
                return None
            self.positions[row] += self.batch_size
            record = self.source.parse(self._ahead.pop(position))
            if record is not None:
                return record
            if self.passes > last:
                raise TwoTowerError(
                    f"{self.source.name}: no usable document in two epochs ({len(self.source.bad)} bad records); give "
                    "other data or a smaller batch size"
                )

    def state_dict(self) -> ReaderState:
        self._prune()
        return self._marks[0].copy()

    def load_state_dict(self, state: ReaderState, positions: dict[int, int]) -> None:
        self.positions = dict(positions)
        self._ahead.clear()
        self._begin(state)

    def _begin(self, mark: ReaderState) -> None:
        self.at, self.pass_start, self.passes = mark["at"], mark["pass_start"], mark["passes"]
        self._marks = deque([mark.copy()])
        self._records = self.stream.read(mark["stream"])

    def _advance(self) -> None:
        """Reads one record, or begins the next epoch."""
        raw = self._records.next()
        if raw is None:
            length = self.at - self.pass_start
            if length < self.batch_size:
                raise too_few_documents([self.source], length, self.batch_size)
            self.passes, self.pass_start = self.passes + 1, self.at
            self._records = self.stream.read()
            return
        if self.positions.get(self.at % self.batch_size, self.at + 1) <= self.at:
            self._ahead[self.at] = raw
        self.at += 1
        if self.at % MARK_EVERY == 0:
            place = self._records.state()
            self._marks.append({"at": self.at, "pass_start": self.pass_start, "passes": self.passes, "stream": place})
            self._prune()

    def _prune(self) -> None:
        """Drops marks that every row has passed."""
        slowest = min(self.positions.values())
        while len(self._marks) > 1 and self._marks[1]["at"] <= slowest:
            self._marks.popleft()


def too_few_documents(sources: Sequence[Source], documents: int, batch_size: int) -> ArgumentError:
    name, bad = ", ".join(source.name for source in sources), "".join(source.first_bad() for source in sources)
    if documents == 0:
        return ArgumentError(f"{name}: contains no usable document; give data that is not empty, bad or held out{bad}")
    return ArgumentError(
        f"{name}: {documents} document{'s' * (documents > 1)} for the {batch_size} rows of a batch "
        f"(at least one a rank); give more data or a smaller batch size{bad}"
    )


def one_epoch(source: Source) -> Iterator[Record]:
    """Every usable record once, in the order of the source."""
    for raw in _raws(source.records):
        record = source.parse(raw)
        if record is not None:
            yield record


def _raws(records: Records | Stream) -> Iterator[RawRecord]:
    if isinstance(records, Stream):
        iterator = records.read()
        while (raw := iterator.next()) is not None:
            yield raw
    else:
        for number in range(len(records)):
            yield records[number]
