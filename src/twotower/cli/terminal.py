"""Output beside the result of a verb: tables, and a status line during long work."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal, TextIO

import click

if TYPE_CHECKING:
    from rich.console import Console


def console_on(stream: Literal["stdout", "stderr"]) -> Console:
    """A console for tables, as wide as the terminal, or 100 columns without a terminal."""
    from rich.console import Console

    width = None if getattr(sys, stream).isatty() else 100
    return Console(stderr=stream == "stderr", highlight=False, width=width)


def can_move_cursor(stream: TextIO) -> bool:
    """Whether a stream is a terminal that understands escape codes; a terminal with TERM=dumb does not."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


@contextmanager
def status_line() -> Iterator[Callable[[str], None]]:
    """Yields a function that replaces the status line on stderr. Without a terminal, nothing is shown."""
    stream = sys.stderr  # kept, because the work inside the block may redirect sys.stderr
    shown = can_move_cursor(stream)

    def update(text: str) -> None:
        if shown:
            click.secho(f"\r\x1b[K{text}", file=stream, nl=False, dim=True)

    try:
        yield update
    finally:
        if shown:
            click.echo("\r\x1b[K", file=stream, nl=False)


@contextmanager
def byte_bar() -> Iterator[Callable[[int, int], None] | None]:
    """Yields a function (bytes done, bytes in all) that moves a progress bar on stderr; None without a terminal."""
    if not can_move_cursor(sys.stderr):
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress("writing", *columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("writing", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
