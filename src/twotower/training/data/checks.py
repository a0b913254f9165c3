"""Checks of the data before a run begins. Each failure is an error of one line."""

from __future__ import annotations

from collections.abc import Sequence

from twotower.errors import ArgumentError
from twotower.training.data.documents import BadRecord, Encoder
from twotower.training.data.readers import one_epoch, too_few_documents
from twotower.training.data.records import Stream
from twotower.training.data.sources import Source


def check_sizes(batch_size: int, row_length: int, block_size: int, rank: int, world: int) -> None:
    """Checks that a row is whole blocks and that the ranks share a batch equally."""
    if block_size < 1:
        raise ArgumentError(f"block_size is {block_size}; give at least 1")
    if row_length < block_size or row_length % block_size:
        raise ArgumentError(f"row_length is {row_length}; give a multiple of the block size, {block_size}")
    if not 0 <= rank < world:
        raise ArgumentError(f"rank is {rank} of {world} ranks; give 0 to {world - 1}")
    if batch_size < 1 or batch_size % world:
        raise ArgumentError(
            f"a batch of {batch_size} rows cannot be shared by {world} ranks; give a multiple of {world}"
        )


def require_enough(sources: Sequence[Source], encoder: Encoder, batch_size: int, block_size: int) -> None:
    """Checks for a document of each source, `batch_size` documents and a block of tokens in all; reads no more.

    A stream is not opened: its first epoch shows whether there is enough.
    """
    documents = tokens = 0
    for source in sources:
        if isinstance(source.records, Stream):
            documents, tokens = batch_size, block_size
            continue
        found = False
        for record in one_epoch(source):
            try:
                tokens += len(encoder.encode(record).tokens) if tokens < block_size else 0
            except BadRecord as bad:
                source.reject(record.place, str(bad))
                continue
            found, documents = True, documents + 1
            if documents >= batch_size and tokens >= block_size:
                break
        if not found:
            raise too_few_documents([source], 0, batch_size)
    if documents < batch_size:
        raise too_few_documents(sources, documents, batch_size)
    names = ", ".join(source.name for source in sources)
    if tokens < block_size:
        raise ArgumentError(
            f"{names}: {tokens} tokens in all, less than a block of {block_size}; give more data or smaller blocks"
        )
