"""Adapters in the C++ pass: the result of the layers one by one, and the prefix bit for bit as in a pass of AR."""

from __future__ import annotations

import pytest
import torch
from tiny_backbones import slow_but, two_tower
from torch import Tensor

from twotower import TwoTowerForCausalLM
from twotower.checkpoint.quantize import quantize_
from twotower.denoiser_fields import DenoiserConfig
from twotower.ops.cpu import library
from twotower.runners.fused_cpu import FusedCPURunner

pytestmark = pytest.mark.skipif(isinstance(library.library(), str), reason="needs the compiled kernels")
NAMES = slow_but(("nemotron_h", "gemma2", "qwen2_moe", "falcon_h1"))
MASK = 3
PROMPT, LENGTHS = torch.tensor([[5, 6, 7, 8, 9, 10, 11], [12, 13, 14, 15, 16, 17, 18]]), torch.tensor([7, 4])
BLOCK = torch.tensor([[20, 21, 22, MASK, MASK, MASK], [23, MASK, MASK, MASK, 0, 0]])
PREFIX, WIDTHS = torch.tensor([3, 1]), torch.tensor([6, 4])


@torch.no_grad()
def passes(model: TwoTowerForCausalLM) -> list[Tensor]:
    """Logits of a pass with masks, of the next pass, and of AR over the first pass's prefix."""
    state, plain = model.new_state(2, 40), model.new_state(2, 40)
    for own in (state, plain):
        model.prefill(PROMPT, LENGTHS, own)
    first = model.extend(BLOCK, state, WIDTHS, prefix=PREFIX)
    following = model.extend(torch.tensor([[30, 31], [32, 33]]), state)
    ar = model.extend(BLOCK[:, :3], plain, PREFIX)
    assert first is not None
    assert following is not None
    assert ar is not None
    return [first, following, ar]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("dtype", "plan", "packed"),
    [
        *(pytest.param("float32", plan, True, marks=pytest.mark.code_path) for plan in ("none", "int8")),
        ("bfloat16", "none", True),
        ("bfloat16", "int4", False),
    ],
)
def test_the_pass_is_that_of_the_layers(name: str, dtype: str, plan: str, packed: bool) -> None:
    model = two_tower(name, getattr(torch, dtype), rank=5)
    if plan != "none":
        quantize_(model, plan)
    if packed:
        model.pack()
    runner = next(own for own in model.context.runners if isinstance(own, FusedCPURunner))
    first, following, ar = passes(model)
    assert runner.prepared >= 3
    for row, count in enumerate(PREFIX.tolist()):
        assert torch.equal(first[row, :count], ar[row, :count])
    model.context.runners = ()
    expected = passes(model)
    tolerance = 3e-5 if dtype == "float32" else 0.25  # of logits up to 10
    for row, width in enumerate(WIDTHS.tolist()):
        torch.testing.assert_close(first[row, :width], expected[0][row, :width], rtol=0, atol=tolerance)
    torch.testing.assert_close(following, expected[1], rtol=0, atol=tolerance)


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_no_bit_and_packing_only_rounding(threads: int) -> None:
    """Packed and unpacked sums differ in their order."""
    model = two_tower("nemotron_h", torch.float32, rank=20)
    unpacked = passes(model)
    model.pack()
    before, one = torch.get_num_threads(), passes(model)
    try:
        torch.set_num_threads(threads)
        several = passes(model)
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, one, several))
    torch.testing.assert_close(one, unpacked, rtol=0, atol=3e-5)


def test_changed_adapters_are_read_again() -> None:
    model = two_tower("nemotron_h", torch.float32, rank=5)
    before = passes(model)[0]
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if path.endswith("adapter.b"):
                parameter.zero_()
    after = passes(model)[0]
    assert not torch.equal(before[0, 3:], after[0, 3:])
    assert torch.equal(before[0, :3], after[0, :3])


CHOICES = {
    "shift-prefix": DenoiserConfig(prediction_shift=1, block_attention="prefix_causal"),
    "everywhere": DenoiserConfig.with_adapters(5, "everywhere"),
}


@pytest.mark.parametrize("choice", CHOICES)
@torch.no_grad()
def test_blocks_of_other_denoisers_run_in_the_pass(choice: str) -> None:
    """A prefix-causal block with time conditioning, and adapters at every position: as the layers one by one."""
    model = two_tower("nemotron_h", torch.float32, denoiser=CHOICES[choice])
    tower = model.context if model.has_adapters else model.denoiser
    assert tower is not None
    runner = next(own for own in tower.runners if isinstance(own, FusedCPURunner))
    state = model.new_state(2, 40)
    model.prefill(PROMPT, LENGTHS, state)
    before = runner.prepared
    level = torch.tensor([0.6, 0.9])
    found = model.denoise(BLOCK, level, state.view(), lengths=WIDTHS)
    assert runner.prepared == before + 1
    tower.runners = ()
    expected = model.denoise(BLOCK, level, state.view(), lengths=WIDTHS)
    for row, width in enumerate(WIDTHS.tolist()):
        torch.testing.assert_close(found[row, :width], expected[row, :width], rtol=0, atol=3e-5)
