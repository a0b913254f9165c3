"""`tools/ratchet.py`: the limits hold, and a figure on the wrong side of its limit fails."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parent.parent / "tools"
LIMITS = (TOOLS / "ratchet.toml").read_text()


def ratchet(limits: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, TOOLS / "ratchet.py", "--limits", limits, *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def changed(path: Path, name: str, by: int) -> Path:
    """A copy of the limits with one of them changed."""
    text, count = re.subn(
        rf"^{name} = (\d+)", lambda found: f"{name} = {max(int(found[1]) + by, 0)}", LIMITS, flags=re.M
    )
    assert count == 1
    path.write_text(text)
    return path


def test_the_limits_hold() -> None:
    done = ratchet(TOOLS / "ratchet.toml")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["longest_file", "longest_function", "import_cli"])
def test_a_figure_above_its_limit_fails_and_names_the_place(name: str, tmp_path: Path) -> None:
    done = ratchet(changed(tmp_path / "limits.toml", name, -1000))
    assert done.returncode == 1
    assert f"{name} is " in done.stderr
    assert "twotower" in done.stderr.split("Most: ")[1]


def test_a_limit_that_could_be_lower_fails_only_when_asked(tmp_path: Path) -> None:
    limits = changed(tmp_path / "limits.toml", "longest_file", 1000)
    done = ratchet(limits)
    assert (done.returncode, done.stderr) == (0, "")
    assert "lower the limit to" in done.stdout
    assert ratchet(limits, "--strict-lower").returncode == 1


def test_an_unknown_limit_fails(tmp_path: Path) -> None:
    (tmp_path / "limits.toml").write_text(LIMITS + "\nlongest_name = 3\n")
    done = ratchet(tmp_path / "limits.toml")
    assert done.returncode == 1
    assert "longest_name" in done.stderr
