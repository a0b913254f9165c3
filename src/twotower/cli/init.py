"""`twotower init`: converts a one-tower checkpoint to a checkpoint with a denoiser, from which training starts."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from twotower.cli import model_options as models
from twotower.cli.info import DTYPES
from twotower.cli.terminal import byte_bar

if TYPE_CHECKING:
    from twotower.checkpoint.convert import ConversionResult


@click.command()
@click.option(
    "--from", "source", required=True, metavar="MODEL", help="One-tower checkpoint: a directory, hub id or GGUF file."
)
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Directory of the new checkpoint.",
)
@click.option(
    "--mask-token",
    "--mask-token-id",
    metavar="TOKEN",
    help="Mask token: its id, or its text in the tokenizer. [default: the tokenizer's mask token, else a reserved "
    "token, a row of the embedding beyond the tokenizer, or an unused special token; for Nemotron-H id 3]",
)
@click.option(
    "--denoiser-lora",
    metavar="R",
    type=click.IntRange(1),
    help="Rank of adapters on the context tower, which are the denoiser. [default: the denoiser is a second tower]",
)
@click.option(
    "--adapters",
    metavar="PATH",
    help="Adapters of this model that twotower export --to peft wrote, a directory or hub id: they are the denoiser.",
)
@click.option("--dtype", type=click.Choice(DTYPES), help="Dtype of the new checkpoint. [default: as stored]")
@click.option(
    "--max-shard-size", metavar="SIZE", default="5GB", show_default=True, help="Largest size of one weights file."
)
@click.option(
    "--seed",
    metavar="N",
    type=click.IntRange(0, 2**63 - 1),
    default=0,
    show_default=True,
    help="Seed of the random weights: of the time embedder, or of new adapters.",
)
@click.option("--overwrite", is_flag=True, help="Replace the checkpoint in DIR.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def init(
    source: str,
    output: Path,
    mask_token: str | None,
    denoiser_lora: int | None,
    adapters: str | None,
    dtype: str | None,
    max_shard_size: str,
    seed: int,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Make a two-tower checkpoint from a one-tower checkpoint.

    The source is a checkpoint of a supported family: Nemotron-H, Llama, Qwen and others. Both towers
    start as copies of the source. The time conditioning starts as the identity, so the untrained denoiser
    computes what the source computes. With --denoiser-lora there is no second tower: the denoiser is the source itself
    with low-rank adapters, which start without an effect. Tensors are copied one at a time, so a model of any size
    needs little memory.

    A mask stands for a token that is not known yet. The mask token must be one that no text contains. The command
    prints its choice and the reason, and config.json keeps it.
    """
    with models.status("reading …"):
        from twotower.checkpoint.convert import convert
    with byte_bar() as progress:
        made = convert(
            source,
            output,
            mask_token=mask_token,
            denoiser_lora=denoiser_lora,
            adapters=adapters,
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
    use = f"train {directory} --data PATH -o RUN" if adapters is None else f"serve --model {directory}"
    click.secho(f"next: twotower {use}", err=True, dim=True)


def summary(made: ConversionResult) -> Iterator[str]:
    """Lines that describe the new checkpoint."""
    from twotower.byte_units import format_bytes
    from twotower.cli import info_page

    count, size = info_page.format_count, format_bytes
    files = f"{len(made.files)} files" if len(made.files) > 1 else made.files[0]
    yield click.style(str(made.directory), bold=True)
    layers = f"({len(made.pattern)} layers: {info_page.format_pattern(made.pattern)})"
    if made.adapter_rank is None:
        towers = f"two towers of {count(made.parameters_per_tower)} parameters {layers}"
        yield f"{towers}, time conditioning {count(made.time_parameters)}"
    else:
        tower = f"one tower of {count(made.parameters_per_tower)} parameters {layers}"
        yield f"{tower}, adapters of rank {made.adapter_rank} with {count(made.adapter_parameters)}"
    yield f"{size(made.bytes)} in {files}, {made.dtype}"
    text = "" if made.mask_token is None else f" {made.mask_token!r}"
    yield f"mask token id {made.mask_token_id}{text}: {made.mask_reason}"
