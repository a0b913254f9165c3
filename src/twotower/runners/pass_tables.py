"""Sizes and addresses for the C++ pass of a tower (ops/cpu/tower.h), prepared once a shape.

Each pass fills in the addresses that change: the modulation, the caches that the layers read, and the cache updates.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from types import NoneType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from twotower.cache.layer_cache import CacheUpdate, KeyValue, MambaCache
from twotower.model.tower import PassInputs
from twotower.ops.reference.attention import CachedKV
from twotower.ops.reference.mamba_block import MambaStepInputs, empty_step_inputs
from twotower.specs import AttentionSpec, Mamba2Spec, MLPSpec, TowerSpec

PLACES_PER_LAYER = 12  # INPUTS in tower.h
MODULATION, PAST, ADDED = (0, 3), (3, 5), 5  # shift, scale, gate; two tensors of the cache; the update
ORDER_STRIDE = 4  # index in `sizes` of the stride of the modulation
SUPPORTED_CACHES = {CachedKV, MambaCache, NoneType}  # not KeyValue, which only training uses


NO_MAMBA = Mamba2Spec(num_heads=0, head_dim=0, state_size=0, num_groups=0, conv_kernel=0)
NO_ATTENTION = AttentionSpec(num_heads=0, num_kv_heads=0, head_dim=0)


class PassShape(NamedTuple):
    """The cache key of pass tables. past: the type of each layer's cache. has_context: whether it holds tokens."""

    rows: int
    length: int
    dtype: torch.dtype
    past: tuple[type, ...]
    has_context: bool
    modulated: bool
    keep_step_inputs: bool


def shape_of(inputs: PassInputs, dtype: torch.dtype) -> PassShape:
    """The shape of a pass of a tower in `dtype`."""
    past = inputs.past or ()
    cached = cached_context(inputs)
    has_context = cached is not None and cached.max_length > 0
    kinds = tuple(map(type, past))
    rows, length = inputs.tokens.shape
    return PassShape(rows, length, dtype, kinds, has_context, inputs.modulation is not None, inputs.keep_step_inputs)


def cached_context(inputs: PassInputs) -> CachedKV | None:
    """The KV cache of the first attention layer; all layers have the same layout. None if there is none."""
    cached = [past for past in inputs.past or () if isinstance(past, CachedKV)]
    assert all(past.start is cached[0].start for past in cached), "layers with different windows"
    return cached[0] if cached else None


class PassTables:
    """The tables of one shape. Only one pass may use them at a time."""

    def __init__(self, spec: TowerSpec, shape: PassShape, residual: torch.dtype) -> None:
        self._layers = spec.num_layers
        pattern = spec.pattern
        mamba_spec, attention_spec = spec.mamba or NO_MAMBA, spec.attention or NO_ATTENTION
        reads = {MambaCache: True, CachedKV: shape.has_context}
        self._past = [i for i, kind in enumerate(shape.past) if reads.get(kind, False)]
        mamba = [i for i, kind in enumerate(pattern) if kind == "M" and shape.keep_step_inputs]
        attention = [i for i, kind in enumerate(pattern) if kind == "*"]
        inputs = torch.empty(len(mamba), shape.rows, shape.length, mamba_spec.conv_dim, dtype=shape.dtype)
        heads = mamba_spec.num_heads, mamba_spec.head_dim, mamba_spec.num_groups, mamba_spec.state_size
        keys = shape.rows, shape.length, attention_spec.num_kv_heads, attention_spec.head_dim
        self._step_inputs = UpdateBuffers(mamba, empty_step_inputs(inputs, *heads))
        self._keys = UpdateBuffers(attention, [torch.empty(len(attention), *keys, dtype=shape.dtype)] * 2)
        self._inputs = np.zeros(len(pattern) * PLACES_PER_LAYER, np.uintp)
        self._modulation_places = _places(range(len(pattern)), *MODULATION)
        self._past_places = _places(self._past, *PAST)
        self._sizes = np.array([
            shape.rows, shape.length, spec.hidden_size, len(pattern), 0, residual != shape.dtype,
            *heads, mamba_spec.conv_kernel,
            attention_spec.num_heads, attention_spec.num_kv_heads, attention_spec.head_dim,
            *_feed_forward_sizes(spec),
        ], np.int64)  # fmt: skip
        self.inputs, self.sizes = self._inputs.ctypes.data, self._sizes.ctypes.data
        factor = 1.0 if spec.moe is None else spec.moe.factor
        self.constants = *mamba_spec.time_step_limit, spec.norm_eps, factor

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
            self._sizes[ORDER_STRIDE] = stride[0]
            self._inputs[self._modulation_places] = _addresses(kept)
        if self._past and inputs.past is not None:
            past = [part.contiguous() for i in self._past for part in _pair(inputs.past[i])]
            self._inputs[self._past_places] = _addresses(past)
            kept += past
        return kept

    def updates(self, like: Tensor) -> list[CacheUpdate]:
        """Allocates the cache updates of all layers on the device of `like`."""
        updates: list[CacheUpdate] = [None] * self._layers
        for i, parts in self._step_inputs.allocate(like, self._inputs):
            updates[i] = MambaStepInputs(*parts)
        for i, (k, v) in self._keys.allocate(like, self._inputs):
            updates[i] = KeyValue(k.transpose(1, 2), v.transpose(1, 2))
        return updates


class UpdateBuffers:
    """The cache updates of all layers of one kind: one tensor (layers, …) for each part of an update.

    One allocation serves all layers, because allocating small tensors is slow. like: a tensor with the shape and dtype
    of each part.
    """

    def __init__(self, layers: list[int], like: Sequence[Tensor]) -> None:
        self._layers = layers
        self._parts = [(part.shape, part.dtype) for part in like]
        steps = np.array([part.stride(0) * part.element_size() for part in like], np.uintp)
        self._offsets = np.arange(len(layers), dtype=np.uintp)[:, None] * steps
        self._places = _places(layers, ADDED, ADDED + len(like)).reshape(self._offsets.shape)

    def allocate(self, like: Tensor, table: np.ndarray) -> Iterable[tuple[int, tuple[Tensor, ...]]]:
        """Allocates memory and writes its addresses into the table → each layer with its parts."""
        if not self._layers:
            return ()
        parts = [like.new_empty(size, dtype=dtype) for size, dtype in self._parts]
        table[self._places] = self._offsets + _addresses(parts)
        return zip(self._layers, zip(*map(Tensor.unbind, parts), strict=True), strict=True)


def _feed_forward_sizes(spec: TowerSpec) -> tuple[int, ...]:
    """The sizes of MoE layers, then the width of plain MLPs; 0 where the tower has no such layer."""
    mlp = next((layer.mixer.width for layer in spec.layers if isinstance(layer.mixer, MLPSpec)), 0)
    moe = spec.moe
    if moe is None:
        return 0, 0, 0, 0, 0, 0, 0, mlp
    shared = 0 if moe.shared is None else moe.shared.width
    groups = moe.experts, moe.num_groups, moe.top_groups, moe.top_k
    return *groups, moe.expert.width, shared, int(moe.normalise), mlp


def _places(layers: Iterable[int], first: int, end: int) -> np.ndarray:
    return np.array([i * PLACES_PER_LAYER + place for i in layers for place in range(first, end)], np.intp)


def _addresses(tensors: Sequence[Tensor]) -> np.ndarray:
    return np.array([tensor.data_ptr() for tensor in tensors], np.uintp)


def _pair(past: object) -> tuple[Tensor, Tensor]:
    """The two tensors of a layer's cache: keys and values, or convolution window and SSM state."""
    assert isinstance(past, CachedKV | MambaCache)
    return past[0], past[1]
