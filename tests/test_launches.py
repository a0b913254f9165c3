"""The launches of a pass on a GPU do not become more: `benchmarks/launches.py` at the published shape.

Counted without a GPU, see there. Lower a limit when its count falls; never raise one.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("launches are not counted: the package triton is not installed", allow_module_level=True)

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
# Launches of each category. AR step and commit are passes of the context tower, and so is a round of adapters.
LIMITS: dict[str, dict[str, dict[str, int]]] = {
    "grouped-gemm": {
        "AR step": {"settle": 25, "view": 4, "layers": 787, "append": 30, "head": 1, "choice": 2},
        "denoiser pass": {"view": 4, "time": 19, "layers": 839, "head": 1, "choice": 23},
        "commit": {"settle": 25, "view": 4, "layers": 787, "append": 31},
        "round": {"settle": 25, "view": 4, "layers": 1049, "append": 31, "head": 1, "choice": 21},
    },
    "triton": {
        "AR step": {"settle": 25, "view": 4, "layers": 465, "append": 30, "head": 1, "choice": 2},
        "denoiser pass": {"view": 4, "time": 19, "layers": 517, "head": 1, "choice": 23},
        "commit": {"settle": 25, "view": 4, "layers": 465, "append": 31},
        "round": {"settle": 25, "view": 4, "layers": 727, "append": 31, "head": 1, "choice": 21},
    },
}
ONE_GRAPH = 6  # launches of an AR step with the option graph_steps
COPIES = {"AR step": 6, "denoiser pass": 7, "commit": 6, "round": 8}  # tensors that a CUDA graph of the pass copies


@pytest.mark.parametrize("experts", sorted(LIMITS))
def test_launches(experts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = set(sys.modules)
    import launches

    found = launches.measure(launches.PUBLISHED, rows=1, context=1024, experts=experts)
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(BENCHMARKS)):
            del sys.modules[name]
    for name, limits in LIMITS[experts].items():
        counted = {category: count for category, count in found[name]["launches"].items() if count}
        assert counted == limits, f"{name}: lower a limit when its count falls, and find out why it rises"
        assert found[name]["with CUDA graphs"]["layers"] == 1 + COPIES[name]
    assert found["AR step"]["as one graph"] == ONE_GRAPH
