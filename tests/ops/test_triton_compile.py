"""Every Triton kernel compiles for an H100, as its wrapper launches it; needs no GPU."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

import pytest
import triton_mode
from benchmark_parts import BENCHMARKS

if importlib.util.find_spec("triton") is None:
    pytest.skip("the Triton kernels are not tested: the package triton is not installed", allow_module_level=True)

KERNELS = {
    "activation._activate_kernel", "argmax._argmax_kernel", "attention._attention_kernel", "attention._combine_kernel",
    "draft_sweep._draft_kernel", "experts._combine_kernel", "experts._expert_kernel", "experts._group_kernel",
    "linear._linear_kernel", "linear._reduce_splits_kernel", "low_rank._expand_kernel", "low_rank._reduce_kernel",
    "mamba_block._block_kernel", "mamba_block._norm_kernel", "norm._norm_kernel", "rope._heads_kernel",
    "routing._logits_kernel", "routing._topk_kernel", "state_update._state_update_kernel",
}  # fmt: skip


@pytest.mark.parametrize("form", ["short", pytest.param("full", marks=pytest.mark.slow)])
def test_the_kernels_compile_for_a_gpu(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert triton_mode.compiled(form, cache_dir=tmp_path) == KERNELS
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    found = importlib.import_module("gpu_parts.compiled").resources(tmp_path)  # the table of benchmarks/gpu.py
    assert {one["kernel"] for one in found} == {name.rpartition(".")[2] for name in KERNELS}
    assert all(0 < one["registers"] <= 255 and one["local"] >= 0 and one["variants"] > 0 for one in found)
