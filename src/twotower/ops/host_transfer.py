"""The host's numbers on a device, and a device's on the host, without the host waiting for the device's queue.

`torch.tensor(…, device="cuda")` and `.tolist()` both wait until the device has done everything it was given so far.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ALIGNMENT = 8  # bytes, of a tensor within a copy of several


def to_device_async(
    values: Sequence[object] | NDArray[np.generic], device: torch.device, dtype: torch.dtype | None = None
) -> Tensor:
    """A tensor of these numbers, in the order of the device's current stream."""
    if device.type != "cuda" or not len(values):
        return torch.tensor(values, dtype=dtype, device=device)
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


class AsyncHostCopy:
    """Tensors of one device on their way to the host, which goes on meanwhile: in one copy from an accelerator. On a
    CPU they are the tensors themselves, so nobody may write to them."""

    def __init__(self, *tensors: Tensor) -> None:
        device = tensors[0].device
        self._there = None
        if device.type == "cuda":
            self._layout = [(tensor.shape, tensor.dtype) for tensor in tensors]
            self._bytes = as_bytes(tensors).to("cpu", non_blocking=True)
            self._there = torch.cuda.current_stream(device).record_event()
        else:
            self._tensors = list(tensors)

    def wait(self) -> list[Tensor]:
        """The tensors, once they are here; what the device was given after them is not waited for."""
        if self._there is not None:
            self._there.synchronize()
            self._tensors = from_bytes(self._bytes, self._layout)
            self._there = None
        return self._tensors

    def tolist(self) -> list[list[Any]]:
        """The same as Python's lists."""
        return [tensor.tolist() for tensor in self.wait()]


def as_bytes(tensors: Sequence[Tensor]) -> Tensor:
    """The tensors' values one after another (n,) uint8; each begins at a multiple of 8."""
    parts = []
    for tensor in tensors:
        flat = tensor.contiguous().flatten().view(torch.uint8)
        parts += [flat, flat.new_zeros(-len(flat) % ALIGNMENT)]
    return torch.cat(parts)


def from_bytes(flat: Tensor, layout: Sequence[tuple[torch.Size, torch.dtype]]) -> list[Tensor]:
    """The tensors of these shapes and dtypes that `as_bytes` was given: views of `flat`."""
    tensors, at = [], 0
    for shape, dtype in layout:
        size = shape.numel() * dtype.itemsize
        tensors.append(flat[at : at + size].view(dtype).view(shape))
        at += size + -size % ALIGNMENT
    return tensors
