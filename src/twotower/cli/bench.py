"""`twotower bench`: speed of decoding settings, compared with AR in the same run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from twotower import model_loading
from twotower.cli import model_options as models
from twotower.cli.terminal import console_on, status_line

if TYPE_CHECKING:
    from rich.table import Table

    from twotower.evaluation.speed import SpeedResult
    from twotower.evaluation.timed_towers import TowerName


@click.command()
@models.model_option
@models.setting_option
@click.option(
    "-b",
    "--rows",
    "batch_sizes",
    metavar="N",
    type=click.IntRange(1),
    multiple=True,
    default=(1,),
    show_default=True,
    help="Rows of a batch. Can be repeated.",
)
@click.option(
    "-c",
    "--context",
    "contexts",
    metavar="N",
    type=click.IntRange(2),
    multiple=True,
    default=(128,),
    show_default=True,
    help="Tokens of each prompt of the suite. Can be repeated.",
)
@click.option(
    "--prompts",
    "files",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    multiple=True,
    help='JSONL file with a "prompt", or the "messages" of a conversation, on each line: its prompts instead of the '
    "suite's. Can be repeated.",
)
@click.option(
    "-n",
    "--max-new-tokens",
    metavar="N",
    type=click.IntRange(1),
    default=128,
    show_default=True,
    help="Maximum number of new tokens of a row.",
)
@click.option(
    "--batches", metavar="N", type=click.IntRange(1), default=4, show_default=True, help="Batches of a round."
)
@click.option(
    "--rounds",
    metavar="N",
    type=click.IntRange(1),
    default=5,
    show_default=True,
    help="Measured rounds; one round more warms up.",
)
@click.option("--ignore-eos", is_flag=True, help="Continue every row to --max-new-tokens.")
@models.dtype_option
@models.quantization_option
@models.threads_option
@click.option("--json", "as_json", is_flag=True, help="Print no table.")
def bench(
    model: str | None,
    settings: tuple[str, ...],
    batch_sizes: tuple[int, ...],
    contexts: tuple[int, ...],
    files: tuple[Path, ...],
    max_new_tokens: int,
    batches: int,
    rounds: int,
    ignore_eos: bool,
    dtype: str,
    quantization: str | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Measure the speed of settings, compared with AR.

    The figures are tokens per second, passes, and the cost of a pass. All settings run in turn in every round. Only
    new tokens up to the end of a row count. Tables go to stderr, one JSON line to stdout. "equal" is the share of the
    texts that equal AR's, token for token.
    """
    from twotower.decoding.presets import parse_setting
    from twotower.evaluation import speed as measuring
    from twotower.evaluation.machine import machine_facts, machine_summary
    from twotower.evaluation.workloads import few_shot_workloads, file_workloads

    if files and models.is_given("contexts"):
        raise click.UsageError(
            "--context is the length of the suite's prompts, and --prompts gives others; leave one out"
        )
    parsed = [parse_setting(text) for text in settings]
    loaded, source = models.load_text_model(
        model, "there are no prompts; add a tokenizer", dtype=dtype, quantization=quantization, threads=threads
    )
    if files:
        workloads = list(file_workloads(loaded, files, batch_sizes, batches, max_new_tokens))
    else:
        workloads = list(few_shot_workloads(loaded, batch_sizes, contexts, batches))
    with status_line() as update:
        found = measuring.measure_speed(
            loaded,
            parsed,
            workloads,
            new_tokens=max_new_tokens,
            rounds=rounds,
            ignore_eos=ignore_eos,
            progress=update,
        )
    machine = machine_facts(loaded)
    if not as_json:
        console = console_on("stderr")
        console.print(f"{model_loading.name_of(source)}, {machine_summary(machine)}")
        for table in tables(found):
            console.print(table)
    from twotower.json_text import to_json

    click.echo(to_json({"model": str(source), "machine": machine, "measured": [one.to_dict() for one in found]}))


def tables(found: list[SpeedResult]) -> Iterator[Table]:
    """A table for each workload, with one row for each setting."""
    from rich import box
    from rich.table import Table

    for title in dict.fromkeys(one.title for one in found):
        out = Table(box=box.SIMPLE_HEAD, header_style="dim", title=title, title_justify="left", title_style="bold")
        out.add_column("setting", overflow="fold")
        for name in ("tokens/s", "× AR", "tokens/\npass", "equal", "first\nanswer", "denoiser\npass", "context\npass"):
            out.add_column(name, justify="right", no_wrap=True)
        for one in found:
            if one.title == title:
                low, high = one.times_ar_spread
                out.add_row(
                    one.setting.replace(",", ",\n  "),
                    f"{one.tokens_per_second:.0f}",
                    "1" if one.setting == "ar" else f"{one.times_ar:.2f} ({low:.2f}–{high:.2f})",
                    f"{one.tokens_per_pass:.2f}",
                    "—" if one.setting == "ar" else f"{one.equal:.0%}",
                    f"{one.first_seconds:.2f} s",
                    _cost(one, "denoiser"),
                    _cost(one, "context"),
                )
        yield out


def _cost(one: SpeedResult, tower: TowerName) -> str:
    seconds = one.pass_seconds[tower]
    if one.setting == "ar" and seconds:
        return f"{1e3 * seconds:.1f} ms"
    return f"{one.pass_cost[tower]:.2f}×" if seconds else "—"
