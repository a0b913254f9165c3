"""The start of the command: closed streams, Ctrl-C while it imports, and a terminal without escape codes."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = [sys.executable, "-m", "twotower"]


@pytest.mark.parametrize("closed", ["<&-", "2>&-", "<&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams(closed: str) -> None:
    line = " ".join([*COMMAND, "info --json", closed])
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.startswith("{") == (">&- 2" not in closed)


def test_closed_stdin_without_a_verb() -> None:
    done = subprocess.run(["bash", "-c", " ".join([*COMMAND, "<&-"])], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("Error: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("module", ["click", "difflib"])
def test_ctrl_c_during_imports(tmp_path: Path, module: str) -> None:
    """A module that raises KeyboardInterrupt stands for a signal while it is imported."""
    (tmp_path / f"{module}.py").write_text("raise KeyboardInterrupt")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*COMMAND, "info"], capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": path}
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def run_with_module(folder: Path, module: str, source: str, *before: str) -> subprocess.CompletedProcess[str]:
    """Runs `twotower generate` with a module of this source in the place of an imported one."""
    (folder / f"{module}.py").write_text(source)
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    command = [*before, *COMMAND, "generate", "hi"]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": path},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # off if the tests run in the background
    )


INTERRUPTED_IMPORT = """
import os, signal, sys
try:
    os.kill(os.getpid(), signal.SIGINT)
    import string
except BaseException as error:  # as numpy and transformers do
    raise ImportError("cannot load module more than once per process") from error
sys.exit(7)
"""


@pytest.mark.parametrize("module", ["click", "torch", "safetensors"])
def test_a_signal_in_the_import_of_a_library(tmp_path: Path, module: str) -> None:
    """The library made another exception of KeyboardInterrupt, which was a traceback."""
    done = run_with_module(tmp_path, module, INTERRUPTED_IMPORT)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_a_signal_that_the_parent_has_switched_off(tmp_path: Path) -> None:
    """As under nohup, or in the background of a script."""
    done = run_with_module(tmp_path, "click", INTERRUPTED_IMPORT, "bash", "-c", "trap '' INT; exec \"$@\"", "bash")
    assert (done.returncode, done.stderr) == (7, "")


def test_few_modules_are_imported_before_ctrl_c_is_handled() -> None:
    """In their import, and in the start of Python itself, Ctrl-C is a traceback."""
    code = "import sys; known = set(sys.modules); import twotower.cli.entry; print(*sorted({*sys.modules} - known))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) <= {
        "__future__", "twotower", "twotower.auto", "twotower.cli", "twotower.cli.entry", "twotower.version"
    }  # fmt: skip


@pytest.mark.parametrize(("term", "escapes"), [("dumb", False), ("xterm-256color", True)])
def test_escape_codes(term: str, escapes: bool) -> None:
    """`twotower info` at a terminal of each kind."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen([*COMMAND, "info"], stdout=theirs, stderr=theirs, env=os.environ | {"TERM": term})
    os.close(theirs)
    written = b""
    try:
        while part := os.read(ours, 65536):
            written += part
    except OSError:  # the end of a pseudo-terminal
        pass
    assert process.wait() == 0
    os.close(ours)
    assert b"layers" in written
    assert (b"\x1b" in written) == escapes
