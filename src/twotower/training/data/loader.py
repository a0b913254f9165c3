"""The batches of a run: deterministic, independent of the number of processes, resumable between any two batches."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from twotower.errors import ArgumentError
from twotower.training.data.batch import Batch
from twotower.training.data.checks import check_sizes, require_enough
from twotower.training.data.documents import BadRecord, Encoder
from twotower.training.data.keyed_random import uniform
from twotower.training.data.packing import Offset, Piece, collate, fill_row, to_piece
from twotower.training.data.readers import open_reader
from twotower.training.data.sources import Source
from twotower.training.data.state import LoaderState, RowStreamState
from twotower.training.data.waiting import waiting_pieces, waiting_state
from twotower.training.old_names import LOADER_LAYOUT, with_present_names

LOOK_AHEAD = 32


@dataclass
class Statistics:
    """What this process has read and packed.

    documents, tokens: encoded, with EOS. columns: positions of the rows made. text: positions with text. bad: number
    of different bad records of each source. first_bad: messages about the first bad records.
    """

    documents: int = 0
    tokens: int = 0
    columns: int = 0
    text: int = 0
    bad: dict[str, int] = field(default_factory=dict)
    first_bad: list[str] = field(default_factory=list)

    @property
    def efficiency(self) -> float:
        """The share of positions that hold text, not padding or repeated EOS."""
        return self.text / max(self.columns, 1)


@dataclass
class _RowStream:
    """The documents of one row of every batch. number: how many were read; waiting: those not placed yet."""

    row: int
    number: int = 0
    waiting: list[Piece] = field(default_factory=list)
    ended: bool = False


class RowLoader:
    """This rank's rows of each batch. Row ℓ of R takes the documents ℓ, ℓ + R, ℓ + 2R, … and packs them by itself.

    Rank r of W has the rows ℓ with ℓ mod W = r, and reads no other documents. One rank gives the rows of W ranks
    interleaved, bit for bit.

    The source of a document is drawn by weight, keyed by the document's number. Within a source each row reads its own
    share, in a new order each epoch (streams keep their order). Rows read as fast as they pack, so the records that a
    stream's slower rows have not read yet stay in memory.

    Args:
        batch_size: R, the rows over all ranks: a multiple of the ranks. row_length: tokens of a row, in whole blocks.
        offset: "random": blocks begin at a random position of a text, keyed by (seed, document number). "fixed": each
            document begins with a block.
        max_epochs: how often each source is read; None: without limit.

    Raises:
        ArgumentError: sizes that do not divide; fewer documents than rows; less text than a block.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        encoder: Encoder,
        *,
        batch_size: int,
        row_length: int,
        block_size: int,
        seed: int = 0,
        offset: Offset = "random",
        max_epochs: int | None = None,
        look_ahead: int = LOOK_AHEAD,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        check_sizes(batch_size, row_length, block_size, rank, world)
        if not sources:
            raise ArgumentError("no data; give at least one source")
        if max_epochs is not None and max_epochs < 1:
            raise ArgumentError(f"max_epochs is {max_epochs}; give at least 1, or None to repeat the data")
        if offset not in ("random", "fixed"):
            raise ArgumentError(f"offset is {offset!r}; give 'random' or 'fixed'")
        require_enough(sources, encoder, batch_size, block_size)
        self.sources, self.encoder = list(sources), encoder
        self.batch_size, self.row_length, self.block_size = batch_size, row_length, block_size
        self.seed, self.offset, self.look_ahead = seed, offset, max(1, look_ahead)
        self.step = 0
        self._first = rank == 0
        own = range(rank, batch_size, world)
        self._row_streams = [_RowStream(row) for row in own]
        self._readers = [open_reader(s, batch_size, own, max_epochs, seed, i) for i, s in enumerate(sources)]
        self._counts = Statistics()

    def set_block_size(self, block_size: int) -> None:
        """Sets the block size of the following batches (a later stage of training)."""
        if block_size == self.block_size:
            return
        check_sizes(self.batch_size, self.row_length, block_size, 0, 1)
        self.block_size = block_size
        for stream in self._row_streams:  # also with the new size, blocks begin where prompts end
            leads = ((-p.context if p.prompted and p.aligned else p.lead) % block_size for p in stream.waiting)
            stream.waiting = [replace(piece, lead=lead) for piece, lead in zip(stream.waiting, leads, strict=True)]

    def exhausted(self) -> bool:
        """True if this rank has no document left: `next` gives rows of padding. Never with unlimited epochs."""
        for stream in self._row_streams:
            self._refill(stream)  # the end of a source shows only when more is read
        return not any(stream.waiting for stream in self._row_streams)

    def next(self) -> Batch:
        """This rank's rows of the next batch: (R / W, row_length)."""
        packed = []
        for stream in self._row_streams:
            row = fill_row(stream.waiting, partial(self._refill, stream), self.row_length, self.block_size)
            self._counts.columns += self.row_length
            self._counts.text += sum(len(piece.tokens) for piece in row)
            packed.append(row)
        index = [self.step * self.batch_size + stream.row for stream in self._row_streams]
        self.step += 1
        ids = {"eos": self.encoder.eos_token_id, "pad": self.encoder.pad_token_id}
        return collate(packed, index, self.row_length, self.block_size, **ids)

    def statistics(self) -> Statistics:
        """This rank's counts since the beginning of the run."""
        bad = {source.name: len(source.bad) for source in self.sources}
        firsts = (list(itertools.islice(source.bad.items(), 5)) for source in self.sources)
        messages = [f"{where}: {why}" for first in firsts for where, why in first]
        counts = self._counts
        return Statistics(counts.documents, counts.tokens, counts.columns, counts.text, bad, messages)

    def state_dict(self) -> LoaderState:
        """All that the next batch depends on: integers, strings and int32 tensors."""
        counts = self._counts
        return {
            "step": self.step,
            "block_size": self.block_size,
            "layout": self._layout(),
            "counts": [counts.documents, counts.tokens, counts.columns, counts.text],
            "row_streams": {str(stream.row): self._stream_state(stream) for stream in self._row_streams},
            "readers": [reader.state_dict() for reader in self._readers],
            "bad": [dict(source.bad) for source in self.sources],
        }

    def load_state_dict(self, state: LoaderState) -> None:
        """Continues after the batch at which the state was taken, with the block size of that batch.

        Raises:
            ArgumentError: the state is of other data or sizes, or of other ranks (see `merge_states`).
        """
        layout = with_present_names(state["layout"], LOADER_LAYOUT)
        for name, value in self._layout().items():
            if layout.get(name) != value:
                raise ArgumentError(
                    f"{name} is {value}, but the run to be resumed had {layout.get(name)}; give that value, "
                    "or start a new run"
                )
        missing = [stream.row for stream in self._row_streams if str(stream.row) not in state["row_streams"]]
        if missing:
            raise ArgumentError(
                f"the data's state has no row {missing[0]}: it is of other ranks; combine all ranks' "
                "states with merge_states"
            )
        self.step, self.block_size = state["step"], state["block_size"]
        # Merged counts are of all ranks: only the first rank takes them, so that a sum over ranks is right.
        documents, tokens, columns, text = state["counts"]
        goes_on = not state.get("merged") or self._first
        self._counts = Statistics(documents, tokens, columns, text) if goes_on else Statistics()
        for stream in self._row_streams:
            saved = state["row_streams"][str(stream.row)]
            stream.number, stream.ended = saved["number"], False
            stream.waiting = waiting_pieces(saved)
        for i, (reader, mark) in enumerate(zip(self._readers, state["readers"], strict=True)):
            positions = {
                stream.row: state["row_streams"][str(stream.row)]["positions"][i] for stream in self._row_streams
            }
            reader.load_state_dict(mark, positions)
        for source, bad in zip(self.sources, state["bad"], strict=True):
            source.bad.clear()
            source.bad.update(bad)

    def _refill(self, stream: _RowStream) -> None:
        while len(stream.waiting) < self.look_ahead and not stream.ended:
            piece = self._read(stream)
            if piece is None:
                stream.ended = True
            else:
                stream.waiting.append(piece)

    def _read(self, stream: _RowStream) -> Piece | None:
        """The row's next document with its lead; None when every source is exhausted."""
        number = stream.row + stream.number * self.batch_size
        draw = uniform("source", self.seed, number)
        live = list(range(len(self.sources)))
        while live:
            below = list(itertools.accumulate(self.sources[i].weight for i in live))
            chosen = live[min(bisect.bisect_right(below, draw * below[-1]), len(live) - 1)]
            record = self._readers[chosen].next(stream.row)
            if record is None:
                live.remove(chosen)  # its epochs are over: the documents come from the other sources
                continue
            try:
                document = self.encoder.encode(record)
            except BadRecord as bad:
                self.sources[chosen].reject(record.place, str(bad))
                continue
            piece: Piece | None = to_piece(document, self.block_size, self.offset, self.seed, number)
            assert piece is not None
            if piece.turns and (piece := piece.whole_turns(self.row_length, self.block_size)) is None:
                reason = f"its first assistant turn begins after {document.context} tokens, beyond the row length"
                self.sources[chosen].reject(record.place, f"{reason}, {self.row_length}")
                continue
            stream.number += 1
            self._counts.documents += 1
            self._counts.tokens += len(piece.tokens)
            return piece
        return None

    def _stream_state(self, stream: _RowStream) -> RowStreamState:
        positions = [reader.positions[stream.row] for reader in self._readers]
        return {"number": stream.number, "positions": positions, **waiting_state(stream.waiting)}

    def _layout(self) -> dict[str, int | str]:
        """What the batches depend on; it must not change within a run."""
        sizes = {"batch_size": self.batch_size, "row_length": self.row_length, "seed": self.seed}
        mixture = " ".join(f"{Path(s.name).name}*{s.weight:g}-{s.held_out_fraction:g}" for s in self.sources)
        return {**sizes, "offset": self.offset, "look_ahead": self.look_ahead, "mixture": mixture}


def merge_states(states: Sequence[LoaderState]) -> LoaderState:
    """Merges the states of all ranks after one step into a state that any number of ranks can load."""
    if len({state["step"] for state in states}) != 1:
        steps = sorted({state["step"] for state in states})
        raise ArgumentError(f"states of steps {steps} cannot be merged; give the states of one step")
    merged = states[0].copy()
    merged["row_streams"] = {row: saved for state in states for row, saved in state["row_streams"].items()}
    merged["counts"] = [sum(column) for column in zip(*(state["counts"] for state in states), strict=True)]
    per_source = zip(*(state["readers"] for state in states), strict=True)
    merged["readers"] = [min(saved, key=lambda mark: mark.get("at", 0)) for saved in per_source]  # the slowest rank's
    bad = zip(*(state["bad"] for state in states), strict=True)
    merged["bad"] = [{place: why for part in parts for place, why in part.items()} for parts in bad]
    merged["merged"] = 1
    return merged
