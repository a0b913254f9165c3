"""Compiles and loads the C++ kernels of this directory at their first use.

The system's compiler (c++, g++ or clang++; CXX overrides) builds them for this processor, or for the instruction set
that the option `cpu_target` names. The result is kept in the user's cache. Without a compiler, torch's operations are
used. The option `native` switches the kernels off.
"""

from __future__ import annotations

import ctypes
import hashlib
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

from twotower import options
from twotower.ops import cpu_target
from twotower.ops.cpu_target import CPUTarget

HERE = Path(__file__).parent
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fPIC", "-shared")
ABANDONED_SECONDS = 3600.0  # age of a temporary folder that no compilation uses any more
THREADED = ("-fopenmp",)


def library() -> ctypes.CDLL | str:
    """The compiled kernels for the current options, or the reason why there are none."""
    return _library(options.current().kernels_key)


@cache
def _library(options_key: str) -> ctypes.CDLL | str:
    """options_key: `Options.kernels_key` of the options in force."""
    path = build(cpu_target.selected())
    try:
        return path if isinstance(path, str) else ctypes.CDLL(str(path))
    except OSError as error:
        return _first_line(error)


def build(target: CPUTarget) -> Path | str:
    """The file with the kernels for a target, compiled unless it exists; or the reason why there is none."""
    if not options.current().native:
        return "TWOTOWER_NATIVE=0"
    if sys.platform == "win32":
        return "not built on Windows"
    if not target.flags:
        return f"{cpu_target.VARIABLE}={target.name}"
    reason = cpu_target.unsupported_reason(target)
    if reason is not None:
        return f"{cpu_target.VARIABLE}={target.name}: {reason}"
    try:
        return _compiled(target)
    except (OSError, subprocess.SubprocessError) as error:
        reason = _first_line(error)
        _say(f"no compiled kernels, so this process computes more slowly: {reason}")
        return reason


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def variants(target: CPUTarget) -> list[tuple[str, ...]]:
    """Compiler flags for a target, best first. Without OpenMP the kernels run on one thread."""
    return [(*flags, *more) for more in (THREADED, ()) for flags in target.flags]


def _compiled(target: CPUTarget) -> Path | str:
    compiler = next(filter(None, map(shutil.which, (options.current().cxx or "c++", "g++", "clang++"))), None)
    if compiler is None:
        return "no C++ compiler found (c++, g++, clang++)"
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=30, check=True).stdout
    sources = b"".join(path.read_bytes() for path in [*sorted(HERE.glob("*.h")), HERE / "native.cpp"])
    attempts = variants(target)
    key = hashlib.sha256(b"\0".join([sources, version.encode(), _processor().encode(), repr(attempts).encode()]))
    folder, name = options.current().cache_dir, f"{target.name}-{key.hexdigest()[:16]}"
    return _intact(folder, name) or _compile(compiler, attempts, target, folder, name)


def _intact(folder: Path, name: str) -> Path | None:
    """The compiled file of this name in the cache whose content has the checksum in its name. Others are removed."""
    for path in sorted(folder.glob(f"{name}-*.so")):
        if path.stem == f"{name}-{_checksum(path)}":
            return path
        _say(f"{path} is damaged and is compiled again")
        path.unlink(missing_ok=True)
    return None


def _checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _remove_abandoned(folder: Path) -> None:
    """Removes the temporary folders of compilations whose processes were killed."""
    for left in folder.glob("tmp*"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > ABANDONED_SECONDS:
                shutil.rmtree(left)


def _compile(
    compiler: str, attempts: Sequence[tuple[str, ...]], target: CPUTarget, folder: Path, name: str
) -> Path | str:
    """Compiles the kernels into the cache with the first flags that work → the file, or why there is none."""
    folder.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(folder)
    processor = "this processor" if target is cpu_target.NATIVE else target.name
    _say(f"compiling kernels for {processor}, once (10 to 20 s) → {folder}")
    errors = ""
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        made = Path(temporary) / f"{name}.so"
        for variant in attempts:
            command = [compiler, *FLAGS, *variant, str(HERE / "native.cpp"), "-o", str(made)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
            if done.returncode == 0:
                path = folder / f"{name}-{_checksum(made)}.so"
                return made.replace(path)  # atomic, because other processes may compile too
            errors = errors or next((line for line in done.stderr.splitlines() if "error" in line), "no error message")
    return f"{Path(compiler).name} could not compile the kernels: {errors}"


def _processor() -> str:
    """The processor facts that -march=native depends on: different machines may share a cache."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.platform() + platform.processor()
    return "\n".join(line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part")))[:8000]
