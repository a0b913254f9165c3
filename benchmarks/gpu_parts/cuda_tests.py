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
ASKS = "cuda.is_available()"  # in a test file whose tests use CUDA where there is a GPU
WITHOUT = ("test_train_cli.py", "test_gpu_script.py")  # they ask, but use no CUDA
SMALL = (
    "tests/ops/test_kernels.py::test_an_unselected_expert_is_not_read",
    "tests/ops/test_kernels.py::test_a_token_with_dt_zero_has_no_effect",
)


def run(setting: Setting, record: Record) -> None:
    if importlib.util.find_spec("pytest") is None:
        record.add("all tests", skipped="pytest is not installed")
        return
    files = SMALL if setting.small else cuda_files()
    workers = 2 if setting.small else min(12, os.cpu_count() or 1)
    for lost in in_processes(range(workers), lambda number: run_tests(record, files, number, workers), workers):
        record.add(f"tests of process {lost}", error="the process died; log.txt has its last test")


def cuda_files() -> list[str]:
    """The test files that use CUDA where there is a GPU, the largest first."""
    files = [file for file in (ROOT / "tests").rglob("test_*.py") if file.name not in WITHOUT]
    found = [file for file in files if ASKS in file.read_text(encoding="utf-8")]
    return [str(file.relative_to(ROOT)) for file in sorted(found, key=lambda file: -file.stat().st_size)]


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
