"""RMS norms; statistics and weight product in at least fp32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twotower.kernels.precision import accumulation_dtype


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last dimension."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        acc = accumulation_dtype(x.dtype)
        out = F.rms_norm(x.to(acc), self.weight.shape, self.weight.to(acc), self.eps)
        return out.to(self.weight.dtype)


class GatedGroupRMSNorm(nn.Module):
    """Mamba's output norm: gate first, then RMSNorm within each of `groups` groups (spec §6)."""

    def __init__(self, width: int, groups: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.groups = groups
        self.eps = eps

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        """y, z (..., width) → (..., width) in z's dtype."""
        acc = accumulation_dtype(z.dtype)
        gated = (y.to(acc) * F.silu(z.to(acc))).unflatten(-1, (self.groups, z.shape[-1] // self.groups))
        normed = F.rms_norm(gated, gated.shape[-1:], eps=self.eps).flatten(-2)
        return (normed * self.weight.to(acc)).to(z.dtype)
