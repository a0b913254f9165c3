"""Loads a module of `benchmarks/` by its path, without making that folder importable."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def load(path: str) -> ModuleType:
    """A new module from a file of `benchmarks/`, such as `common/operation_counts.py`."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, BENCHMARKS / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
