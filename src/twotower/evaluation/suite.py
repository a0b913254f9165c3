"""Deprecated: `twotower.evaluation.tasks`."""

import sys
import warnings

from twotower.evaluation.tasks import *  # noqa: F403

warnings.warn(
    "twotower.evaluation.suite is deprecated; import from twotower.evaluation.tasks",
    DeprecationWarning,
    stacklevel=2,
)

if __name__ == "__main__":
    from twotower.evaluation.tasks.__main__ import run_suite

    sys.exit(run_suite())
