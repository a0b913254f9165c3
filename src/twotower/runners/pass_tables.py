"""Sizes and addresses for the C++ pass of a tower (ops/cpu/layers.h), prepared once a shape.

Each pass fills in the addresses that change: the modulation, the caches that the layers read, and the cache updates.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from types import NoneType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from twotower.cache.layer_cache import CacheUpdate, KeyValue, LayerCache, MambaCache, ParallelCache, ParallelUpdate
from twotower.model.tower import PassInputs
from twotower.ops.precision import accumulation_dtype
from twotower.ops.reference.attention import CachedKV
from twotower.ops.reference.mamba_block import MambaStepInputs, empty_step_inputs
from twotower.runners.layer_options import RotationTable, layer_options, pass_options
from twotower.specs import TowerSpec

PLACES_PER_LAYER = 17  # INPUTS in layers.h
# Places of a layer (`InputPlace`): shift, scale, gate; keys, values, start, stride, lengths of the cache; new keys and
# values; window and state; step inputs.
MODULATION, PAST_KEYS, NEW_KEYS, PAST_STATE, STEP_INPUTS = (
    range(3),
    range(3, 8),
    range(8, 10),
    range(10, 12),
    range(12, 17),
)
# Not KeyValue, which only training uses.
SUPPORTED_CACHES = {(CachedKV, NoneType), (NoneType, MambaCache), (CachedKV, MambaCache), (NoneType, NoneType)}


class PassShape(NamedTuple):
    """The cache key of pass tables.

    past: the types of each layer's KV cache and Mamba cache; None's type for a cache that is absent or has no tokens.
    """

    rows: int
    length: int
    dtype: torch.dtype
    past: tuple[tuple[type, type], ...]
    modulated: bool
    keep_step_inputs: bool


def shape_of(inputs: PassInputs, dtype: torch.dtype) -> PassShape:
    """The shape of a pass of a tower in `dtype`."""
    kinds = tuple(map(_cache_types, inputs.past or ()))
    rows, length = inputs.tokens.shape
    return PassShape(rows, length, dtype, kinds, inputs.modulation is not None, inputs.keep_step_inputs)


def _cache_types(cache: LayerCache) -> tuple[type, type]:
    keys, state = cache if isinstance(cache, ParallelCache) else (cache, None)
    if isinstance(keys, MambaCache):
        keys, state = None, keys
    return NoneType if isinstance(keys, CachedKV) and not keys.max_length else type(keys), type(state)


class PassTables:
    """The tables of one shape. Only one pass may use them at a time."""

    def __init__(self, spec: TowerSpec, shape: PassShape) -> None:
        self._spec, pattern = spec, spec.pattern
        self._keys = [i for i, (keys, _) in enumerate(shape.past) if keys is CachedKV]
        self._states = [i for i, (_, state) in enumerate(shape.past) if state is MambaCache]
        self._inputs = np.zeros(len(pattern) * PLACES_PER_LAYER, np.uintp)
        self._modulation_places = _places(range(len(pattern)), MODULATION)
        self._past_places = np.concatenate([_places(self._keys, PAST_KEYS), _places(self._states, PAST_STATE)])
        self._new_keys = UpdateBuffers(
            [i for i, kind in enumerate(pattern) if kind in "*P"], NEW_KEYS, _keys(spec, shape)
        )
        stepped = [i for i, kind in enumerate(pattern) if kind in "MP" and shape.keep_step_inputs]
        self._step_inputs = UpdateBuffers(stepped, STEP_INPUTS, _steps(spec, shape))
        self._options = layer_options(spec)
        wide = spec.residual_in_fp32 and accumulation_dtype(shape.dtype) != shape.dtype
        self._pass = pass_options(spec, shape.rows, shape.length, wide)
        self._ropes = (RotationTable * max(len(spec.ropes), 1))()
        self.inputs, self.ropes = self._inputs.ctypes.data, ctypes.addressof(self._ropes)
        self.layer_options, self.pass_options = ctypes.addressof(self._options), ctypes.addressof(self._pass)

    def fill(self, inputs: PassInputs) -> list[Tensor] | None:
        """Fills in the input addresses → the tensors at these addresses, which must live until the pass has run.

        Returns None if the C++ pass does not support the memory layout of the modulation.
        """
        kept: list[Tensor] = []
        if inputs.modulation is not None:
            kept += chain.from_iterable(inputs.modulation)
            strides = set(map(Tensor.stride, kept))
            stride = strides.pop()
            if strides or stride[-1] != 1:
                return None
            self._pass.modulation_stride = stride[0]
            self._inputs[self._modulation_places] = _addresses(kept)
        if inputs.past is not None:
            past = [*self._cached(inputs.past)]
            self._inputs[self._past_places] = _addresses(past)
            kept += past
        meta = inputs.meta.with_rotations(self._spec.ropes, inputs.tokens, torch.float32)
        for table, turn in zip(self._ropes, meta.rotations, strict=False):
            table.cos, table.sin, table.pairs = turn.cos.data_ptr(), turn.sin.data_ptr(), turn.cos.shape[-1]
            table.interleaved = turn.interleaved
            kept += turn.cos, turn.sin
        return kept

    def _cached(self, past: list[LayerCache]) -> Iterator[Tensor]:
        """The tensors of all caches with tokens, in the order of their places."""
        for i in self._keys:
            own = past[i]
            keys = own.attention if isinstance(own, ParallelCache) else own
            assert isinstance(keys, CachedKV)
            yield from keys[:5]
        for i in self._states:
            own = past[i]
            state = own.mamba if isinstance(own, ParallelCache) else own
            assert isinstance(state, MambaCache)
            yield from map(Tensor.contiguous, state)

    def updates(self, like: Tensor) -> list[CacheUpdate]:
        """Allocates the cache updates of all layers on the device of `like`."""
        updates: list[CacheUpdate] = [None] * self._spec.num_layers
        steps = {i: MambaStepInputs(*parts) for i, parts in self._step_inputs.allocate(like, self._inputs)}
        for i, own in steps.items():
            updates[i] = own
        for i, parts in self._new_keys.allocate(like, self._inputs, transposed=True):
            keys = KeyValue(*parts)
            updates[i] = ParallelUpdate(keys, steps.get(i)) if self._spec.layers[i].kind == "P" else keys
        return updates


class UpdateBuffers:
    """The cache updates of all layers of one kind: one tensor (layers, …) for each part of an update.

    One allocation serves all layers, because allocating small tensors is slow. places: of the parts. like: a tensor
    with the shape and dtype of each part of one layer.
    """

    def __init__(self, layers: list[int], places: range, like: Sequence[Tensor]) -> None:
        self._layers = layers
        self._parts = [((len(layers), *part.shape), part.dtype) for part in like]
        steps = np.array([part.nbytes for part in like], np.uintp)
        self._offsets = np.arange(len(layers), dtype=np.uintp)[:, None] * steps
        self._places = _places(layers, places).reshape(self._offsets.shape)

    def allocate(
        self, like: Tensor, table: np.ndarray, transposed: bool = False
    ) -> Iterable[tuple[int, tuple[Tensor, ...]]]:
        """Allocates memory and writes its addresses into the table → each layer with its parts.

        transposed: the parts (B, L, H, D) as views (B, H, L, D).
        """
        if not self._layers:
            return ()
        parts = [like.new_empty(size, dtype=dtype) for size, dtype in self._parts]
        table[self._places] = self._offsets + _addresses(parts)
        if transposed:
            parts = [part.transpose(2, 3) for part in parts]  # all layers at once: a view of each would cost as much
        return zip(self._layers, zip(*map(Tensor.unbind, parts), strict=True), strict=True)


def _keys(spec: TowerSpec, shape: PassShape) -> list[Tensor]:
    """The shapes of the new keys and values of an attention layer; none without attention."""
    if spec.attention is None:
        return []
    size = shape.rows, shape.length, spec.attention.num_kv_heads, spec.attention.head_dim
    return [torch.empty(size, dtype=shape.dtype, device="meta")] * 2


def _steps(spec: TowerSpec, shape: PassShape) -> Sequence[Tensor]:
    """The shapes of the step inputs of a Mamba layer; none without such layers."""
    if spec.mamba is None:
        return []
    own = spec.mamba
    inputs = torch.empty(shape.rows, shape.length, own.conv_dim, dtype=shape.dtype, device="meta")
    return empty_step_inputs(inputs, own.num_heads, own.head_dim, own.num_groups, own.state_size)


def _places(layers: Iterable[int], places: range) -> np.ndarray:
    return np.array([i * PLACES_PER_LAYER + place for i in layers for place in places], np.intp)


def _addresses(tensors: Sequence[Tensor]) -> np.ndarray:
    return np.array([tensor.data_ptr() for tensor in tensors], np.uintp)
