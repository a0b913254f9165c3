"""`twotower export`: writes a two-tower checkpoint in the form of other programs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from twotower.cli import model_options as models
from twotower.cli.terminal import byte_bar
from twotower.errors import ArgumentError

if TYPE_CHECKING:
    from twotower.checkpoint.export import ExportResult

TARGETS = ("one-tower", "peft")


@click.command()
@click.argument("model")
@click.option(
    "--to",
    "target",
    required=True,
    type=click.Choice(TARGETS),
    help="one-tower: the autoregressive model that is the context tower, for transformers. peft: the adapters alone, "
    "for twotower init --adapters and for peft.",
)
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Directory of the new files.",
)
@click.option(
    "--base", metavar="NAME", help="With peft: the hub id or path of the autoregressive model, for its config."
)
@click.option(
    "--max-shard-size", metavar="SIZE", default="5GB", show_default=True, help="Largest size of one weights file."
)
@click.option("--overwrite", is_flag=True, help="Replace the files in DIR.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def export(
    model: str, target: str, output: Path, base: str | None, max_shard_size: str, overwrite: bool, as_json: bool
) -> None:
    """Write a two-tower checkpoint in the form of other programs.

    MODEL is a two-tower checkpoint: a directory or a hub id. The target one-tower is the context tower alone, as the
    autoregressive checkpoint that it came from: the tensors under their original names and bit for bit, the original
    config.json, tokenizer, chat template and generation config. Tensors are copied one at a time, so a model of any
    size needs little memory.

    The target peft is for models whose denoiser is adapters. It writes them in PEFT's format, with the embedding of the
    mask token beside: a few MB that turn the autoregressive model into the two-tower model.
    """
    if target != "peft" and base is not None:
        raise ArgumentError("--base is for --to peft; leave it out")
    with models.status("reading …"):
        from twotower.checkpoint.export import export_one_tower, export_peft
    with byte_bar() as progress:
        if target == "peft":
            made = export_peft(model, output, base=base, overwrite=overwrite, progress=progress)
        else:
            made = export_one_tower(
                model, output, max_shard_size=max_shard_size, overwrite=overwrite, progress=progress
            )
    for note in made.notes:
        click.echo(f"Note: {note}.", err=True)
    if as_json:
        click.echo(json.dumps(made.to_dict(), ensure_ascii=False))
        return
    for line in summary(made):
        click.echo(line)


def summary(made: ExportResult) -> Iterator[str]:
    """Lines that describe the new checkpoint."""
    from twotower.byte_units import format_bytes
    from twotower.cli import info_page

    files = f"{len(made.files)} files" if len(made.files) > 1 else made.files[0]
    yield click.style(str(made.directory), bold=True)
    adapters = "" if made.rank is None else f"adapters of rank {made.rank} on "
    yield (
        f"{adapters}{made.architecture}: {info_page.format_count(made.parameters)} parameters, "
        f"{format_bytes(made.bytes)} in {files}"
    )
