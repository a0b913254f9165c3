"""Activations of feed-forward layers."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from twotower.specs import Activation

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "relu2": lambda x: F.relu(x).square(),
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def activate(up: Tensor, gate: Tensor | None, activation: Activation) -> Tensor:
    """act(up), or act(gate) · up with a gate; all tensors have one shape."""
    act = ACTIVATIONS[activation]
    return act(up) if gate is None else act(gate) * up
