"""`twotower report`: the quality/speed trade-off as a picture and a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from twotower import model_loading
from twotower.cli import model_options as models
from twotower.cli.terminal import status_line

if TYPE_CHECKING:
    from twotower.evaluation.sweep import Point
    from twotower.modeling_twotower import TwoTowerForCausalLM

LOCK_FILE = ".lock"
POINTS_FILE = "points.json"


@click.command()
@models.model_option
@click.option(
    "-o",
    "--output",
    type=models.OUTPUT_FOLDER,
    default=Path("report"),
    show_default=True,
    metavar="DIR",
    help="Folder for report.png, report.md, points.json and answers.jsonl.",
)
@click.option(
    "-s",
    "--setting",
    "settings",
    multiple=True,
    metavar="MODE[:…]",
    help="Measure this setting instead of all. Can be repeated.",
)
@click.option(
    "-n",
    "--problems",
    metavar="N",
    type=click.IntRange(1),
    default=200,
    show_default=True,
    help="Problems of each family.",
)
@click.option(
    "--timed",
    metavar="N",
    type=click.IntRange(1),
    default=24,
    show_default=True,
    help="Problems to time, one at a time.",
)
@models.family_option
@models.difficulty_option
@models.problem_seed_option
@click.option("--rows", metavar="N", type=click.IntRange(1), default=64, show_default=True, help="Rows of a batch.")
@click.option("--quick", is_flag=True, help="Measure four settings instead of all.")
@click.option(
    "--beside",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="DIR",
    help="Folder of an earlier report, whose Pareto front and settings are shown too.",
)
@models.dtype_option
@models.quantization_option
@models.threads_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def report(
    model: str | None,
    output: Path,
    settings: tuple[str, ...],
    problems: int,
    timed: int,
    families: tuple[str, ...],
    difficulties: tuple[int, ...],
    seed: int,
    rows: int,
    quick: bool,
    beside: Path | None,
    dtype: str,
    quantization: str | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Measure and draw the quality/speed trade-off.

    The settings cover all modes, commit policies and block sizes. Each setting answers the procedural suite and is
    timed in turn with AR. The command writes a picture (quality against tokens per pass, and against speed) and tables
    for a model card. After an interruption, the same command continues. Only one process at a time writes to DIR.
    """
    from twotower.decoding.presets import parse_setting
    from twotower.engine.towers import block_rule, model_of_mode
    from twotower.evaluation import sweep
    from twotower.evaluation.machine import machine_facts
    from twotower.file_lock import exclusive_lock
    from twotower.json_text import to_json
    from twotower.plotting import drawing

    if quick and settings:
        raise click.UsageError("--quick and --setting are both given; leave one out")
    chosen = [parse_setting(text) for text in settings or (sweep.QUICK if quick else ())]
    earlier = None if beside is None else sweep.read_points(beside / POINTS_FILE)
    with drawing():  # reports a missing matplotlib before the long measurement
        pass
    loaded, source = models.load_text_model(
        model, "problems cannot be encoded; add a tokenizer", dtype=dtype, quantization=quantization, threads=threads
    )
    output.mkdir(parents=True, exist_ok=True)
    machine = machine_facts(loaded)
    with exclusive_lock(output / LOCK_FILE, output):
        with status_line() as update:
            points = sweep.sweep_settings(
                loaded,
                chosen or sweep.grid(block_rule(model_of_mode(loaded, "diffusion"))),
                per_family=problems,
                timed=timed,
                families=families,
                difficulties=difficulties,
                seed=seed,
                rows=rows,
                answers_file=output / "answers.jsonl",
                facts=_facts(source, loaded),
                progress=update,
            )
        asked = _description(problems, families, difficulties, seed, timed)
        written = _write(output, points, model_loading.name_of(source), asked, machine, earlier)
    if as_json:
        found = [asdict(point) for point in points]
        click.echo(to_json({"files": written, "model": str(source), "machine": machine, "points": found}))
    else:
        click.echo("\n".join(written))


def _facts(source: str | Path, model: TwoTowerForCausalLM) -> dict[str, object]:
    """What must be equal for a report to continue, besides the problems."""
    facts: dict[str, object] = {"model": model_loading.name_of(source), "dtype": str(model.dtype)}
    return facts | ({"quantization": model.quantization} if model.quantization != "none" else {})


def _description(problems: int, families: Sequence[str], difficulties: Sequence[int], seed: int, timed: int) -> str:
    """Which problems were answered, and how."""
    chosen = ", ".join((*families, f"difficulty {', '.join(map(str, difficulties))}"))
    return f"{problems} problems of each family ({chosen}, seed {seed}), greedy; {timed} timed one at a time"


def _write(
    output: Path,
    points: list[Point],
    name: str,
    description: str,
    machine: dict[str, object],
    beside: tuple[str, list[Point]] | None,
) -> list[str]:
    """Writes the picture and the tables, and returns the files. description: which problems were answered, and how."""
    from twotower.evaluation import report as pictures
    from twotower.evaluation.machine import machine_summary
    from twotower.evaluation.sweep import write_points

    write_points(output / POINTS_FILE, name, points)
    place = machine_summary(machine)
    title = f"{name}: accuracy kept and speed of decoding settings, compared with AR"
    pictures.draw_report(points, output / "report.png", f"{title}\n{description}; {place}", beside)
    version = " ".join(str(machine[name]) for name in ("twotower", "commit") if machine[name])
    notes = [f"{description}. {place}; torch {machine['torch']}, twotower {version}."]
    (output / "report.md").write_text(pictures.report_markdown(points, notes, name, beside), encoding="utf-8")
    return [str(output / name) for name in ("report.png", "report.md", POINTS_FILE)]
