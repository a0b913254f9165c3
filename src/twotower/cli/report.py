"""`twotower report`: the whole dial, as a picture and a table."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from twotower import model_loading
from twotower.cli import model_options as models
from twotower.cli.terminal import status_line

if TYPE_CHECKING:
    from twotower.evaluation.sweep import Point


@click.command()
@models.model_option
@click.option(
    "-o",
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("report"),
    show_default=True,
    metavar="DIR",
    help="Gets report.png, report.md and answers.jsonl.",
)
@click.option("-s", "--setting", "settings", multiple=True, metavar="MODE[:…]", help="Instead of the whole grid.")
@click.option("-n", "--problems", type=click.IntRange(1), default=200, show_default=True, help="Of each family.")
@click.option("--timed", type=click.IntRange(1), default=24, show_default=True, help="Problems that are timed.")
@click.option("--difficulty", "difficulties", type=int, multiple=True, default=(1, 2), show_default=True)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--rows", type=click.IntRange(1), default=64, show_default=True, help="Of a batch.")
@click.option("--quick", is_flag=True, help="Four settings instead of the whole grid.")
@models.dtype_option
@models.quantization_option
@models.threads_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of text.")
def report(
    model: str | None,
    output: Path,
    settings: tuple[str, ...],
    problems: int,
    timed: int,
    difficulties: tuple[int, ...],
    seed: int,
    rows: int,
    quick: bool,
    dtype: str,
    quantization: str,
    threads: int | None,
    as_json: bool,
) -> None:
    """Sweep modes, policies, policy values and block sizes: quality kept against speed.

    Answers the procedural suite with every setting, and times each beside AR. Draws quality against tokens per pass and
    against speed, and writes a table for a model card. Stopped and started again, it goes on where it was.
    """
    from twotower.decoding.presets import parse_setting
    from twotower.evaluation import sweep
    from twotower.evaluation.machine import machine_facts
    from twotower.plotting import drawing

    if quick and settings:
        raise click.UsageError("--quick and --setting both say which settings; leave one out")
    chosen = [parse_setting(text) for text in settings or (sweep.QUICK if quick else ())] or sweep.grid()
    with drawing():  # a missing library is told before an hour's work
        pass
    loaded, source = models.load_text_model(
        model, "it cannot read problems; put one there", dtype=dtype, quantization=quantization, threads=threads
    )
    facts = {"model": model_loading.name_of(source), "dtype": str(loaded.dtype)}
    if quantization != "none":
        facts["quantization"] = quantization
    output.mkdir(parents=True, exist_ok=True)
    with status_line() as update:
        points = sweep.sweep_settings(
            loaded,
            chosen,
            per_family=problems,
            timed=timed,
            difficulties=difficulties,
            seed=seed,
            rows=rows,
            answers_file=output / "answers.jsonl",
            facts=facts,
            progress=update,
        )
    where, levels = machine_facts(loaded), ", ".join(map(str, difficulties))
    asked = (
        f"{problems} problems of each family (levels {levels}, seed {seed}), greedy; {timed} of all timed one by one"
    )
    written = _write(output, points, model_loading.name_of(source), asked, where)
    if as_json:
        found = [asdict(point) for point in points]
        click.echo(json.dumps({"files": written, "model": str(source), "machine": where, "points": found}))
    else:
        click.echo("\n".join(written))


def _write(output: Path, points: list[Point], name: str, asked: str, where: dict[str, object]) -> list[str]:
    """The picture and the table; asked: which problems were answered, and how → the files."""
    from twotower.evaluation import report as pictures
    from twotower.evaluation.machine import machine_summary

    place = machine_summary(where)
    title = f"{name}: what each way of decoding keeps of AR's accuracy, and how fast it is"
    pictures.draw_report(points, output / "report.png", f"{title}\n{asked}; {place}")
    version = " ".join(str(where[name]) for name in ("twotower", "commit") if where[name])
    notes = [f"{asked}. {place}; torch {where['torch']}, twotower {version}."]
    (output / "report.md").write_text(pictures.report_markdown(points, notes), encoding="utf-8")
    return [str(output / name) for name in ("report.png", "report.md")]
