"""Kernels for processors: C++ sources beside this file, compiled on this machine when they are first wanted.

The compiler of the system is used (c++, g++ or clang++; CXX overrides), for exactly this processor, and the result is
kept in the user's cache. Where there is none, torch's own operations do the work. `TWOTOWER_NATIVE=0` forbids them.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fPIC", "-shared")
# The first set that compiles is taken: one thread is better than none.
VARIANTS = (("-march=native", "-fopenmp"), ("-mcpu=native", "-fopenmp"), ("-march=native",), ("-mcpu=native",), ())


@cache
def library() -> ctypes.CDLL | str:
    """The compiled kernels, or why there are none."""
    if os.environ.get("TWOTOWER_NATIVE") == "0":
        return "TWOTOWER_NATIVE=0"
    if sys.platform == "win32":
        return "not built on Windows"
    try:
        path = _compiled()
        return path if isinstance(path, str) else ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        return (str(error).splitlines() or [type(error).__name__])[0]


def _compiled() -> Path | str:
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX") or "c++", "g++", "clang++"))), None)
    if compiler is None:
        return "no C++ compiler found (c++, g++, clang++)"
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=30, check=True).stdout
    sources = b"".join(path.read_bytes() for path in [*sorted(HERE.glob("*.h")), HERE / "native.cpp"])
    key = hashlib.sha256(b"\0".join([sources, version.encode(), _processor().encode(), repr(VARIANTS).encode()]))
    cache_home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    target = Path(cache_home) / "twotower" / f"native-{key.hexdigest()[:16]}.so"
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
