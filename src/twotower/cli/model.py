"""What verbs that work with a model have in common."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import click

from twotower.cli.terminal import passing_line

model_option = click.option(
    "-m", "--model", metavar="MODEL", help="Checkpoint directory or hub id.  [default: the bundled model]"
)


@contextmanager
def note(text: str) -> Iterator[None]:
    """A line on a terminal's stderr while something takes its time; gone afterwards."""
    with passing_line() as tell:
        tell(text)
        yield
