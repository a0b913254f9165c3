"""The entry point of the `twotower` command. Ctrl-C while it imports the rest ends the process quietly."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Runs the command line of the process, and exits with its code; 130 after Ctrl-C."""
    try:
        open_closed_streams()
        from twotower.cli.main import run_cli

        code = run_cli()
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


def open_closed_streams() -> None:
    """Opens closed standard streams on the null device, so that no other file gets their descriptors."""
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115
