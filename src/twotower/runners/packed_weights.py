"""Packs the large weights of a model for inference on a CPU: a second copy, in the order that products read fastest.

A weight that training or loading changes afterwards is read as it lies until it is packed again. What is saved, moved
or sharded is always the weight itself.
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
from twotower.ops.cpu import kernels
from twotower.ops.cpu.packed_weights import PackedWeight, packed_size

MAX_MEMORY_FRACTION = 0.5  # of the memory that is free: as much may the copies take where nobody asked for them


def packable_weights(model: nn.Module) -> Iterator[tuple[Tensor, PackedWeight]]:
    """The weights of products that a packed copy speeds up, and the place of each copy."""
    for module in model.modules():
        if isinstance(module, Linear):
            yield module.weight, module.packed
        elif isinstance(module, Experts):
            yield module.up_proj, module.packed_up
            yield module.down_proj, module.packed_down


def packing_unsupported_reason(
    model: nn.Module, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> str | None:
    """Why copies are not made unasked, or None. device, dtype: as if the weights were there and such."""
    if not options.current().pack:
        return "TWOTOWER_PACK=0"
    needed = 0
    for weight, _ in packable_weights(model):
        kind = dtype or weight.dtype
        if kernels.cpu_unsupported_reason(device or weight.device, kind) is None:
            needed += packed_size(weight) * kind.itemsize
    if not needed:
        return "no compiled kernels read them"
    free = available_memory()
    if free is None or needed > MAX_MEMORY_FRACTION * free:
        room = "nobody knows how much" if free is None else f"{free / 2**30:.1f} GiB"
        return f"the copy takes {needed / 2**30:.1f} GiB and {room} is free"
    return None


def pack_weights(model: nn.Module) -> int:
    """Copies every weight that compiled kernels read → bytes of all copies."""
    taken = 0
    for weight, packed in packable_weights(model):
        copy = packed.get(weight)
        if copy is None:
            copy = kernels.pack(weight)
            if copy is None:
                continue
            packed.store(weight, copy)
        taken += copy.nbytes
    return taken


def unpack_weights(model: nn.Module) -> None:
    """Gives the copies' memory back."""
    for _, packed in packable_weights(model):
        packed.release()


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
