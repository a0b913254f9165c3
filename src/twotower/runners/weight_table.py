"""The table of weight addresses that the C++ pass of a tower reads (ops/cpu/layers.h)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from operator import attrgetter, eq, is_
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from twotower.model.adapters import LowRank
from twotower.model.linear import Int4Linear
from twotower.model.moe import Int4Experts
from twotower.model.tower import Layer, Tower
from twotower.ops.cpu.kernels import Storage
from twotower.ops.cpu.packed_weights import PackedWeight
from twotower.runners.module_plan import ModulePlan
from twotower.runners.packed_weights import packable_weights
from twotower.specs import LayerKind

PLACES_PER_LAYER = 22  # WEIGHTS in layers.h


def _projections(*names: str) -> tuple[str, ...]:
    return tuple(f"{name}.{part}" for name in names for part in ("weight", "bias"))


ATTENTION = (*_projections("q_proj", "k_proj", "v_proj", "o_proj"), "q_norm.weight", "k_norm.weight")
MAMBA_VECTORS = ("dt_bias!", "A_log!", "D!", "norm.weight")
MAMBA = (*_projections("in_proj", "conv1d"), *MAMBA_VECTORS, *_projections("out_proj"))
MOE = (
    "gate.weight", "gate.e_score_correction_bias!", "experts.gate_proj", "experts.up_proj", "experts.down_proj",
    *(f"shared_experts.{name}" for name in _projections("gate_proj", "up_proj", "down_proj")),
    "shared_expert_gate.weight", *_projections("fc1_latent_proj", "fc2_latent_proj"),
)  # fmt: skip
# For each kind the first place of the weights of its mixer, and their order (`WeightPlace` in layers.h). A name with !
# is fp32 in a model of any dtype. A weight that the layer lacks has no entry.
WEIGHT_PLACES: dict[LayerKind, tuple[int, tuple[str, ...]]] = {
    "*": (2, ATTENTION),
    "M": (12, MAMBA),
    "E": (2, MOE),
    "-": (2, _projections("gate_proj", "up_proj", "down_proj")),
    "P": (2, (*(f"attention.{name}" for name in ATTENTION), *(f"mamba.{name}" for name in MAMBA))),
}
OPTIONAL = ("bias", "e_score_correction_bias")  # None in a module that has no bias


_packed_data: Callable[[PackedWeight], Tensor | None] = attrgetter("data")
_version_of: Callable[[Tensor], int] = attrgetter("_version")


class WeightEntry(NamedTuple):
    """A weight of the C++ pass: its index in the table, and the dtype that it must have. adapter: of the weight."""

    slot: int
    tensor: Tensor | None
    dtype: torch.dtype
    optional: bool = False
    packed: PackedWeight | None = None
    adapter: LowRank | None = None


class WeightTable:
    """The weight table of a tower; valid while `is_current` is True.

    fits: whether all weights have the dtypes and layouts that the C++ pass reads. all_packed: whether all packable
    weights are packed. storage: of the weights of products. addresses: of three tables: the weights, the packed weights
    and the scales. adapters: of four tables, the matrices a and b of adapters, unpacked and packed (`AdapterTables` in
    layers.h); rank: of these, 0 without any.
    int8_activations: of all quantised weights.
    """

    def __init__(self, tower: Tower, plan: ModulePlan) -> None:
        self.dtype, self.int8_activations = tower.embeddings.weight.dtype, plan.int8_activations
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
        self._packed_data = list(map(_packed_data, self._copies))
        self.all_packed = all(copy is not None for copy in self._packed_data)
        self._adapters = np.zeros(4 * size, np.uintp)
        self.rank = 0
        for entry in entries:
            if entry.adapter is not None:
                self._add_adapter(entry.adapter, entry.slot % size, size)
        self._versions = list(map(_version_of, self._packed))
        quantized = plan.int8 or plan.int4
        self.storage: Storage = "rows" if not self.all_packed else "quantized" if quantized else "packed"
        self.norm_f = tower.norm_f.weight.data_ptr()
        self.addresses = [self._table.ctypes.data + part * size * self._table.itemsize for part in range(3)]
        self.adapters = [self._adapters.ctypes.data + part * size * self._adapters.itemsize for part in range(4)]

    def _add_adapter(self, adapter: LowRank, slot: int, size: int) -> None:
        """Fills in the addresses of the matrices of an adapter. size: the length of one table."""
        self.rank = adapter.a.shape[0]
        parts = (adapter.a, adapter.packed_a), (adapter.b, adapter.packed_b)
        for place, (matrix, packed) in zip((slot, slot + size), parts, strict=True):
            self.fits = self.fits and matrix.dtype == self.dtype and matrix.is_contiguous()
            self._adapters[place] = matrix.data_ptr()
            copy = packed.get(matrix)
            self._copies.append(packed)
            self._packed_data.append(copy)
            if copy is not None:
                self._adapters[place + 2 * size] = copy.data_ptr()
                self._packed.append(matrix)

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
        for place, name in _names(layer.kind):
            module, leaf = _holder(layer, name.rstrip("!"))
            if not hasattr(module, leaf):
                continue
            slot, tensor = i * PLACES_PER_LAYER + place, getattr(module, leaf)
            adapter = getattr(module, "adapter", None) if leaf == "weight" else None
            if isinstance(module, Int4Linear | Int4Experts) and leaf in module.shapes:
                yield WeightEntry(slot + size, tensor, torch.uint8, adapter=adapter)
                yield WeightEntry(slot + 2 * size, tensor, torch.uint8)  # int4 has its scales in the data
                continue
            scale = getattr(module, f"{leaf}_scale", None)
            if scale is not None:
                yield WeightEntry(slot + size, tensor, torch.int8, adapter=adapter)
                yield WeightEntry(slot + 2 * size, scale, torch.float32)
                continue
            wanted = torch.float32 if name.endswith("!") else dtype
            yield WeightEntry(slot, tensor, wanted, leaf in OPTIONAL, packed.get(id(tensor)), adapter)


def _names(kind: LayerKind) -> Iterator[tuple[int, str]]:
    """The places and names of all weights that a layer of this kind may have."""
    yield 0, "norm.weight"
    yield 1, "post_norm.weight"
    first, names = WEIGHT_PLACES[kind]
    for place, name in enumerate(names, first):
        yield place, f"mixer.{name}"


def _holder(layer: Layer, name: str) -> tuple[nn.Module | None, str]:
    """The module that holds a weight, None if the layer has no such module; and the weight's name in the module."""
    *path, leaf = name.split(".")
    module: nn.Module | None = layer
    for part in path:
        module = getattr(module, part, None)
    return module, leaf
