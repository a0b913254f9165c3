"""Kernels for processors: C++ sources beside this file, compiled on this machine when they are first wanted.

The compiler of the system is used (c++, g++ or clang++; CXX overrides), for exactly this processor, and the result is
kept in the user's cache. Where there is none, torch's own operations do the work. The option `native` forbids them.
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
from twotower.options import Options

HERE = Path(__file__).parent
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fPIC", "-shared")
# The first set that compiles is taken: one thread is better than none.
VARIANTS = (("-march=native", "-fopenmp"), ("-mcpu=native", "-fopenmp"), ("-march=native",), ("-mcpu=native",), ())


def library() -> ctypes.CDLL | str:
    """The kernels compiled as the options say, or why there are none."""
    return _library(options.current().kernels_key)


@cache
def _library(options_key: str) -> ctypes.CDLL | str:
    """options_key: `Options.kernels_key` of the options in force."""
    chosen = options.current()
    if not chosen.native:
        return "TWOTOWER_NATIVE=0"
    if sys.platform == "win32":
        return "not built on Windows"
    try:
        path = _compiled(chosen)
        return path if isinstance(path, str) else ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        return (str(error).splitlines() or [type(error).__name__])[0]


def _compiled(chosen: Options) -> Path | str:
    compiler = next(filter(None, map(shutil.which, (chosen.cxx or "c++", "g++", "clang++"))), None)
    if compiler is None:
        return "no C++ compiler found (c++, g++, clang++)"
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=30, check=True).stdout
    sources = b"".join(path.read_bytes() for path in [*sorted(HERE.glob("*.h")), HERE / "native.cpp"])
    key = hashlib.sha256(b"\0".join([sources, version.encode(), _processor().encode(), repr(VARIANTS).encode()]))
    target = chosen.cache_dir / f"native-{key.hexdigest()[:16]}.so"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    print(f"compiling kernels for this processor, once (about 20 s) → {target}", file=sys.stderr, flush=True)
    errors = ""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / target.name
        for variant in VARIANTS:
            command = [compiler, *FLAGS, *variant, str(HERE / "native.cpp"), "-o", str(made)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
            if done.returncode == 0:
                made.replace(target)  # atomic: another process may be at the same
                return target
            errors = errors or next((line for line in done.stderr.splitlines() if "error" in line), "it failed")
    return f"{Path(compiler).name} could not compile them: {errors}"


def _processor() -> str:
    """What -march=native depends on: a cache may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.platform() + platform.processor()
    return "\n".join(line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part")))[:8000]
