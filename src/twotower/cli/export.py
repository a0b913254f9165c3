"""`twotower export` and `twotower join`: a part of a two-tower checkpoint, or several checkpoints in one."""

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
    from twotower.checkpoint.join import JoinResult

TARGETS = ("one-tower", "peft", "denoiser")


@click.command()
@click.argument("model")
@click.option(
    "--to",
    "target",
    required=True,
    type=click.Choice(TARGETS),
    help="one-tower: the autoregressive model that is the context tower, for transformers. peft: the adapters alone, "
    "for twotower init --adapters and for peft. denoiser: the two-tower checkpoint with one of several denoisers.",
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
@click.option("--denoiser", metavar="NAME", help="With denoiser: the name of the denoiser to write.")
@click.option(
    "--max-shard-size", metavar="SIZE", default="5GB", show_default=True, help="Largest size of one weights file."
)
@click.option("--overwrite", is_flag=True, help="Replace the files in DIR.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def export(
    model: str,
    target: str,
    output: Path,
    base: str | None,
    denoiser: str | None,
    max_shard_size: str,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write a two-tower checkpoint in the form of other programs.

    MODEL is a two-tower checkpoint: a directory or a hub id. The target one-tower is the context tower alone, as the
    autoregressive checkpoint that it came from: the tensors under their original names and bit for bit, the original
    config.json, tokenizer, chat template and generation config. Tensors are copied one at a time, so a model of any
    size needs little memory.

    The target peft is for models whose denoiser is adapters. It writes them in PEFT's format, with the embedding of the
    mask token beside: a few MB that turn the autoregressive model into the two-tower model.

    The target denoiser is for models that twotower join made: it writes the checkpoint with one denoiser alone.
    """
    if (target == "denoiser") != (denoiser is not None):
        raise ArgumentError(
            "--denoiser NAME and --to denoiser belong together; give both, or leave --denoiser out for another target"
        )
    if target != "peft" and base is not None:
        raise ArgumentError("--base is for --to peft; leave it out")
    with models.status("reading …"):
        from twotower.checkpoint.export import ExportResult, export_one_tower, export_peft
        from twotower.checkpoint.join import export_denoiser
    made: ExportResult | JoinResult
    with byte_bar() as progress:
        if denoiser is not None:
            made = export_denoiser(
                model, output, denoiser, max_shard_size=max_shard_size, overwrite=overwrite, progress=progress
            )
        elif target == "peft":
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
    for line in summary(made) if isinstance(made, ExportResult) else join_summary(made):
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


@click.command()
@click.argument("denoisers", nargs=-1, required=True, metavar="NAME=MODEL NAME=MODEL…")
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Directory of the new checkpoint.",
)
@click.option(
    "--for",
    "modes",
    multiple=True,
    metavar="MODE=NAME",
    help="Denoiser of a mode: diffusion, verified, mock_ar or auto. Can be repeated.  [default: the first; for auto "
    "that of verified]",
)
@click.option(
    "--max-shard-size", metavar="SIZE", default="5GB", show_default=True, help="Largest size of one weights file."
)
@click.option("--overwrite", is_flag=True, help="Replace the checkpoint in DIR.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def join(
    denoisers: tuple[str, ...],
    output: Path,
    modes: tuple[str, ...],
    max_shard_size: str,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Join checkpoints with the same context tower to one with several denoisers.

    Each argument is a name for a denoiser, and its two-tower checkpoint: a directory or a hub id. The context towers
    must be equal bit for bit, and are stored once. A request names its denoiser, or gets the one of its mode. Tensors
    are copied one at a time, so a model of any size needs little memory. twotower export --to denoiser writes one
    denoiser alone again, with the tensors of its source bit for bit.
    """
    sources, of_mode = pairs(denoisers, "NAME=MODEL"), pairs(modes, "--for MODE=NAME")
    with models.status("reading …"):
        from twotower.checkpoint.join import join as join_checkpoints
    with byte_bar() as progress:
        made = join_checkpoints(
            sources, output, modes=of_mode, max_shard_size=max_shard_size, overwrite=overwrite, progress=progress
        )
    for note in made.notes:
        click.echo(f"Note: {note}.", err=True)
    if as_json:
        click.echo(json.dumps(made.to_dict(), ensure_ascii=False))
        return
    for line in join_summary(made):
        click.echo(line)


def pairs(given: tuple[str, ...], form: str) -> dict[str, str]:
    """Arguments such as NAME=VALUE, by name.

    Raises:
        ArgumentError: an argument of another form, or a name that is given twice.
    """
    found: dict[str, str] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name or not value:
            raise ArgumentError(f"{text!r} is not of the form {form}")
        if name in found:
            raise ArgumentError(f"{name} is given twice ({form}); give it once")
        found[name] = value
    return found


def join_summary(made: JoinResult) -> Iterator[str]:
    """Lines that describe the new checkpoint."""
    from twotower.byte_units import format_bytes
    from twotower.cli.info_page import format_count

    files = f"{len(made.files)} files" if len(made.files) > 1 else made.files[0]
    yield click.style(str(made.directory), bold=True)
    yield f"context tower: {format_count(made.context_parameters)} parameters"
    for name, parameters in made.denoisers.items():
        modes = [mode for mode, own in made.for_mode.items() if own == name]
        use = f", for mode {', '.join(modes)}" if modes else ""
        yield f"denoiser {name}: {format_count(parameters)} parameters{use}"
    yield f"{format_bytes(made.bytes)} in {files}"
