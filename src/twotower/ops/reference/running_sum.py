"""Running sums of decays, also where torch must be deterministic on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

LEAST = -1e30  # stands for −∞ in a matrix product, where −∞ · 0 is no number; its exponential is 0 too


def running_sum(x: Tensor, dim: int) -> Tensor:
    """`x.cumsum(dim)`. With deterministic algorithms on CUDA, where torch refuses `cumsum`, a matrix product."""
    if x.is_cuda and torch.are_deterministic_algorithms_enabled():
        return running_sum_by_product(x, dim)
    return x.cumsum(dim)


def running_sum_by_product(x: Tensor, dim: int) -> Tensor:
    """The running sum as a product with a triangular matrix; sums with −∞ are at most LEAST."""
    last = x.clamp(min=LEAST).movedim(dim, -1)
    ones = torch.ones(last.shape[-1], last.shape[-1], dtype=x.dtype, device=x.device).triu()
    return (last @ ones).movedim(-1, dim)
