"""RMS norm with the time modulation before it, after it, or without any."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from twotower.ops.precision import accumulation_dtype

Order = Literal["before", "after"]


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, modulation: tuple[Tensor, Tensor] | None = None, order: Order = "before"
) -> Tensor:
    """x (B, L, H), weight (H,), modulation: shift and scale (B, 1, H) → x·weight / rms(x) in weight's dtype, where
    v ↦ v·(1 + scale) + shift acts on x or on the result. Statistics and weight product in at least fp32."""
    if modulation is None:
        return _normed(x, weight, eps)
    shift, scale = modulation
    if order == "before":
        return _normed(x * (1 + scale) + shift, weight, eps)
    return _normed(x, weight, eps) * (1 + scale) + shift


def _normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    acc = accumulation_dtype(x.dtype)
    return F.rms_norm(x.to(acc), weight.shape, weight.to(acc), eps).to(weight.dtype)
