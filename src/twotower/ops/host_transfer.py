"""Copies between host and device that do not wait for the device's queue.

`torch.tensor(…, device="cuda")` and `.tolist()` wait until the device has finished all work submitted so far.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ALIGNMENT = 8  # bytes


def to_device_async(
    values: Sequence[object] | NDArray[np.generic], device: torch.device, dtype: torch.dtype | None = None
) -> Tensor:
    """A tensor of these values on the device, ordered in the device's current stream."""
    if device.type != "cuda" or not len(values):
        return torch.tensor(values, dtype=dtype, device=device)
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device, ordered in the device's current stream. The tensor itself if it is there already."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class AsyncHostCopy:
    """Starts a copy of tensors from one device to the host, in a single transfer, without waiting for it.

    On a CPU there is no copy: the tensors themselves are returned, so the caller must not write to them.
    """

    def __init__(self, *tensors: Tensor) -> None:
        device = tensors[0].device
        self._event = None
        if device.type == "cuda":
            self._layout = [(tensor.shape, tensor.dtype) for tensor in tensors]
            self._bytes = as_bytes(tensors).to("cpu", non_blocking=True)
            self._event = torch.cuda.current_stream(device).record_event()
        else:
            self._tensors = list(tensors)

    def wait(self) -> list[Tensor]:
        """The tensors on the host. Waits for the copy, not for work submitted to the device later."""
        if self._event is not None:
            self._event.synchronize()
            self._tensors = from_bytes(self._bytes, self._layout)
            self._event = None
        return self._tensors

    def tolist(self) -> list[list[Any]]:
        """The tensors as Python lists. Waits like `wait`."""
        return [tensor.tolist() for tensor in self.wait()]


def as_bytes(tensors: Sequence[Tensor]) -> Tensor:
    """The tensors' bytes concatenated, (n,) uint8; each tensor starts at a multiple of 8."""
    parts = []
    for tensor in tensors:
        flat = tensor.contiguous().flatten().view(torch.uint8)
        parts += [flat, flat.new_zeros(-len(flat) % ALIGNMENT)]
    return torch.cat(parts)


def from_bytes(flat: Tensor, layout: Sequence[tuple[torch.Size, torch.dtype]]) -> list[Tensor]:
    """The inverse of `as_bytes`: tensors of these shapes and dtypes, as views of `flat`."""
    tensors, at = [], 0
    for shape, dtype in layout:
        size = shape.numel() * dtype.itemsize
        tensors.append(flat[at : at + size].view(dtype).view(shape))
        at += size + -size % ALIGNMENT
    return tensors
