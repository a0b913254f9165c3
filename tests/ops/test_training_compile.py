"""Parts of Mamba-2 layers compiled with `torch.compile`, against the same functions in plain torch."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from packed import deviation
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from twotower import options
from twotower.ops.compiled import maybe_compiled
from twotower.ops.reference.mamba_block import MambaWeights, scan_blocks, split

HEADS, WIDTH, GROUPS, STATE, TAPS, BLOCK = 4, 3, 2, 5, 3, 4
INNER, CHANNELS = HEADS * WIDTH, HEADS * WIDTH + 2 * GROUPS * STATE
TENSORS = ("conv_weight", "conv_bias", "dt_bias", "A_log", "D", "norm_weight")


def weights() -> MambaWeights:
    torch.manual_seed(0)
    shapes = ((CHANNELS, 1, TAPS), (CHANNELS,), (HEADS,), (HEADS,), (HEADS,), (INNER,))
    tensors = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    return MambaWeights(*tensors, GROUPS, WIDTH, 1e-5, (0.0, math.inf))


def results(of: Callable[..., tuple[Tensor, ...]], scan: Callable[..., tuple[Tensor, ...]], rows: int) -> list[Tensor]:
    """Results and gradients of packed rows of six blocks; padding, and documents that begin within the rows."""
    own = weights()
    projected = torch.randn(rows, 6 * BLOCK, INNER + CHANNELS + HEADS, dtype=torch.float64, requires_grad=True)
    window = torch.randn(rows * 6, TAPS - 1, CHANNELS, dtype=torch.float64)
    parts = of(projected, torch.rand(rows, 6 * BLOCK) > 0.1, own)
    mixed, before = scan(*parts, window, torch.rand(rows, 6) > 0.7, own)
    loss = (mixed * mixed.detach().cos()).sum() + before.sin().sum()
    leaves = [projected, *(getattr(own, name) for name in TENSORS)]
    return [mixed, before, *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_parts_equal_plain_torch(backend: str) -> None:
    """Values and gradients in float64; the second number of rows makes the shapes dynamic."""
    compiled = torch.compile(split, backend=backend), torch.compile(scan_blocks, backend=backend)
    for rows in (2, 3, 5) if backend == "inductor" else (2,):
        for found, wanted in zip(results(*compiled, rows), results(split, scan_blocks, rows), strict=True):
            assert deviation(found, wanted) < 1e-12


def test_functions_are_compiled_only_if_asked() -> None:
    """A dispatch mode counts operations, so it gets the function as it is."""
    assert maybe_compiled(split) is split
    with options.override(training_compile=True):
        assert maybe_compiled(split) is not split
        assert maybe_compiled(split) is maybe_compiled(split)
        with FlopCounterMode(display=False):
            assert maybe_compiled(split) is split
