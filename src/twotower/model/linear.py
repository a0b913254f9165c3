"""Linear layers: every dense projection of a tower is a `Linear`, an `Int8Linear` or an `Int4Linear`.

Code that packs, quantises or shards weights finds them by these classes. The tensor names on disk do not change.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from twotower.model.adapters import LowRank, adapted, adapters_act
from twotower.ops.cpu.packed_weights import PackedWeight
from twotower.ops.reference import int4, int8
from twotower.ops.registry import select


class Linear(nn.Linear):
    """y = x·Wᵀ + b, weight (out, in). packed: the packed copy of the weight; it is not saved, and copies lack it.

    adapter: see `model.adapters`. A pass with adapt=False leaves its update to `linears`.
    """

    __call__: Callable[..., Tensor]

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias)
        self.packed = PackedWeight()
        self.adapter: LowRank | None = None

    def forward(self, input: Tensor, adapt: bool = True) -> Tensor:
        backend = select("linear", input.device, input.dtype)
        out: Tensor = backend.function(input, self.weight, self.bias, self.packed.get(self.weight))
        return adapted([out], input, [self.adapter])[0] if adapt else out

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Linear:
        super()._apply(fn, recurse)
        self.packed.get(self.weight)  # drops the packed copy of a weight that has changed or moved
        return self


class TiedHead(nn.Module):
    """The head of a tower whose head is its embedding: logits = x·Wᵀ. The weight belongs to the embedding alone."""

    __call__: Callable[..., Tensor]
    bias = adapter = None

    def __init__(self, embeddings: nn.Embedding) -> None:
        super().__init__()
        self._embeddings = (embeddings,)  # a tuple: not a submodule, so that the weight has one name
        self.packed = PackedWeight()

    @property
    def weight(self) -> Tensor:
        return self._embeddings[0].weight

    def forward(self, input: Tensor) -> Tensor:
        backend = select("linear", input.device, input.dtype)
        out: Tensor = backend.function(input, self.weight, None, self.packed.get(self.weight))
        return out


Head = Linear | TiedHead


class Int8Linear(nn.Module):
    """A `Linear` with an int8 weight (out / 16, in, 16) and a scale (out,) per row; see `ops.reference.int8`.

    int8_activations: whether products round tokens to int8 too; see `ops.reference.integer`.
    """

    weight: Tensor
    weight_scale: Tensor

    def __init__(self, linear: Head, int8_activations: bool = False) -> None:
        super().__init__()
        self.int8_activations = int8_activations
        weight, scale = int8.quantize(linear.weight)
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", scale)
        self.bias, self.adapter = linear.bias, linear.adapter

    def forward(self, input: Tensor, adapt: bool = True) -> Tensor:
        backend = select("linear_w8a8" if self.int8_activations else "linear_int8", input.device, input.dtype)
        out: Tensor = backend.function(input, self.weight, self.weight_scale, self.bias)
        return adapted([out], input, [self.adapter])[0] if adapt else out


class Int4Linear(nn.Module):
    """A `Linear` with an int4 weight; see `ops.reference.int4`. shapes: (out, in) of the weight that it stands for.

    int8_activations: as in `Int8Linear`.
    """

    weight: Tensor

    def __init__(self, linear: Head, int8_activations: bool = False) -> None:
        super().__init__()
        self.int8_activations = int8_activations
        self.shapes = {"weight": tuple(linear.weight.shape)}
        self.register_buffer("weight", int4.quantize(linear.weight))
        self.bias, self.adapter = linear.bias, linear.adapter

    def forward(self, input: Tensor, adapt: bool = True) -> Tensor:
        backend = select("linear_w4a8" if self.int8_activations else "linear_int4", input.device, input.dtype)
        out: Tensor = backend.function(input, self.weight, self.shapes["weight"][0], self.bias)
        return adapted([out], input, [self.adapter])[0] if adapt else out


def linears(x: Tensor, *layers: Linear) -> tuple[Tensor, ...]:
    """The outputs of layers that read the same x. The updates of their adapters are computed together."""
    if not adapters_act():
        return tuple(layer(x) for layer in layers)
    return adapted([layer(x, adapt=False) for layer in layers], x, [layer.adapter for layer in layers])
