"""`twotower curves`: draws the curves of a training run."""

from __future__ import annotations

from pathlib import Path

import click

from twotower.cli.model_options import OUTPUT_FOLDER


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=OUTPUT_FOLDER,
    metavar="DIR",
    help="Folder for the pictures. [default: RUN]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def curves(run: Path, output: Path | None, as_json: bool) -> None:
    """Draw the curves of a training run.

    Writes training.png (loss, learning rate, gradient norm, speed) and, after the first validation, validation.png
    (held-out losses, agreement, tokens per pass, a sample with its denoising passes). The run need not be finished.
    """
    from twotower.training.plots.curves import draw
    from twotower.training.plots.log_records import load, summary

    records = load(run)
    paths = draw(run, output)
    lines = summary(records)
    if as_json:
        from twotower.json_text import to_json

        click.echo(to_json({"pictures": [str(path) for path in paths], "summary": lines}, ensure_ascii=False))
        return
    for path in paths:
        click.echo(str(path))
    for line in lines:
        click.echo(line, err=True)
