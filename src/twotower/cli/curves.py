"""`twotower curves`: a training run's curves as pictures."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(file_okay=False, path_type=Path), metavar="DIR", help="[default: RUN]")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of text.")
def curves(run: Path, output: Path | None, as_json: bool) -> None:
    """Draw a training run's curves.

    Writes training.png (loss, learning rate, gradient norm, speed) and, once something was validated, validation.png
    (held-out losses, agreement, tokens per pass, a sample's denoising). A run that still goes on can be drawn too.
    """
    from twotower.training.plots.curves import draw
    from twotower.training.plots.log_records import load, summary

    records = load(run)
    paths = draw(run, output)
    lines = summary(records)
    if as_json:
        click.echo(json.dumps({"pictures": [str(path) for path in paths], "summary": lines}, ensure_ascii=False))
        return
    for path in paths:
        click.echo(str(path))
    for line in lines:
        click.echo(line, err=True)
