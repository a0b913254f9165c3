"""Prints the tables of the bundled model's card: `python -m twotower.recipes.card MODEL_DIR`.

Reads metrics.json (`evaluation.held_out`) and training.jsonl (`recipes.stages`) of the directory and prints Markdown.
The card contains these tables; a test compares them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

Figures = dict[str, Any]  # a JSON object of one of the files


def tables(directory: Path) -> dict[str, list[str]]:
    """The tables: title → lines of Markdown."""
    metrics = json.loads((directory / "metrics.json").read_text(encoding="utf-8"))
    records = [json.loads(line) for line in (directory / "training.jsonl").read_text(encoding="utf-8").splitlines()]
    made = {"training": list(training(records)), "dialogues": list(dialogues(metrics["dialogues"]))}
    for level, figures in metrics["suite"].items():
        made[level.replace("_", " ")] = list(problems(figures))
    for level, figures in metrics.get("json", {}).items():
        made[f"json, {level.replace('_', ' ')}"] = list(problems(figures))
    return made


def settings_of(figures: Figures) -> dict[str, Figures]:
    """Figures of each setting, by its title in a table: AR, thresholds, verified."""
    found = {name: of for name, of in figures.items() if isinstance(of, dict)}
    return {_title(name): of for name, of in found.items()}


def _title(setting: str) -> str:
    mode, _, value = setting.partition(":")
    return {"ar": "AR", "diffusion": f"threshold {value}"}.get(mode, mode)


def _short(title: str) -> str:
    return title.removeprefix("threshold ")


def training(records: list[Figures]) -> Iterator[str]:
    """Table of the stages: steps, tokens and the last validation."""
    yield "| stage | steps | tokens | of them targets | held-out text |"
    yield "|---|---|---|---|---|"
    for stage in dict.fromkeys(record["stage"] for record in records):
        own = [record for record in records if record["stage"] == stage]
        tokens, targets = (sum(record[name] for record in own) / 1e6 for name in ("tokens", "targets"))
        last = next(record["validation"] for record in reversed(own) if "validation" in record)
        if "draft_tokens" in last:
            found = f"{last['draft_tokens']:.2f} tokens a round"
        elif "nll" in last:
            found = f"{last['nll']:.3f} nats"
        else:
            found = f"{last['masked_nll']:.3f} nats masked, AR {last['ar_nll']:.3f}"
        yield f"| {stage} | {own[-1]['step']:,} | {tokens:.1f} M | {targets:.1f} M | {found} |"


def dialogues(figures: Figures) -> Iterator[str]:
    """Table of continuations of held-out dialogues, with a column for each setting."""
    columns = settings_of(figures)
    yield "| figure | " + " | ".join(columns) + " |"
    yield "|---" * (len(columns) + 1) + "|"
    rows: dict[str, Callable[[Figures], str]] = {
        "tokens per pass": lambda f: f"{f['tokens_per_pass']:.2f}",
        "NLL by the context tower, nats": lambda f: f"{f['nll_per_token']:.3f} ({f['nll_ratio']:.2f}×)",
        "repeated 4-grams": lambda f: f"{f['repeated_4grams']:.1%}",
        "ended by EOS": lambda f: f"{f['ended_by_eos']:.1%}",
    }
    for name, show in rows.items():
        yield f"| {name} | " + " | ".join(map(show, columns.values())) + " |"


def problems(figures: Figures) -> Iterator[str]:
    """Table of problems: right answers and tokens per pass; numbers are thresholds. Verified mode answers as AR."""
    settings = settings_of(figures)
    answering = {title: of for title, of in settings.items() if title != "verified"}
    counted = {title: of for title, of in settings.items() if title != "AR"}
    right = " | ".join(f"{title} right" for title in map(_short, answering))
    yield f"| family | {right} | tokens per pass: {' | '.join(map(_short, counted))} |"
    yield "|---" * (len(answering) + len(counted) + 1) + "|"
    families = list(figures["ar"]["accuracy"])
    for family in families[: 1 if len(families) == 2 else None]:  # of one family, the last row would be the same again
        cells = [f"{of['accuracy'][family]:.1%}" for of in answering.values()]
        cells += [f"{of['tokens_per_pass'][family]:.2f}" for of in counted.values()]
        yield f"| {family} | " + " | ".join(cells) + " |"


@click.command()
@click.argument("directory", type=click.Path(exists=True, file_okay=False, path_type=Path))
def main(directory: Path) -> None:
    """Prints the tables."""
    for title, lines in tables(directory).items():
        click.echo("\n".join([f"### {title}", "", *lines, ""]))


if __name__ == "__main__":
    main()
