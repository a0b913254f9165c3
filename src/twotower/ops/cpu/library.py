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
from functools import cache
from pathlib import Path

from twotower import options
from twotower.ops import cpu_target
from twotower.ops.cpu_target import CPUTarget

HERE = Path(__file__).parent
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fPIC", "-shared")
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
        return _first_line(error)


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
    path = options.current().cache_dir / f"{target.name}-{key.hexdigest()[:16]}.so"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    processor = "this processor" if target is cpu_target.NATIVE else target.name
    print(f"compiling kernels for {processor}, once (about 20 s) → {path}", file=sys.stderr, flush=True)
    errors = ""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        for variant in attempts:
            command = [compiler, *FLAGS, *variant, str(HERE / "native.cpp"), "-o", str(made)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
            if done.returncode == 0:
                made.replace(path)  # atomic, because other processes may compile too
                return path
            errors = errors or next((line for line in done.stderr.splitlines() if "error" in line), "no error message")
    return f"{Path(compiler).name} could not compile the kernels: {errors}"


def _processor() -> str:
    """The processor facts that -march=native depends on: different machines may share a cache."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.platform() + platform.processor()
    return "\n".join(line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part")))[:8000]
