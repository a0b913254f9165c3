"""`quantize_` frees each old weight at once, also after passes whose runners have kept a list of the modules."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch
from conftest import build_random_model
from several_denoisers import joined, with_one_each
from torch import Tensor, nn

from twotower import GenerationParams, TwoTowerForCausalLM, generate
from twotower.checkpoint.quantize import large_weights, quantize_


def two_towers() -> TwoTowerForCausalLM:
    return build_random_model("ME*-", dtype=torch.float32)


def several() -> TwoTowerForCausalLM:
    return joined(with_one_each("qwen2", {"one": "masks", "other": "full"}, torch.float32))


def matrices_of(module: nn.Module) -> list[Tensor]:
    """The weights without biases, which quantised modules keep."""
    return [part for part in module.parameters(recurse=False) if part.ndim > 1]


@pytest.mark.parametrize("make", [two_towers, several])
@pytest.mark.parametrize("plan", ["int8", "int4"])
def test_old_weights_are_freed(make: Callable[[], TwoTowerForCausalLM], plan: str) -> None:
    model = make()
    for mode in ("ar", "diffusion", "verified"):
        own = {"draft_steps": 1} if mode == "verified" else {}
        generate(model, [[5, 6, 7]], GenerationParams.of(mode=mode, max_new_tokens=4, block_size=2, **own))
    old = [weakref.ref(module) for _, module in large_weights(model)]
    matrices = [weakref.ref(part) for _, module in large_weights(model) for part in matrices_of(module)]
    assert len(old) > 10
    quantize_(model, plan)
    assert not [one for one in old if one() is not None]
    assert not [one for one in matrices if one() is not None]
