"""What verbs show besides their result: tables, and a line that comes and goes while something takes its time."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import click

if TYPE_CHECKING:
    from rich.console import Console


def console_on(stream: Literal["stdout", "stderr"]) -> Console:
    """For tables: as wide as the terminal, or 100 columns where there is none."""
    from rich.console import Console

    width = None if getattr(sys, stream).isatty() else 100
    return Console(stderr=stream == "stderr", highlight=False, width=width)


@contextmanager
def status_line() -> Iterator[Callable[[str], None]]:
    """A line on a terminal's stderr that says what was last told; gone afterwards."""
    stream = sys.stderr  # the one of now: what works meanwhile may have its own taken away
    shown = stream.isatty()

    def update(text: str) -> None:
        if shown:
            click.secho(f"\r\x1b[K{text}", file=stream, nl=False, dim=True)

    try:
        yield update
    finally:
        if shown:
            click.echo("\r\x1b[K", file=stream, nl=False)
