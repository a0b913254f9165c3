"""Deprecated; use `twotower.evaluation.tasks`."""

import sys
import warnings

from twotower.evaluation.tasks import *  # noqa: F403
from twotower.evaluation.tasks import make_problems as problems  # noqa: F401  this module's names
from twotower.evaluation.tasks import split_of as side  # noqa: F401
from twotower.evaluation.tasks import stream_problems as stream  # noqa: F401

warnings.warn(
    "twotower.evaluation.suite is deprecated; import from twotower.evaluation.tasks",
    DeprecationWarning,
    stacklevel=2,
)

if __name__ == "__main__":
    from twotower.evaluation.tasks.__main__ import run_suite

    sys.exit(run_suite())
