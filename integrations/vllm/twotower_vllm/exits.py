"""Ends vLLM's command with one line, where a model or an option is not supported."""

from __future__ import annotations

import sys
from typing import NoReturn


def refuse(reason: str) -> NoReturn:
    """Prints the reason to stderr and ends the process with exit code 2.

    vLLM would show any other exception as a traceback of its own code.
    """
    print(f"twotower-vllm: {reason}", file=sys.stderr, flush=True)
    raise SystemExit(2)
