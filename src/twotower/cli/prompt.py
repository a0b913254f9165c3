"""Reads a prompt from the command line, a file or stdin."""

from __future__ import annotations

import sys
from pathlib import Path

from twotower.errors import ArgumentError


def read_prompt(argument: str | None, file: Path | None) -> str:
    """Returns the prompt as text, without the last newline of a file or of stdin.

    Raises:
        ArgumentError: no prompt, two prompts, an empty prompt, or bytes that are not UTF-8.
    """
    if argument is not None and file is not None:
        raise ArgumentError("PROMPT and --file are both given; leave one out")
    if file is not None:
        where, text = str(file), _decoded(file.read_bytes(), str(file))
    elif argument is None or argument == "-":
        where, text = "stdin", _from_stdin(asked=argument == "-")
    else:
        where, text = "PROMPT", _decoded(argument.encode(errors="surrogateescape"), "PROMPT")
    if not text.strip():
        raise ArgumentError(f"the prompt ({where}) is empty; give at least one word")
    return text if where == "PROMPT" else text.removesuffix("\n").removesuffix("\r")


def _from_stdin(asked: bool) -> str:
    if sys.stdin.isatty() and not asked:
        raise ArgumentError("no prompt is given; give one in quotes, with --file, or on stdin")
    return _decoded(sys.stdin.buffer.read(), "stdin")


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ArgumentError(f"{where}: not UTF-8 text (byte {error.start}); convert it to UTF-8") from None
