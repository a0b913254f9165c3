"""Deprecated: `twotower.evaluation.tasks`."""

import sys
import warnings

from twotower.evaluation.tasks import (
    FAMILIES,
    LEVELS,
    Problem,
    Score,
    Split,
    accuracy,
    problems,
    score,
    side,
    stream,
    wilson,
    write_jsonl,
)

__all__ = [
    "FAMILIES",
    "LEVELS",
    "Problem",
    "Score",
    "Split",
    "accuracy",
    "problems",
    "score",
    "side",
    "stream",
    "wilson",
    "write_jsonl",
]

warnings.warn(
    "twotower.evaluation.suite is deprecated; import from twotower.evaluation.tasks",
    DeprecationWarning,
    stacklevel=2,
)

if __name__ == "__main__":
    from twotower.evaluation.tasks.__main__ import run_suite

    sys.exit(run_suite())
