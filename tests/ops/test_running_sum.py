"""The running sum that deterministic training on CUDA takes instead of `cumsum`."""

from __future__ import annotations

import os

import pytest
import torch
from packed import ROWS, case, deviation, objective
from torch import Tensor

from twotower.ops.reference import delta_rule, ssd
from twotower.ops.reference.running_sum import running_sum, running_sum_by_product
from twotower.training.run_settings import RunSettings
from twotower.training.runs import set_determinism


@pytest.mark.parametrize("dim", [1, -1])
def test_a_product_equals_the_running_sum(dim: int) -> None:
    torch.manual_seed(0)
    x = -torch.rand(2, 7, 5, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(2, 7, 5, dtype=torch.float64)
    both = running_sum(x, dim), running_sum_by_product(x, dim)
    gradients = [torch.autograd.grad((out * cotangent).sum(), x, retain_graph=True)[0] for out in both]
    for found, wanted in zip((both[1], gradients[1]), (both[0], gradients[0]), strict=True):
        assert deviation(found, wanted) < 1e-14


def test_a_restart_is_no_invalid_number() -> None:
    """−∞ is the decay of a document that begins: what remains after it is 0."""
    x = torch.tensor([[-0.5, -torch.inf, -0.25, -torch.inf]])
    assert torch.equal(running_sum_by_product(x, 1).exp(), x.cumsum(1).exp())


@pytest.mark.parametrize("backbone", [None, "qwen3_next"])
def test_training_is_the_same_with_products(backbone: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradients of both kinds of recurrent layers, with documents that begin in rows of many blocks."""
    rows = (*ROWS, ((270, "bos"), (9, "plain")))
    step = case("M*M", 4, rows=rows) if backbone is None else case(backbone=backbone, block_size=4, rows=rows)
    training = objective(step.model, train_context=True)

    def run() -> list[Tensor]:
        training.zero_grad()
        loss = training(step.batch, step.noise, 4)
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in training.parameters() if p.grad is not None)]

    wanted = run()
    for module in (ssd, delta_rule):
        monkeypatch.setattr(module, "running_sum", running_sum_by_product)
    for found, expected in zip(run(), wanted, strict=True):
        assert deviation(found, expected) < 1e-9


def test_a_deterministic_run_lets_cublas_be_deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    environment: dict[str, str] = {}
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda on: None)
    set_determinism(RunSettings(data=("x",), deterministic=True))
    assert environment == {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
