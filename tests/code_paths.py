"""Runs tests in a process that is held to one instruction set, so that each code path is tested on any machine that has
the instructions: the C++ kernels are compiled for it, and torch and its libraries use nothing beyond it."""

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
LIMIT = 3600  # seconds for everything concerned, on one core
SELECTED = {"subset": "code_path and not slow", "everything": "code_path or not slow"}
# Of each path: the environment of its process, beside TWOTOWER_CPU_TARGET.
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
    # No kernels of this package and the least that torch has: what an Arm processor without a compiler does.
    "none": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
}
# The files whose results depend on the instruction set: kernels, packed weights, equality, loading, one benchmark.
CONCERNED = (
    "test_cpu_target", "test_kernels", "test_native", "test_packing", "test_int8", "test_conformance", "test_engine",
    "test_verified", "test_api", "test_batch_equality", "test_state", "test_async_scheduling",
    "test_constraints", "test_logprobs",
    "test_bundled", "test_benchmarks",
)  # fmt: skip


def forced() -> str | None:
    """The path that this process is held to, or None."""
    name = cpu_target.selected().name
    return name if name in PATHS else None


def run_path(name: str, what: Literal["subset", "everything"], record: Record) -> None:
    """The marked tests, or also the short forms of all others in the files concerned, in a process that is held to one
    path."""
    if forced() is not None:
        pytest.skip(f"this process is held to {forced()} itself")
    built = library.build(cpu_target.TARGETS[name])  # compiled here: the process of the path starts with tests
    if isinstance(built, str) and name != "none":
        record(PROPERTY, f"{name}: not covered: {built}")
        pytest.skip(built)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", SELECTED[what]]
    files = [str(next(TESTS.rglob(f"{file}.py"))) for file in CONCERNED]
    environment = {**_without_pytest(), **PATHS[name], cpu_target.VARIABLE: name, "OMP_NUM_THREADS": "1"}
    started = time.monotonic()
    done = subprocess.run([*command, *files], env=environment, cwd=TESTS.parent, capture_output=True, text=True)
    seconds = time.monotonic() - started
    said = f"{name}, {what}: {_counts(done.stdout)} in {seconds:.0f} s"
    record(PROPERTY, said)
    assert done.returncode == 0, f"{said}\n{done.stdout[-8000:]}\n{done.stderr[-2000:]}"


def _without_pytest() -> dict[str, str]:
    """The environment without what pytest and xdist left in it for their own processes."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}


def _counts(output: str) -> str:
    """ "12 passed, 3 skipped" of pytest's last line."""
    last = (output.strip().splitlines() or [""])[-1]
    return ", ".join(re.findall(r"\d+ (?:passed|failed|errors?|skipped)", last)) or "nothing"
