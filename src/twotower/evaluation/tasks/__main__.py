"""`python -m twotower.evaluation.tasks`: writes problems as JSON lines."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import get_args

import click

from twotower.errors import TwoTowerError
from twotower.evaluation.tasks.families import FAMILIES
from twotower.evaluation.tasks.problem_sets import DEFAULT_DIFFICULTIES, Split, make_problems, write_jsonl


@click.command()
@click.option("--split", type=click.Choice(get_args(Split)), required=True, help="Training or test problems.")
@click.option("--count", type=int, default=1000, show_default=True, help="Number of problems.")
@click.option("--seed", type=int, default=1, show_default=True, help="Seed of the problems.")
@click.option(
    "--family",
    "families",
    type=click.Choice(list(FAMILIES)),
    multiple=True,
    help="Family of problems. Can be repeated.  [default: all but json]",
)
@click.option(
    "--difficulty",
    "difficulties",
    type=int,
    multiple=True,
    default=DEFAULT_DIFFICULTIES,
    show_default=True,
    help="Difficulty, 1 to 5. Can be repeated.",
)
@click.option(
    "-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Write to this file instead of stdout."
)
def suite(
    split: Split, count: int, seed: int, families: tuple[str, ...], difficulties: tuple[int, ...], output: Path | None
) -> None:
    """Write problems as JSON lines with the fields prompt, text (the answer), family and difficulty."""
    problems = make_problems(split, count, seed, families or None, difficulties)
    if output:
        write_jsonl(output, problems)
        click.echo(f"{count} problems written to {output}", err=True)
    else:
        for problem in problems:
            click.echo(problem.line())


def run_suite(args: list[str] | None = None) -> int:
    """Runs one command line and returns the exit code: 0, or 2 after a one-line error message."""
    try:
        code = suite.main(args=args, prog_name="python -m twotower.evaluation.tasks", standalone_mode=False)
    except click.ClickException as error:
        message = error.format_message()
    except click.Abort:
        return 130
    except (TwoTowerError, OSError) as error:
        message = str(error)
    else:
        return code if isinstance(code, int) else 0
    click.echo("Error: " + " ".join(message.split()), err=True)
    return 2


if __name__ == "__main__":
    sys.exit(run_suite())
