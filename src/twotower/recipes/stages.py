"""Stages of a recipe: commands of `twotower` and functions, each with a result that shows that it is finished."""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from twotower.checkpoint.atomic import replace_folder
from twotower.file_writes import replace_text
from twotower.process import configure_process

if TYPE_CHECKING:
    from twotower.training.log_schema import StepRecord

LOGGED = 100  # steps for one line of training.jsonl


@dataclass(frozen=True)
class RecipeStage:
    """One stage.

    result: the file or folder that exists when the stage is finished. work: words of a `twotower` command, or a
    function. parallel: whether several processes may share the command.
    """

    name: str
    result: Path
    work: Sequence[str] | Callable[[], object]
    parallel: bool = False


def run_stages(stages: Sequence[RecipeStage], chosen: Sequence[str], processes: int) -> None:
    """Runs the chosen stages; none chosen: all that are not finished. A command that fails ends the program."""
    for stage in stages:
        if stage.name not in chosen if chosen else stage.result.exists():
            continue
        print(f"— {stage.name}", file=sys.stderr, flush=True)
        if callable(stage.work):
            stage.work()
            continue
        print("twotower " + " ".join(stage.work), file=sys.stderr, flush=True)
        launch = [sys.executable]
        if processes > 1 and stage.parallel:
            launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        if code := subprocess.run([*launch, "-m", "twotower", *stage.work]).returncode:
            sys.exit(code)


def recipe_command(
    purpose: str,
    names: Sequence[str],
    default_steps: dict[str, int],
    stages: Callable[[Path, Path, dict[str, int], int], Sequence[RecipeStage]],
) -> click.Command:
    """The program of a recipe: DATA, OUT, the stages to run, and the steps of each training stage.

    stages: called with DATA, OUT, the steps and the number of processes.
    """

    @click.command(help=purpose)
    @click.argument("data", type=click.Path(exists=True, file_okay=False, path_type=Path))
    @click.argument("out", type=click.Path(file_okay=False, path_type=Path))
    @click.option(
        "--stage",
        "chosen",
        type=click.Choice(names),
        multiple=True,
        help="Stage to run. [default: all that are not finished]",
    )
    @click.option(
        "--processes",
        type=int,
        default=1,
        show_default=True,
        help="Processes: 1, 2 or 3, which divide the batch size 6.",
    )
    def main(data: Path, out: Path, chosen: tuple[str, ...], processes: int, **given: int) -> None:
        configure_process()
        out.mkdir(parents=True, exist_ok=True)
        steps = {name: given[f"{name}_steps"] for name in default_steps}
        run_stages(stages(data, out, steps, processes), chosen, processes)

    for name, steps in default_steps.items():
        main = click.option(f"--{name}-steps", type=int, default=steps, show_default=True)(main)
    return main


def data_options(shares: dict[Path, float]) -> list[str]:
    """The options for a mixture of data files with these shares of the documents."""
    return [word for path, share in shares.items() for word in ("--data", f"{path}={share:g}")]


def export_model(source: Path, target: Path, runs: dict[str, Path]) -> None:
    """Writes a model in bf16, without its card, and the losses of its training runs: name → run directory."""
    import torch

    from twotower.modeling_twotower import TwoTowerForCausalLM

    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    TwoTowerForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(partial)
    with (partial / "training.jsonl").open("w", encoding="utf-8") as lines:
        for name, run in runs.items():
            records = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
            lines.writelines(json.dumps(record) + "\n" for record in thinned(name, records))
    replace_folder(partial, target)


def measure(data: Path, model: Path, settings: Sequence[str], *options: str) -> None:
    """Writes metrics.json, the figures of the model card: `evaluation.held_out` with these settings and options."""
    command = [sys.executable, "-m", "twotower.evaluation.held_out", str(data), "--model", str(model), *options]
    command += [word for setting in settings for word in ("-s", setting)]
    text = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    replace_text(model / "metrics.json", text)


def thinned(stage: str, records: Sequence[StepRecord]) -> Iterator[dict[str, object]]:
    """One record for LOGGED steps: the mean loss since the last record, and the validation, if there was one."""
    for start in range(0, len(records), LOGGED):
        part = records[start : start + LOGGED]
        numbers = {
            name: round(value, 5) for name, value in part[-1].get("validation", {}).items() if isinstance(value, float)
        }
        yield {
            "stage": stage,
            "step": part[-1]["step"],
            "loss": round(statistics.mean(record["loss"] for record in part), 5),
            "lr": part[-1]["lr"],
            "tokens": sum(record["tokens"] for record in part),
            "targets": sum(record["targets"] for record in part),
        } | ({"validation": numbers} if numbers else {})
