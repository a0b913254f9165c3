"""Validation documents as batches: each document once, in the order of the source, not shuffled."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence

from twotower.errors import ArgumentError
from twotower.training.data.batch import Batch
from twotower.training.data.checks import check_sizes
from twotower.training.data.documents import BadRecord, Document, Encoder
from twotower.training.data.loader import LOOK_AHEAD
from twotower.training.data.packing import Piece, collate, fill_row, to_piece
from twotower.training.data.readers import one_epoch, too_few_documents
from twotower.training.data.sources import Source


def held_out_batches(
    sources: Sequence[Source],
    encoder: Encoder,
    *,
    batch_size: int,
    row_length: int,
    block_size: int,
    documents: int | None = None,
    rank: int = 0,
    world: int = 1,
) -> Iterator[Batch]:
    """At most `documents` documents, one source after the other in turn → this rank's batches (batch_size / W, S).

    A document begins with a block. Every rank gets equally many batches; rows that the last batch lacks are padding,
    without text. `index` counts rows.

    Raises:
        ArgumentError: there are no held-out documents, or no usable ones at all.
    """
    check_sizes(batch_size, row_length, block_size, rank, world)
    unread = itertools.islice(_in_turn(sources, encoder), documents)
    waiting: list[Piece] = []

    def refill() -> None:
        for document in itertools.islice(unread, LOOK_AHEAD - len(waiting)):
            waiting.append(to_piece(document, block_size, "fixed"))

    first = 0
    while packed := list(
        itertools.takewhile(bool, (fill_row(waiting, refill, row_length, block_size) for _ in range(batch_size)))
    ):
        packed += [[]] * (batch_size - len(packed))
        own = range(rank, batch_size, world)
        ids = {"eos": encoder.eos_token_id, "pad": encoder.pad_token_id}
        yield collate([packed[i] for i in own], [first + i for i in own], row_length, block_size, **ids)
        first += batch_size
    if not first:
        if not any(source.has_good for source in sources):
            raise too_few_documents(sources, 0, batch_size)
        raise ArgumentError(
            f"{', '.join(source.name for source in sources)}: no held-out documents; give validation data or "
            "a larger share (--held-out 0.1), or train without validation (--held-out 0)"
            + "".join(source.first_bad() for source in sources)
        )


def _in_turn(sources: Sequence[Source], encoder: Encoder) -> Iterator[Document]:
    queue = deque((source, one_epoch(source)) for source in sources)
    while queue:
        source, records = queue.popleft()
        record = next(records, None)
        if record is None:
            continue
        queue.append((source, records))
        try:
            yield encoder.encode(record)
        except BadRecord as bad:
            source.reject(record.place, str(bad))
