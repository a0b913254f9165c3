"""The entry point of the `twotower` command. Ctrl-C while a module is imported ends the process quietly."""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False  # as in `twotower`

if TYPE_CHECKING:
    from types import FrameType

INTERRUPTED = 130  # exit code after Ctrl-C
IMPORT_FILE = "<frozen importlib._bootstrap>"  # of the frames of an import


def main() -> None:
    """Runs the command line of the process, and exits with its code; 130 after Ctrl-C."""
    try:
        handle_interrupts()
        open_closed_streams()
        from twotower.cli.main import run_cli

        code = run_cli()
    except KeyboardInterrupt:
        code = INTERRUPTED
    sys.exit(code)


def handle_interrupts() -> None:
    """Lets Ctrl-C end the process at once while a module is imported.

    A KeyboardInterrupt in the import of a large library becomes another exception, or aborts the process. Ctrl-C that
    the parent process has switched off stays off.
    """
    import signal

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    while frame is not None and frame.f_code is not main.__code__:
        if frame.f_code.co_filename == IMPORT_FILE:
            os._exit(INTERRUPTED)
        frame = frame.f_back
    raise KeyboardInterrupt


def open_closed_streams() -> None:
    """Opens closed standard streams on the null device, so that no other file gets their descriptors."""
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115
