"""Helpers for the inputs of the self-check: random numbers that are equal on every device, and packed copies."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from twotower.ops.self_check import Case


def lengths_up_to(length: int, rows: int, device: torch.device) -> Tensor:
    """(rows,) lengths from `length` down to 0."""
    return torch.linspace(length, 0, rows, device=device).round().long()


class Randn:
    """Normal numbers from its own CPU generator: equal on every device; the global generator is not used."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.device = device

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device)


def make_case(name: str, arguments: Callable[..., tuple[object, ...]], *chosen: object) -> Case:
    return Case(name, partial(arguments, *chosen))


# A value beside a tie may become one integer in the kernel and its neighbour in the float64 reference.
INT8_TOLERANCE = 2e-2


def int8_activations(
    cases: Callable[[torch.device, torch.dtype], list[Case]],
) -> Callable[[torch.device, torch.dtype], list[Case]]:
    """The same cases for products that round their activations to int8."""
    return lambda device, dtype: [case._replace(tolerance=INT8_TOLERANCE) for case in cases(device, dtype)]


def packings_of(device: torch.device) -> tuple[bool, ...]:
    """Whether to try weights with a packed copy: only CPU kernels read packed weights."""
    return (False, True) if device.type == "cpu" else (False,)


def packed_copy(weight: Tensor, packed: bool) -> Tensor | None:
    if not packed:
        return None
    from twotower.ops.cpu import kernels

    return kernels.pack(weight)
