"""Time conditioning caches its results by t, on a CPU and without gradients."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from conftest import build_random_model

from twotower.model import conditioning
from twotower.model.conditioning import TimeConditioning


@pytest.fixture
def time() -> TimeConditioning:
    time = build_random_model("M*E", dtype=torch.float64).time
    assert time is not None
    return time


def parts(time: TimeConditioning, t: torch.Tensor) -> torch.Tensor:
    return torch.stack([part for modulation in time(t) for part in modulation])


def test_what_is_remembered_is_what_would_be_formed(time: TimeConditioning) -> None:
    t = torch.tensor([0.5, 1.0, 0.25, 0.5]).double()
    formed = parts(time, t)  # with gradients nothing is cached
    assert formed.requires_grad
    assert not time._cached
    with torch.no_grad():
        for again in range(2):
            assert torch.allclose(parts(time, t), formed, rtol=1e-12, atol=1e-12), again
        with patch.object(TimeConditioning, "_parts", side_effect=AssertionError("formed again")):
            assert torch.allclose(parts(time, t[1:3]), formed[:, 1:3], rtol=1e-12, atol=1e-12)
        assert len(time._cached) == 3
        assert parts(time, t.float()).shape == formed.shape  # another dtype, another entry
        assert len(time._cached) == 6


@torch.no_grad()
def test_changed_weights_are_noticed(time: TimeConditioning) -> None:
    t = torch.tensor([0.5]).double()
    before = parts(time, t)
    time.scale_shift_tables[0].add_(1.0)  # in place, as an optimizer does
    changed = parts(time, t)
    assert torch.allclose(changed[:3], before[:3] + 1)
    assert torch.equal(changed[3:], before[3:])
    time.float()
    assert parts(time, t)[0].dtype == torch.float32


@torch.no_grad()
def test_few_are_kept(time: TimeConditioning) -> None:
    for step in range(200):
        time(torch.tensor([step / 200]).double())
        assert len(time._cached) <= conditioning.MAX_CACHED_TIMES + 1
