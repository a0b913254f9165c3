"""`twotower eval`: accuracy of several ways of decoding on the procedural suite, each paired with AR."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from twotower.cli import model as models
from twotower.cli.terminal import console_on, passing_line

if TYPE_CHECKING:
    from rich.table import Table

    from twotower.evaluation.evaluate import Line

SETTINGS = ("diffusion:0.8", "diffusion:0.9", "verified:draft_steps=1")


@click.command("eval")
@models.model_option
@click.option(
    "-s",
    "--setting",
    "settings",
    multiple=True,
    default=SETTINGS,
    show_default=True,
    metavar="MODE[:KNOB,NAME=X…]",
    help="A way to decode, e.g. diffusion:0.8, diffusion:factor=1.2,block_size=8, verified:acceptance=0.3. "
    "May be given several times; AR is always run.",
)
@click.option("-n", "--problems", type=click.IntRange(1), default=100, show_default=True, help="Of each family.")
@click.option("--family", "families", multiple=True, metavar="NAME", help="[default: all]")
@click.option("--difficulty", "difficulties", type=int, multiple=True, default=(1, 2), show_default=True)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the test problems.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=160, show_default=True)
@click.option("--rows", type=click.IntRange(1), default=64, show_default=True, help="Of a batch.")
@click.option("--dtype", type=click.Choice(models.DTYPES), default="auto", show_default=True)
@click.option("--threads", type=click.IntRange(1), help="CPU threads.")
@click.option("--json", "as_json", is_flag=True, help="No table.")
def evaluate(
    model: str | None, settings: tuple[str, ...], problems: int, families: tuple[str, ...],
    difficulties: tuple[int, ...], seed: int, max_new_tokens: int, rows: int, dtype: str, threads: int | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Exact-match accuracy on problems with one right answer, for each setting and for AR.

    Prints a table to stderr and one JSON line to stdout. Differences from AR are those on the same problems, with their
    95 % intervals; a pass is a forward of either tower.
    """
    from twotower.evaluation.evaluate import chosen_problems
    from twotower.evaluation.evaluate import evaluate as measure
    from twotower.evaluation.settings import parse_setting

    parsed = [parse_setting(text) for text in settings]
    chosen = chosen_problems(families, problems, difficulties, seed)
    source = models.source_of(model)
    with models.note(f"loading {models.name_of(source)} …"):
        loaded = models.load(source, dtype=dtype, threads=threads)
    models.need_tokenizer(loaded, source, "it cannot read problems; put one there")
    with passing_line() as tell:
        lines = measure(
            loaded, parsed, chosen, max_new_tokens=max_new_tokens, rows=rows,
            progress=lambda label, done: tell(f"{label}: {done} of {len(chosen)} problems"),
        )  # fmt: skip
    if not as_json:
        console = console_on("stderr")
        for table in tables(lines):
            console.print(table)
    facts = {"model": str(source), **models.placement(loaded), "problems": len(chosen), "seed": seed}
    click.echo(json.dumps(facts | {"difficulties": list(difficulties), "settings": [line.to_dict() for line in lines]}))


def tables(lines: list[Line]) -> Iterator[Table]:
    """What each setting costs and keeps, then its accuracy by family; a row a setting."""
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
            f"{line.tokens_per_pass:.2f}",
            f"{line.nll:.3f}",
            f"{line.repeated_4grams:.1%}",
        )
        by_family.add_row(label, *(f"{line.accuracy[family]:.1%}" for family in families))
    return iter((costs, by_family))
