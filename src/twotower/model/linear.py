"""The one seam for dense weights: every projection of a tower is made here.

Packed, quantised or sharded weights replace `Linear` in this place; names on disk stay the released ones.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from twotower.ops.cpu.packed_weights import PackedWeight
from twotower.ops.reference import int8
from twotower.ops.registry import select


class Linear(nn.Linear):
    """y = x·Wᵀ + b, weight (out, in). packed: a second copy of the weight, neither saved nor copied."""

    __call__: Callable[..., Tensor]

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias)
        self.packed = PackedWeight()

    def forward(self, input: Tensor) -> Tensor:
        backend = select("linear", input.device, input.dtype)
        out: Tensor = backend.function(input, self.weight, self.bias, self.packed.get(self.weight))
        return out

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Linear:
        super()._apply(fn, recurse)
        self.packed.get(self.weight)  # releases the copy of a weight that has just changed or moved
        return self


class Int8Linear(nn.Module):
    """A `Linear` whose weight (out / 16, in, 16) is int8 with a scale (out,) for each row: see `kernels.int8`."""

    weight: Tensor
    weight_scale: Tensor

    def __init__(self, linear: Linear) -> None:
        super().__init__()
        weight, scale = int8.quantize(linear.weight)
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", scale)
        self.bias = linear.bias

    def forward(self, input: Tensor) -> Tensor:
        backend = select("linear_int8", input.device, input.dtype)
        out: Tensor = backend.function(input, self.weight, self.weight_scale, self.bias)
        return out
