"""`twotower eval`: accuracy of decoding settings on the procedural suite or published tasks, compared with AR."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from twotower import model_loading, options
from twotower.cli import model_options as models
from twotower.cli import published_tasks
from twotower.cli.terminal import console_on, status_line

if TYPE_CHECKING:
    from rich.table import Table

    from twotower.decoding.presets import Setting
    from twotower.evaluation.accuracy import SettingAccuracy
    from twotower.evaluation.tasks.problem_sets import Problem
    from twotower.modeling_twotower import TwoTowerForCausalLM

SUITE_OPTIONS = {"problems", "families", "difficulties", "seed", "max_new_tokens"}
TASK_OPTIONS = {"limit", "run_code", "likelihood"}
DEFAULT_ROWS = {"suite": 64, "tasks": 16}  # fewer for tasks, because few-shot prompts are long


@click.command("eval")
@models.model_option
@models.setting_option
@click.option(
    "-n",
    "--problems",
    metavar="N",
    type=click.IntRange(1),
    default=100,
    show_default=True,
    help="Problems of each family.",
)
@models.family_option
@models.difficulty_option
@models.problem_seed_option
@click.option(
    "--max-new-tokens",
    metavar="N",
    type=click.IntRange(1),
    default=160,
    show_default=True,
    help="Maximum number of new tokens of an answer.",
)
@click.option(
    "-t",
    "--task",
    "tasks",
    multiple=True,
    metavar="NAME",
    help="Published task to measure instead of the suite, or all. Can be repeated.",
)
@click.option(
    "--data",
    default=lambda: options.current().data_dir,
    type=click.Path(path_type=Path),
    help="Folder with the files of the tasks.  [default: TWOTOWER_DATA, else the hub]",
)
@click.option(
    "--limit",
    metavar="N",
    type=click.IntRange(1),
    help="Maximum number of items of a task, or of each of its languages or subjects.",
)
@click.option("--run-code", is_flag=True, help="Let tasks run programs that the model writes, in a sandbox.")
@click.option(
    "--likelihood",
    type=click.Choice(("context", "bound")),
    default="context",
    show_default=True,
    help="Likelihood that chooses among given answers: of the context tower, or also the denoiser's lower bound.",
)
@click.option("--rows", metavar="N", type=click.IntRange(1), help="Rows of a batch.  [default: 64; with --task 16]")
@models.dtype_option
@models.quantization_option
@models.threads_option
@click.option("--json", "as_json", is_flag=True, help="Print no table.")
@click.pass_context
def evaluate(
    context: click.Context,
    model: str | None,
    settings: tuple[str, ...],
    problems: int,
    families: tuple[str, ...],
    difficulties: tuple[int, ...],
    seed: int,
    max_new_tokens: int,
    tasks: tuple[str, ...],
    data: Path | None,
    limit: int | None,
    run_code: bool,
    likelihood: str,
    rows: int | None,
    dtype: str,
    quantization: str | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Measure the accuracy of settings, compared with AR.

    The problems have one right answer. They come from the test split of the procedural suite, or with --task from
    published tasks, with the prompts and metrics of lm-evaluation-harness. The difference from AR on the same problems
    has a 95 % interval. Passes of both towers count. Tables go to stderr, one JSON line to stdout.
    """
    from twotower.decoding.presets import parse_setting
    from twotower.evaluation.accuracy import chosen_problems

    _reject_options(context, with_task=bool(tasks))
    if tasks:
        published_tasks.check_tasks(tasks, data, run_code)
    parsed = [parse_setting(text) for text in settings]
    chosen = [] if tasks else chosen_problems(families, problems, difficulties, seed)
    loaded, source = models.load_text_model(
        model, "problems cannot be encoded; add a tokenizer", dtype=dtype, quantization=quantization, threads=threads
    )
    facts: dict[str, object] = {"model": str(source), **model_loading.placement(loaded)}
    if tasks:
        scores = published_tasks.measure_tasks(
            loaded,
            parsed,
            tasks,
            data=data,
            limit=limit,
            run_code=run_code,
            likelihood=likelihood,
            rows=rows or DEFAULT_ROWS["tasks"],
        )
        found = {"tasks": [score.to_dict() for score in scores]}
        shown: tuple[Table, ...] = (published_tasks.task_table(scores),)
    else:
        lines = _measure_suite(loaded, parsed, chosen, max_new_tokens, rows or DEFAULT_ROWS["suite"])
        facts |= {"problems": len(chosen), "seed": seed, "difficulties": list(difficulties)}
        found = {"settings": [line.to_dict() for line in lines]}
        shown = tables(lines)
    if not as_json:
        console = console_on("stderr")
        for table in shown:
            console.print(table)
    from twotower.json_text import to_json

    click.echo(to_json(facts | found))


def _measure_suite(
    model: TwoTowerForCausalLM, settings: list[Setting], problems: list[Problem], max_new_tokens: int, rows: int
) -> list[SettingAccuracy]:
    from twotower.evaluation.accuracy import measure_accuracy

    with status_line() as update:
        return measure_accuracy(
            model,
            settings,
            problems,
            max_new_tokens=max_new_tokens,
            rows=rows,
            progress=lambda label, done: update(f"{label}: {done} of {len(problems)} problems"),
        )


def _reject_options(context: click.Context, with_task: bool) -> None:
    """Raises UsageError for a given option without effect."""
    names = SUITE_OPTIONS if with_task else TASK_OPTIONS
    problem = "does not go with --task; leave it out" if with_task else "needs --task; add it, or leave the option out"
    for parameter in context.command.params:
        given = context.get_parameter_source(parameter.name or "") is ParameterSource.COMMANDLINE
        if parameter.name in names and given:
            raise click.UsageError(f"{parameter.opts[-1]} {problem}")


def tables(lines: list[SettingAccuracy]) -> tuple[Table, ...]:
    """Two tables with one row for each setting: quality and passes, and accuracy by family."""
    from rich import box
    from rich.table import Table

    *families, overall = lines[0].accuracy
    costs, by_family = (Table(box=box.SIMPLE_HEAD, header_style="dim") for _ in range(2))
    heads = ("right", "− AR", "95 %", "tokens/pass", "NLL", "repeats")
    for out, names in ((costs, heads), (by_family, families)):
        out.add_column("setting", overflow="fold")
        for name in names:
            out.add_column(name, justify="right", no_wrap=True)
    for line in lines:
        pair, ar = line.against_ar[overall], line.setting == "ar"
        low, high = pair.interval
        label = line.setting.replace(",", ",\n  ")
        costs.add_row(
            label,
            f"{line.accuracy[overall]:.1%}",
            "" if ar else f"{100 * pair.difference:+.1f}",
            "" if ar else f"{100 * low:+.1f}…{100 * high:+.1f}",
            f"{line.tokens_per_pass[overall]:.2f}",
            f"{line.nll:.3f}",
            f"{line.repeated_4grams:.1%}",
        )
        by_family.add_row(label, *(f"{line.accuracy[family]:.1%}" for family in families))
    return costs, by_family
