"""Matrix product with an unpacked weight."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, packed: Tensor | None = None) -> Tensor:
    """x (…, in), weight (out, in), bias (out,) or None → (…, out). packed: the packed weight, ignored here."""
    return F.linear(x, weight, bias)
