"""RMS norms. Statistics and the product with the weight are computed in at least fp32."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from twotower.ops.reference.norm import Order
from twotower.ops.registry import select


class RMSNorm(nn.Module):
    """x / rms(x) · (offset + weight) over the last dimension."""

    __call__: Callable[..., Tensor]

    def __init__(self, width: int, eps: float, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((width,), 1.0 - offset))
        self.eps, self.offset = eps, offset

    def forward(self, x: Tensor, modulation: tuple[Tensor, Tensor] | None = None, order: Order = "before") -> Tensor:
        """x (B, L, H) → the norm in the weight's dtype; modulation and order as in `ops.reference.norm.rms_norm`."""
        backend = select("rms_norm", x.device, self.weight.dtype)
        normed: Tensor = backend.function(x, self.weight, self.eps, modulation, order, self.offset)
        return normed


class GatedGroupRMSNorm(nn.Module):
    """Holds the weight of the output norm of Mamba-2, which `ops.reference.mamba_block` computes.

    RMSNorm within each group, before or after the gate is applied.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
