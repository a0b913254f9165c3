"""Every Triton kernel compiles for an H100, as its wrapper launches it; needs no GPU."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import triton_mode

if importlib.util.find_spec("triton") is None:
    pytest.skip("the Triton kernels are not tested: the package triton is not installed", allow_module_level=True)

KERNELS = {
    "activation._activate_kernel", "argmax._argmax_kernel", "attention._attention_kernel", "attention._combine_kernel",
    "experts._combine_kernel", "experts._expert_kernel", "experts._group_kernel", "linear._linear_kernel",
    "linear._reduce_splits_kernel", "mamba_block._block_kernel", "norm._norm_kernel", "rope._heads_kernel",
    "routing._logits_kernel", "routing._topk_kernel", "state_update._state_update_kernel",
}  # fmt: skip


@pytest.mark.parametrize("form", ["short", pytest.param("full", marks=pytest.mark.slow)])
def test_the_kernels_compile_for_a_gpu(form: str, tmp_path: Path) -> None:
    assert triton_mode.compiled(form, cache_dir=tmp_path) == KERNELS
