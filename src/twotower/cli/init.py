"""`twotower init`: a one-tower checkpoint in, the two-tower checkpoint that training starts from out."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from twotower.cli import model_options as models
from twotower.cli.info import DTYPES

if TYPE_CHECKING:
    from twotower.checkpoint.convert import ConversionResult


@click.command()
@click.option("--from", "source", required=True, metavar="MODEL", help="One-tower checkpoint: a directory or hub id.")
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), metavar="DIR", help="Where to write it."
)
@click.option(
    "--mask-token-id", metavar="ID", type=click.IntRange(min=0), help="[default: the tokenizer's mask token, else 3]"
)
@click.option("--dtype", type=click.Choice(DTYPES), help="[default: as stored]")
@click.option("--max-shard-size", metavar="SIZE", default="5GB", show_default=True, help="Of one weights file.")
@click.option(
    "--seed", metavar="N", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Of the time embedder."
)
@click.option("--overwrite", is_flag=True, help="Replace the checkpoint in DIR.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of text.")
def init(
    source: str,
    output: Path,
    mask_token_id: int | None,
    dtype: str | None,
    max_shard_size: str,
    seed: int,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Make a two-tower checkpoint from a one-tower one.

    The source is any model of the Nemotron-H family, dense or MoE. Both towers start as copies of it, and the time
    conditioning as the identity: the new denoiser computes what the backbone does until it is trained. Weights pass
    through one tensor at a time, so memory does not limit the model's size.
    """
    with models.status("reading …"):
        from twotower.checkpoint.convert import convert
    with _bar() as progress:
        made = convert(
            source,
            output,
            mask_token_id=mask_token_id,
            dtype=dtype,
            max_shard_size=max_shard_size,
            seed=seed,
            overwrite=overwrite,
            progress=progress,
        )
    for note in made.notes:
        click.echo(f"Note: {note}.", err=True)
    if as_json:
        click.echo(json.dumps(made.to_dict(), ensure_ascii=False))
        return
    for line in summary(made):
        click.echo(line)
    directory = shlex.quote(str(made.directory))
    click.secho(f"next: twotower train {directory} --data PATH -o RUN", err=True, dim=True)


def summary(made: ConversionResult) -> Iterator[str]:
    """What was made, to read."""
    from twotower.cli import info_page

    count, size = info_page.format_count, info_page.format_bytes
    files = f"{len(made.files)} files" if len(made.files) > 1 else made.files[0]
    yield click.style(str(made.directory), bold=True)
    yield (
        f"two towers of {count(made.parameters_per_tower)} parameters ({len(made.pattern)} layers: {made.pattern}), "
        f"time conditioning {count(made.time_parameters)}"
    )
    yield f"{size(made.bytes)} in {files}, {made.dtype}; mask token id {made.mask_token_id}"


@contextmanager
def _bar() -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar on a terminal's stderr, gone afterwards."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress("writing", *columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("writing", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
