"""A second copy of a model's large weights, in the order that products on a processor read fastest.

It serves inference: a weight that training or loading changes afterwards goes back to being read as it lies, until it
is packed again. What is saved, moved or sharded is always the weight itself.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from twotower import options
from twotower.model.linear import Linear
from twotower.model.moe import Experts
from twotower.ops.cpu import kernels, packed_weights

SPARE_SHARE = 0.5  # of the memory that is free: as much may the copies take where nobody asked for them


def matrices(model: nn.Module) -> Iterator[Tensor]:
    """The weights of products that a copy speeds up."""
    for module in model.modules():
        if isinstance(module, Linear):
            yield module.weight
        elif isinstance(module, Experts):
            yield from (module.up_proj, module.down_proj)


def refusal(model: nn.Module, device: torch.device | None = None, dtype: torch.dtype | None = None) -> str | None:
    """Why copies are not made unasked, or None. device, dtype: as if the weights were there and such."""
    if not options.current().pack:
        return "TWOTOWER_PACK=0"
    needed = 0
    for weight in matrices(model):
        kind = dtype or weight.dtype
        if kernels.refusal(device or weight.device, kind) is None:
            needed += packed_weights.size(weight) * kind.itemsize
    if not needed:
        return "no compiled kernels read them"
    free = available_memory()
    if free is None or needed > SPARE_SHARE * free:
        room = "nobody knows how much" if free is None else f"{free / 2**30:.1f} GiB"
        return f"the copy takes {needed / 2**30:.1f} GiB and {room} is free"
    return None


def pack(model: nn.Module) -> int:
    """Copies every weight that compiled kernels read → bytes of all copies."""
    packed = [weight for weight in matrices(model) if kernels.pack(weight)]
    return sum(packed_weights.size(weight) * weight.element_size() for weight in packed)


def unpack(model: nn.Module) -> None:
    """Gives the copies' memory back."""
    for weight in matrices(model):
        packed_weights.forget(weight)


def available_memory() -> int | None:
    """Bytes that can be had without swapping; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None
