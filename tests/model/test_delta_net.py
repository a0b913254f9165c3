"""Gated DeltaNet layers in fp32 and bf16, with and without C++ kernels, against float64. Equality: tests/engine."""

from __future__ import annotations

import copy
from typing import Literal

import pytest
import torch
from test_native import only_torch
from tiny_backbones import VOCAB, two_tower
from torch import Tensor

from twotower import TwoTowerForCausalLM
from twotower.model.delta_net import GatedDeltaNet
from twotower.model.fp32_tensors import keeps_fp32, named_tensors

pytestmark = pytest.mark.code_path


@torch.no_grad()
def passes(model: TwoTowerForCausalLM) -> list[Tensor]:
    """Logits of an extend, of a denoised block and of an extend after a rollback; and the states in the end."""
    tokens = torch.randint(4, VOCAB, (3, 90), generator=torch.Generator().manual_seed(0))
    state = model.new_state(3, 100)
    model.prefill(tokens[:, :70], torch.tensor([70, 1, 33]), state)
    logits = [model.extend(tokens[:, 70:87], state)]
    state.rollback(state.lengths - torch.tensor([0, 5, 16]))
    logits.append(model.denoise(tokens[:, :16], torch.full((3,), 0.5), model.reader(state).view()))
    logits.append(model.extend(tokens[:, 87:], state))
    state.commit_state()
    return [*(part for part in logits if part is not None), *(pool.ssm_state for _, pool in state.mamba_pools)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.5)])
@pytest.mark.parametrize("kernels", ["native", "torch"])
@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_5_text"])
def test_narrow_dtypes_are_near_float64(
    name: str,
    kernels: Literal["native", "torch"],
    dtype: torch.dtype,
    tolerance: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The states are in fp32. tolerance: of the deviation of the values, for weights that bf16 holds exactly."""
    model = two_tower(name, torch.float64).bfloat16().double()
    expected = passes(copy.deepcopy(model))
    if kernels == "torch":
        only_torch(monkeypatch)
    for actual, exact in zip(passes(model.to(dtype)), expected, strict=True):
        assert actual.dtype == torch.float32
        assert (actual - exact).abs().max() <= tolerance * exact.std()


def test_decay_rates_and_step_biases_stay_in_fp32() -> None:
    model = two_tower("qwen3_5_text").bfloat16()
    kept = {name.rpartition(".")[2] for name, tensor in named_tensors(model) if tensor.dtype == torch.float32}
    assert kept == {"A_log", "dt_bias"}
    assert all(keeps_fp32(name) for name in ("mixer.A_log", "mixer.dt_bias"))


@torch.no_grad()
def test_the_initialisation_is_that_of_qwen3_next() -> None:
    tower = two_tower("qwen3_next").context
    torch.manual_seed(0)
    tower.reset_parameters()
    mixers = [module for module in tower.modules() if isinstance(module, GatedDeltaNet)]
    assert len(mixers) == 2
    for mixer in mixers:
        rates = mixer.A_log.exp()
        assert torch.equal(mixer.dt_bias, torch.ones_like(mixer.dt_bias))
        assert float(rates.min()) >= 0.01
        assert float(rates.max()) <= 16
        assert len(rates.unique()) == len(rates)
        assert float(mixer.conv1d.weight.std()) > 0.1
