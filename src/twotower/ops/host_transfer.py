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


def placed(
    values: Sequence[object] | NDArray[np.generic], device: torch.device, dtype: torch.dtype | None = None
) -> Tensor:
    """A tensor of these numbers, in the order of the device's current stream."""
    if device.type != "cuda" or not len(values):
        return torch.tensor(values, dtype=dtype, device=device)
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


class Fetched:
    """Tensors of one device on their way to the host, which goes on meanwhile. On a CPU they are the tensors
    themselves, so nobody may write to them."""

    def __init__(self, *tensors: Tensor) -> None:
        device = tensors[0].device
        self._tensors = [tensor.to("cpu", non_blocking=device.type == "cuda") for tensor in tensors]
        self._there = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None

    def wait(self) -> list[Tensor]:
        """The tensors, once they are here; what the device was given after them is not waited for."""
        if self._there is not None:
            self._there.synchronize()
        return self._tensors

    def lists(self) -> list[list[Any]]:
        """The same as Python's lists."""
        return [tensor.tolist() for tensor in self.wait()]
