"""Runs tests in a process that is limited to one instruction set, to test each code path on one machine.

The C++ kernels are compiled for this instruction set, and torch and its libraries use no other instructions.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest

from twotower.ops import cpu_target
from twotower.ops.cpu import library

TESTS = Path(__file__).parent
Record = Callable[[str, object], None]
PROPERTY = "code path"
LIMIT = 3600  # seconds for all dependent tests on one core
SELECTED = {"subset": "code_path and not slow", "everything": "code_path or not slow"}
# Environment variables of the process of each path, without TWOTOWER_CPU_TARGET.
PATHS = {
    "avx512_bf16": {
        "ATEN_CPU_CAPABILITY": "avx512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
    },
    "avx512": {
        "ATEN_CPU_CAPABILITY": "avx512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
    },
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    # No C++ kernels, and torch's default instruction set: the code path of an Arm processor without a compiler.
    "none": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
}
# Other files whose results depend on the instruction set: equality, loading, one benchmark. Marked tests are found.
DEPENDENT_FILES = (
    "test_engine", "test_verified", "test_api", "test_state", "test_async_scheduling", "test_constraints",
    "test_logprobs", "test_bundled", "test_benchmarks",
)  # fmt: skip


def forced_path() -> str | None:
    """The code path to which this process is limited, or None."""
    name = cpu_target.selected().name
    return name if name in PATHS else None


def own_path() -> str:
    """The code path that this processor has without limits: the first that it supports."""
    return next(name for name in PATHS if cpu_target.unsupported_reason(cpu_target.TARGETS[name]) is None)


def run_path(name: str, what: Literal["subset", "everything"], record: Record) -> None:
    """Runs dependent tests in a process that is limited to one code path.

    "subset": tests marked `code_path`; "everything": also the short forms of all other tests in the dependent files.
    """
    if forced_path() is not None:
        pytest.skip(f"this process is limited to {forced_path()} itself")
    if what == "subset" and name == own_path():
        record(PROPERTY, f"{name}: this processor's own path, on which all other tests run")
        pytest.skip("all other tests run on this path")
    built = library.build(cpu_target.TARGETS[name])  # compiled before the tests of the path start
    if isinstance(built, str) and name != "none":
        record(PROPERTY, f"{name}: not covered: {built}")
        pytest.skip(built)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", SELECTED[what]]
    files = [path for path in sorted(TESTS.rglob("test_*.py")) if "pytest.mark.code_path" in path.read_text("utf-8")]
    if what == "everything":
        files += [next(TESTS.rglob(f"{file}.py")) for file in DEPENDENT_FILES]
    environment = {**_without_pytest(), **PATHS[name], cpu_target.VARIABLE: name, "OMP_NUM_THREADS": "1"}
    started = time.monotonic()
    done = subprocess.run(
        [*command, *map(str, files)], env=environment, cwd=TESTS.parent, capture_output=True, text=True
    )
    seconds = time.monotonic() - started
    said = f"{name}, {what}: {_counts(done.stdout)} in {seconds:.0f} s"
    record(PROPERTY, said)
    assert done.returncode == 0, f"{said}\n{done.stdout[-8000:]}\n{done.stderr[-2000:]}"


def _without_pytest() -> dict[str, str]:
    """The environment without the variables of pytest and xdist."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}


def _counts(output: str) -> str:
    """The counts in pytest's last line, e.g. "12 passed, 3 skipped"."""
    last = (output.strip().splitlines() or [""])[-1]
    return ", ".join(re.findall(r"\d+ (?:passed|failed|errors?|skipped)", last)) or "nothing"
