"""No kernels of this package. Runs `code_paths`; one file a path, so that test workers can share the paths."""

from __future__ import annotations

import pytest
from code_paths import LIMIT, Record, run_path

pytestmark = pytest.mark.timeout(LIMIT)


def test_the_subset(record_property: Record) -> None:
    run_path("none", "subset", record_property)


@pytest.mark.slow
def test_everything_concerned(record_property: Record) -> None:
    run_path("none", "everything", record_property)
