"""Finds near ties: results that change with weights that differ by about a rounding error."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch

from twotower import TwoTowerForCausalLM

SHARE = 1e-5  # relative change of a weight, a little more than the effect of fp32 rounding on an activation
Result = TypeVar("Result")


def perturbed(exact: TwoTowerForCausalLM, seed: int, share: float = SHARE) -> TwoTowerForCausalLM:
    """A copy of a float64 model with a random relative change of its weights."""
    other = copy.deepcopy(exact)
    rng = np.random.Generator(np.random.PCG64(seed))
    with torch.no_grad():
        for tensor in other.state_dict().values():
            tensor.mul_(torch.from_numpy(1 + share * rng.standard_normal(tuple(tensor.shape))))
    return other


def is_near_tie(exact: TwoTowerForCausalLM, run: Callable[[TwoTowerForCausalLM], Result], tries: int = 16) -> bool:
    """Whether `run` gives another result for one of `tries` perturbed copies of a float64 model."""
    expected = run(exact)
    return any(run(perturbed(exact, seed)) != expected for seed in range(tries))
