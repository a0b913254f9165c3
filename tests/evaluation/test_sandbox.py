"""The sandbox: programs that pass, programs that fail, and effects that the sandbox prevents."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from twotower.evaluation.lm_eval import sandbox
from twotower.evaluation.lm_eval.sandbox import ARCHITECTURES, NoSandboxError, run_program, seccomp_filter

here = sys.platform == "linux" and platform.machine() in ARCHITECTURES
needs_sandbox = pytest.mark.skipif(not here, reason="the sandbox is for Linux on x86-64 or arm64")


@needs_sandbox
@pytest.mark.parametrize(
    "program",
    [
        "assert 1 + 1 == 2",
        "import collections, re, math, heapq, typing, functools, itertools, datetime",
        "import numpy as np\nassert np.arange(4).sum() == 6",
        "import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()",
        "print('x' * 100_000)\nimport sys\nsys.stderr.write('y')",
        "assert open('/etc/passwd').read()",
        "assert __name__ == '__main__'",
    ],
)
def test_a_program_that_runs_to_its_end_passes(program: str) -> None:
    outcome = run_program(program)
    assert outcome.passed, outcome.reason


@needs_sandbox
@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("assert 1 == 2, 'no'", "AssertionError: no"),
        ("def f(:", "SyntaxError"),
        ("import sys\nsys.exit(0)", "SystemExit"),  # a program that exits early fails
        ("import os\nos._exit(0)", "ended with status 0"),
        ("def f(n):\n    return f(n + 1)\nf(0)", "RecursionError"),
        ("input()", "EOFError"),
        ("x = bytearray(16 << 30)", "MemoryError"),
        ("import socket\nsocket.create_connection(('127.0.0.1', 22))", "PermissionError"),
        ("import socket\nsocket.socket(socket.AF_UNIX)", "PermissionError"),
        ("import subprocess\nsubprocess.run(['true'])", "PermissionError"),
        ("import os\nos.system('true') and exit(1)", "SystemExit"),
        ("import os\nos.fork()", "PermissionError"),
        ("import os\nos.execv('/bin/true', ['true'])", "PermissionError"),
        ("import os, signal\nos.kill(os.getppid(), signal.SIGTERM)", "PermissionError"),
        ("import multiprocessing\nmultiprocessing.Pool(2)", "PermissionError"),
        ("import ctypes\nassert ctypes.CDLL(None).syscall(425, 1, 0) >= 0", "AssertionError"),  # io_uring_setup
    ],
)
def test_a_failed_program_has_a_reason(program: str, reason: str) -> None:
    outcome = run_program(program)
    assert not outcome.passed
    assert reason in outcome.reason
    assert "\n" not in outcome.reason


@needs_sandbox
@pytest.mark.parametrize("program", ["while True: pass", "import time\ntime.sleep(60)"])
def test_time_is_limited(program: str) -> None:
    assert run_program(program, seconds=0.5).reason == "timed out"


@needs_sandbox
@pytest.mark.parametrize(
    "program",
    [
        "open({path!r}, 'w')",
        "open({path!r}, 'a')",
        "open({path!r}, 'r+')",
        "import os\nos.open({path!r}, os.O_RDONLY | os.O_TRUNC)",
        "import os\nos.unlink({path!r})",
        "import os\nos.truncate({path!r}, 0)",
        "import os\nos.rename({path!r}, {path!r} + '2')",
        "import os\nos.chmod({path!r}, 0)",
        "import os\nos.utime({path!r})",
        "import os\nos.symlink({path!r}, {path!r} + '2')",
        "import os\nos.mkdir({path!r} + '2')",
        "import shutil, pathlib\nshutil.rmtree(pathlib.Path({path!r}).parent)",
    ],
)
def test_files_are_unchanged(program: str, tmp_path: Path) -> None:
    kept = tmp_path / "kept.txt"
    kept.write_text("as it was")
    kept.chmod(0o644)
    outcome = run_program(program.format(path=str(kept)))
    assert not outcome.passed
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]
    assert kept.read_text() == "as it was"
    assert kept.stat().st_mode & 0o777 == 0o644


@needs_sandbox
def test_the_same_programs_work_outside_the_sandbox(tmp_path: Path) -> None:
    """Without the filter they succeed, so it is the filter that stops them."""
    kept = tmp_path / "kept.txt"
    kept.write_text("as it was")
    subprocess.run([sys.executable, "-c", f"open({str(kept)!r}, 'w')"], check=True)
    assert kept.read_text() == ""
    subprocess.run([sys.executable, "-c", "import os\nos.fork()"], check=True)


def test_nothing_runs_without_a_sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox.platform, "machine", lambda: "riscv64")
    with pytest.raises(NoSandboxError, match="no sandbox on"):
        run_program("pass")


@pytest.mark.parametrize("machine", ARCHITECTURES)
def test_the_filter_is_a_valid_bpf_program(machine: str) -> None:
    """Every jump lands inside the program, and every path ends with a decision."""
    code = seccomp_filter(machine)
    for place, (operation, true, false, _) in enumerate(code):
        if operation in (sandbox.EQUAL, sandbox.AT_LEAST, sandbox.ANY_BIT):
            assert place + 1 + max(true, false) < len(code)
    assert code[-1] == (sandbox.RETURN, 0, 0, sandbox.ALLOW)
    assert len(code) < 4096
