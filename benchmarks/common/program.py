"""Options, process settings and output that all programs share."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console, RenderableType

from common.roofline import DTYPES
from twotower.process import configure_process


def numbers(_: Any, __: Any, text: str) -> tuple[int, ...]:
    """Parses a comma-separated list of numbers."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a list of numbers; give numbers like 1,2,4") from None


def names(text: str, known: Iterable[str], option: str) -> tuple[str, ...]:
    """Parses a comma-separated list of known names."""
    chosen, allowed = tuple(text.split(",")), list(known)
    unknown = sorted(set(chosen) - set(allowed))
    if unknown:
        raise click.BadParameter(f"{', '.join(unknown)}: choose from {', '.join(allowed)}", param_hint=option)
    return chosen


DIRECTORY = click.Path(exists=True, file_okay=False, path_type=Path)
MODEL = click.option("--model", "path", type=DIRECTORY, default=None, help="A checkpoint directory.")
CONFIG = click.option(
    "--config", type=click.Path(exists=True, dir_okay=False, path_type=Path), default=None,
    help="Random weights of this shape.  [default: benchmarks/midsize.json]",
)  # fmt: skip
DEVICE = click.option("--device", type=click.Choice(("cpu", "cuda")), default="cpu", show_default=True)
DTYPE = click.option("--dtype", type=click.Choice(DTYPES), default="float32", show_default=True)
THREADS = click.option("--threads", type=int, default=None, help="CPU threads. [default: torch's or twotower's]")
QUICK = click.option("--quick", is_flag=True, help="A smoke test of a few seconds.")
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON only, no tables.")


def start(threads: int | None = None) -> None:
    """Sets up the process of a program: malloc keeps large blocks, the number of threads, torch's seed."""
    configure_process(threads)
    torch.manual_seed(0)


def publish(benchmark: str, facts: dict[str, Any], shown: Iterable[RenderableType], as_json: bool) -> None:
    """Prints tables and sentences on stderr (not with --json), then all facts as one line of JSON on stdout."""
    if not as_json:
        console = Console(stderr=True, width=140)
        for one in shown:
            console.print(one)
    print(json.dumps({"benchmark": benchmark} | facts))
