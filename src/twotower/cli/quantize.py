"""`twotower quantize`: writes a copy of a checkpoint with weights in 8 or 4 bits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from twotower import model_loading
from twotower.cli import model_options as models
from twotower.cli.terminal import byte_bar

if TYPE_CHECKING:
    from twotower.checkpoint.quantized_copy import QuantizedCopy


@click.command()
@click.argument("model", required=False)
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Directory of the new checkpoint.",
)
@click.option(
    "--scheme",
    metavar="PLAN",
    required=True,
    callback=models.check_plan,
    help="int8, int4, or pairs such as experts=int4,rest=int8 or denoiser=int4,context=int8. Heads have at least 8 "
    "bits.",
)
@click.option(
    "--dtype",
    type=click.Choice(model_loading.DTYPES),
    default="auto",
    show_default=True,
    help="Dtype of the tensors that are not quantized. auto: that of the checkpoint.",
)
@click.option(
    "--max-shard-size", metavar="SIZE", default="5GB", show_default=True, help="Largest size of one weights file."
)
@click.option("--overwrite", is_flag=True, help="Replace the checkpoint in DIR.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def quantize(
    model: str | None,
    output: Path,
    scheme: str,
    dtype: str,
    max_shard_size: str,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write a copy of a checkpoint with weights in 8 or 4 bits.

    MODEL is a two-tower checkpoint, a directory or a hub id; by default the bundled model. All verbs load the copy as
    it is. They need no --quantization, and nothing is quantized at their start. Tensors are read, quantized and written
    one at a time, so a model of any size needs little memory.
    """
    with models.status("reading …"):
        from twotower.checkpoint.quantized_copy import quantize_checkpoint
    source = model_loading.source_of(model)
    with byte_bar() as progress:
        made = quantize_checkpoint(
            source,
            output,
            scheme,
            dtype=dtype,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            progress=progress,
        )
    if as_json:
        from twotower.json_text import to_json

        click.echo(to_json(made.to_dict()))
        return
    for line in summary(made):
        click.echo(line)


def summary(made: QuantizedCopy) -> Iterator[str]:
    """Lines that describe the new checkpoint."""
    from twotower.byte_units import format_bytes

    files = f"{len(made.files)} files" if len(made.files) > 1 else made.files[0]
    share = made.bytes / made.source_bytes
    yield click.style(str(made.directory), bold=True)
    size, before = format_bytes(made.bytes), format_bytes(made.source_bytes)
    yield f"{made.quantization}: {size} in {files}, {share:.0%} of {before}"
