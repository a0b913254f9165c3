"""The memory that a process can use: the least of the machine's and of the limits of its control groups."""

from __future__ import annotations

from pathlib import Path

import pytest

from twotower import system_memory
from twotower.system_memory import _group_memory, available_memory

MIB = 2**20


def group(folder: Path, names: tuple[str, str, str], limit: object, used: int, cached: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {cached}\n")


@pytest.mark.parametrize(
    ("names", "line", "folder"),
    [
        (system_memory.V2, "0::/a/b", ""),
        (system_memory.V1, "4:memory:/a/b", "memory"),
        (system_memory.V1, "7:cpu,memory:/a/b", "memory"),
    ],
)
def test_limits_of_control_groups(tmp_path: Path, names: tuple[str, str, str], line: str, folder: str) -> None:
    """Each group above a process may have a limit; files that the kernel can drop are free."""
    (tmp_path / "cgroup").write_text(f"9:name=systemd:/\n{line}\nnonsense\n")
    group(tmp_path / folder / "a/b", names, 100 * MIB, 90 * MIB, 20 * MIB)
    group(tmp_path / folder / "a", names, 50 * MIB, 60 * MIB, 1)
    group(tmp_path / folder, names, "max", 5, 0)
    assert list(_group_memory(tmp_path / "cgroup", tmp_path)) == [30 * MIB, 0]


def test_in_a_container_the_root_is_its_group(tmp_path: Path) -> None:
    """The path of the process is that of the host, which the container does not see."""
    (tmp_path / "cgroup").write_text("0::/docker/0123\n")
    group(tmp_path, system_memory.V2, 64 * MIB, 60 * MIB, MIB)
    assert list(_group_memory(tmp_path / "cgroup", tmp_path)) == [5 * MIB]
    assert list(_group_memory(tmp_path / "none", tmp_path)) == []


def test_the_least_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = available_memory()
    assert machine is not None
    assert machine > 0
    monkeypatch.setattr(system_memory, "_group_memory", lambda listed: iter([machine // 2, machine * 2]))
    free = available_memory()
    assert free is not None
    assert free <= machine // 2
    monkeypatch.setattr(system_memory, "_machine_memory", lambda: None)
    monkeypatch.setattr(system_memory, "_group_memory", lambda listed: iter([]))
    assert available_memory() is None
