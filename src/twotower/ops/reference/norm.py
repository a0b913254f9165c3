"""RMSNorm with the time modulation before the norm, after the norm, or without modulation."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from twotower.ops.precision import accumulation_dtype

Order = Literal["before", "after"]


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    modulation: tuple[Tensor, Tensor] | None = None,
    order: Order = "before",
    offset: float = 0.0,
) -> Tensor:
    """RMSNorm with optional modulation v ↦ v·(1 + scale) + shift → (B, L, H) in weight's dtype.

    x (B, L, H); weight (H,); modulation: shift and scale (B, 1, H), applied to x or to the norm's result, by
    `order`. offset: the norm multiplies by offset + weight. All but the modulation is computed in at least fp32.
    """
    if modulation is None:
        return _normed(x, weight, eps, offset)
    shift, scale = modulation
    if order == "before":
        return _normed(x * (1 + scale) + shift, weight, eps, offset)
    return _normed(x, weight, eps, offset) * (1 + scale) + shift


def _normed(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    acc = accumulation_dtype(x.dtype)
    return F.rms_norm(x.to(acc), weight.shape, weight.to(acc) + offset, eps).to(weight.dtype)
