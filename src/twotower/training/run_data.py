"""Opens the data of a training run by its settings: sources, loader and held-out batches."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import partial

from twotower.training.data import Batch, Encoder, Offset, RowLoader, Source, held_out_batches
from twotower.training.fsdp import World
from twotower.training.run_settings import RunSettings


def open_sources(settings: RunSettings) -> tuple[list[Source], list[Source]]:
    """Training and validation sources."""
    share = 0.0 if settings.validation else settings.held_out
    open_source = partial(
        Source,
        text_field=settings.text_field,
        prompt_field=settings.prompt_field,
        messages_field=settings.messages_field,
        max_bad_records=settings.max_bad_records,
        streaming=settings.streaming,
    )
    training = [open_source(item, held_out_fraction=share) for item in settings.data]
    if settings.validation:
        return training, [open_source(item) for item in settings.validation]
    if not share:
        return training, []
    return training, [open_source(item, part="valid", held_out_fraction=share) for item in settings.data]


def open_loader(
    settings: RunSettings, sources: list[Source], encoder: Encoder, offset: Offset, world: World
) -> RowLoader:
    """This process's rows of each global batch."""
    return RowLoader(
        sources,
        encoder,
        batch_size=settings.batch_size,
        row_length=settings.row_length,
        block_size=settings.stages[0].block_size,
        seed=settings.seed,
        offset=offset,
        max_epochs=settings.epochs,
        rank=world.rank,
        world=world.size,
    )


def open_held_out(
    settings: RunSettings, sources: list[Source], encoder: Encoder, world: World
) -> dict[str, list[Batch]]:
    """This process's batches of each validation source, by the name of the source."""
    return {
        source.name: list(
            held_out_batches(
                [source],
                encoder,
                batch_size=settings.batch_size,
                row_length=settings.row_length,
                block_size=settings.stages[-1].block_size,
                documents=settings.validation_documents,
                rank=world.rank,
                world=world.size,
            )
        )
        for source in sources
    }


def report_skipped(sources: Sequence[Source], world: World) -> None:
    """Prints one line for each source of which a process has skipped records. Every process calls this function."""
    every = world.gather([(source.name, source.bad) for source in sources])
    found: dict[str, dict[str, str]] = {}
    for name, bad in (pair for part in every for pair in part):
        found.setdefault(name, {}).update(bad)
    if world.is_main:
        for line in skipped_lines(found):
            print(line, file=sys.stderr, flush=True)


def skipped_lines(found: Mapping[str, Mapping[str, str]]) -> Iterable[str]:
    """found: place → reason of the skipped records of each source. A line has the first record of each kind."""
    for name, bad in found.items():
        kinds: dict[str, list[str]] = {}
        for place, reason in bad.items():
            kinds.setdefault(re.sub(r" *\(.*|\d+", "", reason), []).append(f"{place}: {reason}")
        parts = (f"{len(places)} like {places[0]}" for places in kinds.values())
        if bad:
            yield f"{name}: skipped {len(bad)} record{'s' * (len(bad) > 1)}: " + "; ".join(parts)
