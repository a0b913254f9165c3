"""The one seam for dense weights: every projection of a tower is made here.

Packed, quantised or sharded weights replace `Linear` in this place; names on disk stay the released ones.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from twotower.kernels import select
from twotower.kernels.native import panels


class Linear(nn.Linear):
    """y = x·Wᵀ + b, weight (out, in)."""

    def forward(self, input: Tensor) -> Tensor:
        return select("linear", input.device, input.dtype).function(input, self.weight, self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Linear:
        super()._apply(fn, recurse)
        panels.of(self.weight)  # a copy of what has just changed or moved is forgotten
        return self
