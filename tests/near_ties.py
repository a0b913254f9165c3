"""Near ties, found from outside: weights that differ by a rounding's size decide otherwise."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch

from twotower import TwoTowerForCausalLM

SHARE = 1e-5  # of each weight's value: a little more than rounding in fp32 does to an activation
Result = TypeVar("Result")


def perturbed(exact: TwoTowerForCausalLM, seed: int, share: float = SHARE) -> TwoTowerForCausalLM:
    """A copy of a float64 model whose weights differ by that share, at random."""
    other = copy.deepcopy(exact)
    rng = np.random.Generator(np.random.PCG64(seed))
    with torch.no_grad():
        for tensor in other.state_dict().values():
            tensor.mul_(torch.from_numpy(1 + share * rng.standard_normal(tuple(tensor.shape))))
    return other


def is_near_tie(exact: TwoTowerForCausalLM, run: Callable[[TwoTowerForCausalLM], Result], tries: int = 16) -> bool:
    """Whether run, of a float64 model, gives another result with one of so many perturbed copies."""
    expected = run(exact)
    return any(run(perturbed(exact, seed)) != expected for seed in range(tries))
