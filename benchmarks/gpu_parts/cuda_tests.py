"""Part 2: the tests that use CUDA, in parallel processes of pytest that are forked, which saves their imports."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_parts.parallel import in_processes
from gpu_parts.record import Record
from gpu_parts.setting import Setting

ROOT = Path(__file__).parents[2]
FILES = (
    "tests/ops/test_triton_attention.py", "tests/ops/test_triton.py", "tests/ops/test_triton_experts.py",
    "tests/ops/test_triton_norm_route.py", "tests/ops/test_triton_rope.py", "tests/engine/test_overlap.py",
    "tests/cache/test_two_devices.py", "tests/ops/test_kernels.py",
)  # fmt: skip
SMALL = (
    "tests/ops/test_kernels.py::test_an_unselected_expert_is_not_read",
    "tests/ops/test_kernels.py::test_a_token_with_dt_zero_has_no_effect",
)


def run(setting: Setting, record: Record) -> None:
    if importlib.util.find_spec("pytest") is None:
        record.add("all tests", skipped="pytest is not installed")
        return
    files = SMALL if setting.small else FILES
    workers = 2 if setting.small else min(12, os.cpu_count() or 1)
    for lost in in_processes(range(workers), lambda number: run_tests(record, files, number, workers), workers):
        record.add(f"tests of process {lost}", error="the process died; log.txt has its last test")


def run_tests(record: Record, files: Sequence[str], number: int, workers: int) -> None:
    """Runs each `workers`-th test of all files in this process."""
    import pytest

    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # plugins cost seconds; the part has a time limit of its own
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT / "tests"))
    share = Share(record, number, workers)
    status = int(pytest.main(["-q", "-v", "-p", "no:cacheprovider", "-m", "not slow", *files], plugins=[share]))
    failed = {} if status in (0, 5) else {"error": f"pytest ended with {status}; log.txt has the reason"}
    record.add(f"tests of process {number}", **share.counts, **failed)


class Share:
    """Selects a share of the tests and records those that fail."""

    def __init__(self, record: Record, number: int, workers: int) -> None:
        self.record, self.number, self.workers = record, number, workers
        self.counts: Counter[str] = Counter()

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = items[self.number :: self.workers]

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] += 1
        if report.failed:
            last = report.longreprtext.rstrip().splitlines()[-3:]
            self.record.add(report.nodeid, error=" / ".join(last)[:300])
