"""The table of weight addresses that the C++ pass of a tower reads (ops/cpu/tower.h)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from operator import attrgetter, eq, is_
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from twotower.model.tower import Layer, Tower
from twotower.ops.cpu.packed_weights import PackedWeight
from twotower.runners.module_plan import ModulePlan
from twotower.runners.packed_weights import packable_weights

KINDS = {"M": 0, "*": 1, "E": 2, "-": 3}
PLACES_PER_LAYER = 12  # WEIGHTS in tower.h
# The order of the weights of a mixer, after the layer's norm. A name with ! is fp32 in a model of any dtype.
WEIGHT_ORDER = {
    "M": (
        "in_proj.weight",
        "in_proj.bias",
        "conv1d.weight",
        "conv1d.bias",
        "dt_bias!",
        "A_log!",
        "D!",
        "norm.weight",
        "out_proj.weight",
        "out_proj.bias",
    ),
    "*": tuple(f"{name}_proj.{part}" for name in "qkvo" for part in ("weight", "bias")),
    "E": (
        "gate.weight",
        "gate.e_score_correction_bias!",
        "experts.up_proj",
        "experts.down_proj",
        "shared_experts.up_proj.weight",
        "shared_experts.up_proj.bias",
        "shared_experts.down_proj.weight",
        "shared_experts.down_proj.bias",
    ),
    "-": ("up_proj.weight", "up_proj.bias", "down_proj.weight", "down_proj.bias"),
}


_packed_data: Callable[[PackedWeight], Tensor | None] = attrgetter("data")
_version_of: Callable[[Tensor], int] = attrgetter("_version")


class WeightEntry(NamedTuple):
    """A weight of the C++ pass: its index in the table, and the dtype that it must have."""

    slot: int
    tensor: Tensor | None
    dtype: torch.dtype
    optional: bool = False
    packed: PackedWeight | None = None


class WeightTable:
    """The weight table of a tower; valid while `is_current` is True.

    fits: whether all weights have the dtypes and layouts that the C++ pass reads. all_packed: whether all packable
    weights are packed. addresses: of three tables: the weights, the packed weights, and the int8 scales.
    """

    def __init__(self, tower: Tower, plan: ModulePlan) -> None:
        self.dtype = tower.embeddings.weight.dtype
        self._weights = plan.weights()
        size = tower.spec.num_layers * PLACES_PER_LAYER
        entries = list(_entries(tower, size))
        self.fits = all(map(_fits, entries)) and tower.norm_f.weight.dtype == self.dtype
        self._table = np.zeros(3 * size, np.uintp)
        self._packed: list[Tensor] = []
        self._copies = [entry.packed for entry in entries if entry.packed is not None]
        for entry in entries:
            if entry.tensor is None:
                continue
            self._table[entry.slot] = entry.tensor.data_ptr()
            copy = None if entry.packed is None else entry.packed.get(entry.tensor)
            if copy is not None:
                self._table[entry.slot + size] = copy.data_ptr()
                self._packed.append(entry.tensor)
        self._versions = list(map(_version_of, self._packed))
        self._packed_data = list(map(_packed_data, self._copies))
        self.all_packed = all(copy is not None for copy in self._packed_data)
        self.norm_f = tower.norm_f.weight.data_ptr()
        self._kinds = np.array([KINDS[layer.kind] for layer in tower.all_layers()], np.int64)
        self.kinds = self._kinds.ctypes.data
        self.addresses = [self._table.ctypes.data + part * size * self._table.itemsize for part in range(3)]

    def is_current(self, plan: ModulePlan, dtype: torch.dtype) -> bool:
        """Whether all weights are the same tensors at the same addresses, and the packed weights are unchanged."""
        return (
            dtype == self.dtype
            and all(map(is_, map(_packed_data, self._copies), self._packed_data))
            and all(map(eq, map(_version_of, self._packed), self._versions))
            and plan.weights_unchanged(self._weights)
        )


def _fits(entry: WeightEntry) -> bool:
    if entry.tensor is None:
        return entry.optional
    return entry.tensor.dtype == entry.dtype and entry.tensor.is_contiguous()


def _entries(tower: Tower, size: int) -> Iterator[WeightEntry]:
    """All weights of the layers. size: the length of one of the three tables."""
    dtype = tower.embeddings.weight.dtype
    packed = {id(weight): copy for weight, copy in packable_weights(tower)}
    for i, layer in enumerate(tower.all_layers()):
        for place, name in enumerate(("norm.weight", *(f"mixer.{name}" for name in WEIGHT_ORDER[layer.kind]))):
            module, leaf = _holder(layer, name.rstrip("!"))
            slot, tensor = i * PLACES_PER_LAYER + place, getattr(module, leaf, None)
            scale = getattr(module, f"{leaf}_scale", None)
            if scale is not None:
                yield WeightEntry(slot + size, tensor, torch.int8)
                yield WeightEntry(slot + 2 * size, scale, torch.float32)
                continue
            wanted = torch.float32 if name.endswith("!") else dtype
            yield WeightEntry(slot, tensor, wanted, leaf == "bias", packed.get(id(tensor)))


def _holder(layer: Layer, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return layer.get_submodule(path), leaf
