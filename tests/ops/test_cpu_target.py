"""CPU targets: the detected instruction set, and processes that select a target by option."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from code_paths import PATHS, PROPERTY, forced_path, run_path

from twotower import options
from twotower.errors import ArgumentError
from twotower.ops import cpu_target
from twotower.ops.cpu import library
from twotower.ops.cpu_target import TARGETS
from twotower.ops.precision import has_fast_bf16_matmul

CPU = torch.device("cpu")
WIDTHS = {"avx2": 8, "avx512": 16, "avx512_bf16": 16}
ARM_COMPILER = shutil.which("aarch64-linux-gnu-g++")


@pytest.mark.code_path
def test_process_runs_the_forced_target() -> None:
    """A process with a forced target runs the code of that target. Without a forced target, the test is skipped."""
    path = forced_path()
    if path is None:
        pytest.skip("no target is forced in this process")
    assert torch.backends.cpu.get_cpu_capability() == PATHS[path]["ATEN_CPU_CAPABILITY"].upper()
    assert has_fast_bf16_matmul(CPU) == (path == "avx512_bf16")
    found = library.library()
    if path == "none":
        assert found == "TWOTOWER_CPU_TARGET=none"
    else:
        assert isinstance(found, ctypes.CDLL), found
        assert found.vector_width() == WIDTHS[path]


def test_an_unknown_target_is_a_one_line_error() -> None:
    with pytest.raises(ArgumentError, match="cpu_target is 'avx1024'"), options.override(cpu_target="avx1024"):
        library.library()


@pytest.mark.parametrize("name", ["avx512_bf16", "avx512", "avx2"])
def test_a_target_that_the_processor_lacks_is_unsupported(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, TARGETS[name].probe or "", lambda: False)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert library.build(TARGETS[name]) == f"TWOTOWER_CPU_TARGET={name}: this processor has no {name}"


@pytest.mark.parametrize(
    ("bf16", "amx", "expected"),
    [(False, False, set()), (True, False, {"native", "avx512_bf16"}), (False, True, {"native", "avx512_bf16"})],
)
def test_bf16_is_fast_where_processor_and_target_have_it(
    bf16: bool, amx: bool, expected: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    assert {name for name, target in TARGETS.items() if cpu_target.has_bf16_matmul(target)} == expected
    assert has_fast_bf16_matmul(torch.device("cuda"), TARGETS["none"])


@pytest.mark.parametrize(
    ("environment", "says"),
    [({"TWOTOWER_NATIVE": "0"}, "TWOTOWER_NATIVE=0"), ({"CXX": "none", "PATH": "{python}"}, "no C++ compiler found"),
     ({"CXX": "{broken}"}, "broken could not compile the kernels")],
)  # fmt: skip
def test_without_a_compiler_torch_runs(environment: dict[str, str], says: str, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho error: no >&2; exit 1\n')
    broken.chmod(0o755)
    places = {"python": str(tmp_path), "broken": str(broken)}
    given = {name: value.format(**places) for name, value in environment.items()}
    code = (
        "import torch; from twotower.ops import registry; from twotower.ops.cpu.library import library;"
        "print(library()); print(registry.select('linear', torch.device('cpu'), torch.float32, False).name)"
    )
    base = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=base | given, capture_output=True, text=True, check=True)
    assert says in done.stdout
    assert done.stdout.splitlines()[-1] == "torch"


FAKE_COMPILER = """#!/bin/sh
[ "$1" = --version ] && { echo 1; exit 0; }
while [ "$1" != -o ]; do shift; done
echo kernels > "$2"
"""


@pytest.fixture
def fake_compiler(tmp_path: Path) -> Iterator[Path]:
    """A compiler that writes a fixed file → the folder of the cache."""
    compiler = tmp_path / "fake"
    compiler.write_text(FAKE_COMPILER)
    compiler.chmod(0o755)
    with options.override(cxx=str(compiler), cache_home=tmp_path / "cache", native=True):
        yield tmp_path / "cache" / "twotower"


@pytest.mark.parametrize("damage", [b"", b"ker", b"kernelz\n"])
def test_a_damaged_compiled_file_is_compiled_again(
    fake_compiler: Path, damage: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    """A truncated file was a bus error at every start. With an empty file, torch did the work for ever."""
    made = library.build(cpu_target.NATIVE)
    assert isinstance(made, Path)
    assert made.read_bytes() == b"kernels\n"
    assert "compiling kernels" in capsys.readouterr().err
    assert library.build(cpu_target.NATIVE) == made
    assert capsys.readouterr().err == ""
    made.write_bytes(damage)
    assert library.build(cpu_target.NATIVE) == made
    assert made.read_bytes() == b"kernels\n"
    said = capsys.readouterr().err.splitlines()
    assert said[0] == f"{made} is damaged and is compiled again"
    assert said[1].startswith("compiling kernels")


def test_folders_of_killed_compilations_are_removed(fake_compiler: Path) -> None:
    old, new = fake_compiler / "tmpold", fake_compiler / "tmpnew"
    for folder in (old, new):
        folder.mkdir(parents=True)
        (folder / "native.so").write_bytes(b"part")
    os.utime(old, (0, 0))
    library.build(cpu_target.NATIVE)
    assert not old.exists()
    assert new.exists()  # another process may be compiling


@pytest.mark.parametrize("case", ["no home", "a file in its place"])
def test_a_cache_that_cannot_be_had_costs_speed_and_one_line(
    fake_compiler: Path, case: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_home(cls: type[Path]) -> Path:
        raise RuntimeError("Could not determine home directory.")

    blocked = fake_compiler.parent.parent / "blocked"
    blocked.write_text("")
    monkeypatch.setattr(Path, "home", classmethod(no_home))
    with options.override(cache_home=blocked if case != "no home" else None):
        reason = library.build(cpu_target.NATIVE)
    assert isinstance(reason, str)
    assert capsys.readouterr().err == f"no compiled kernels, so this process computes more slowly: {reason}\n"
    assert ("Set XDG_CACHE_HOME" if case == "no home" else "Not a directory") in reason


def test_code_paths_that_did_not_run_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    said: list[tuple[str, object]] = []
    with options.override(cpu_target="native"), pytest.raises(pytest.skip.Exception):
        run_path("avx2", "subset", lambda *pair: said.append(pair))
    ((name, value),) = said
    assert name == PROPERTY
    assert str(value).startswith("avx2: not covered: ")


# --- Arm --------------------------------------------------------------------------------------------------------------


def test_arm_does_not_probe_x86_features(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    refused = {name for name, target in TARGETS.items() if cpu_target.unsupported_reason(target) is not None}
    assert refused == {"avx512_bf16", "avx512", "avx2"}
    said = "TWOTOWER_CPU_TARGET=avx2: avx2 needs an x86-64 processor; this one is aarch64"
    assert library.build(TARGETS["avx2"]) == said
    assert not any(map(cpu_target.has_bf16_matmul, TARGETS.values()))


@pytest.mark.skipif(
    ARM_COMPILER is None, reason="no aarch64-linux-gnu-g++; on Debian: apt-get install g++-aarch64-linux-gnu"
)
@pytest.mark.parametrize("level", ["-O0", pytest.param("-O1", marks=pytest.mark.slow)])
def test_the_kernels_compile_for_arm(tmp_path: Path, level: str) -> None:
    made = tmp_path / "native.so"
    flags = [flag for flag in library.FLAGS if flag != "-O3"]  # the result is not run
    command = [str(ARM_COMPILER), *flags, level, "-fopenmp", "-Wall", "-Wextra", "-Werror"]
    done = _run([*command, str(library.HERE / "native.cpp"), "-o", str(made)])
    assert done.returncode == 0, done.stderr[:2000]
    machine = made.read_bytes()[18:20]
    assert int.from_bytes(machine, "little") == 183  # of the ELF header: AArch64


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("name", ["native", "avx512_bf16", "avx512", "avx2"])
def test_the_kernels_compile_for_every_target_without_a_warning(name: str) -> None:
    """Compiles for every target, also if this processor cannot run the result."""
    if TARGETS[name].probe is not None and platform.machine() not in cpu_target.X86_64:
        pytest.skip("these are flags of x86-64 compilers")
    flags = TARGETS[name].flags[0]
    command = ["c++", *library.FLAGS, *flags, "-fopenmp", "-Wall", "-Wextra", "-Werror", "-fsyntax-only"]
    done = _run([*command, str(library.HERE / "native.cpp")])
    assert done.returncode == 0, done.stderr[:2000]


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
