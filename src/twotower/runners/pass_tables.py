"""Sizes and addresses of a compiled pass (ops/cpu/tower.h), prepared once for a tower and a shape of pass.

A pass fills in the addresses that change: its modulation, the past that its layers read, and what they add.
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
from twotower.config import BackboneConfig
from twotower.model.tower import PassInputs
from twotower.ops.reference.attention import CachedKV
from twotower.ops.reference.mamba_block import MambaStepInputs, empty_step_inputs

PLACES_PER_LAYER = 12  # INPUTS in tower.h
MODULATION, PAST, ADDED = (0, 3), (3, 5), 5  # shift, scale, gate; two tensors of the past; what the pass adds
ORDER_STRIDE = 4  # the place in `sizes` of the modulation's stride
SUPPORTED_CACHES = {CachedKV, MambaCache, NoneType}  # not KeyValue: whole sequences, as in training


class PassShape(NamedTuple):
    """What the tables of a pass depend on beside the tower. past: of each layer, the kind of past that it reads."""

    rows: int
    length: int
    dtype: torch.dtype
    past: tuple[type, ...]
    has_context: bool  # keys and values of at least one token
    modulated: bool
    trace: bool


def shape_of(inputs: PassInputs, dtype: torch.dtype) -> PassShape:
    """The shape of a pass of a tower in `dtype`."""
    past = inputs.past or ()
    cached = cached_context(inputs)
    has_context = cached is not None and cached.max_length > 0
    kinds = tuple(map(type, past))
    rows, length = inputs.tokens.shape
    return PassShape(rows, length, dtype, kinds, has_context, inputs.modulation is not None, inputs.trace)


def cached_context(inputs: PassInputs) -> CachedKV | None:
    """Where keys and values lie; the same in all attention layers."""
    return next((past for past in inputs.past or () if isinstance(past, CachedKV)), None)


class PassTables:
    """The tables of one shape. Only one pass at a time may use them."""

    def __init__(self, config: BackboneConfig, shape: PassShape, residual: torch.dtype) -> None:
        self._layers = config.num_layers
        pattern = config.hybrid_override_pattern
        reads = {MambaCache: True, CachedKV: shape.has_context}
        self._past = [i for i, kind in enumerate(shape.past) if reads.get(kind, False)]
        mamba = [i for i, kind in enumerate(pattern) if kind == "M" and shape.trace]
        attention = [i for i, kind in enumerate(pattern) if kind == "*"]
        inputs = torch.empty(len(mamba), shape.rows, shape.length, config.conv_dim, dtype=shape.dtype)
        heads = config.mamba_num_heads, config.mamba_head_dim, config.n_groups, config.ssm_state_size
        keys = shape.rows, shape.length, config.num_key_value_heads, config.head_dim
        self._step_inputs = UpdateBuffers(mamba, empty_step_inputs(inputs, *heads))
        self._keys = UpdateBuffers(attention, [torch.empty(len(attention), *keys, dtype=shape.dtype)] * 2)
        self._inputs = np.zeros(len(pattern) * PLACES_PER_LAYER, np.uintp)
        self._modulation_places = _places(range(len(pattern)), *MODULATION)
        self._past_places = _places(self._past, *PAST)
        self._sizes = np.array([
            shape.rows, shape.length, config.hidden_size, len(pattern), 0, residual != shape.dtype,
            config.mamba_num_heads, config.mamba_head_dim, config.n_groups, config.ssm_state_size, config.conv_kernel,
            config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.n_routed_experts,
            config.n_group, config.topk_group, config.num_experts_per_tok, config.moe_intermediate_size,
            config.moe_shared_expert_intermediate_size, config.norm_topk_prob, config.intermediate_size,
        ], np.int64)  # fmt: skip
        self.inputs, self.sizes = self._inputs.ctypes.data, self._sizes.ctypes.data
        self.constants = *config.time_step_limit, config.layer_norm_epsilon, config.routed_scaling_factor

    def fill(self, inputs: PassInputs) -> list[Tensor] | None:
        """Fills in what the pass reads → the tensors behind the addresses, which must live until the pass has run; None
        where the modulation is not laid out as the compiled pass reads it."""
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
        """Memory for what the layers add, beside the tensor `like`."""
        added: list[CacheUpdate] = [None] * self._layers
        for i, parts in self._step_inputs.allocate(like, self._inputs):
            added[i] = MambaStepInputs(*parts)
        for i, (k, v) in self._keys.allocate(like, self._inputs):
            added[i] = KeyValue(k.transpose(1, 2), v.transpose(1, 2))
        return added


class UpdateBuffers:
    """What the layers of one kind add: one tensor (layers, …) for each part, since a small tensor takes longer to make
    than to fill. like: a tensor of each part's shape and dtype."""

    def __init__(self, layers: list[int], like: Sequence[Tensor]) -> None:
        self._layers = layers
        self._parts = [(part.shape, part.dtype) for part in like]
        steps = np.array([part.stride(0) * part.element_size() for part in like], np.uintp)
        self._offsets = np.arange(len(layers), dtype=np.uintp)[:, None] * steps
        self._places = _places(layers, ADDED, ADDED + len(like)).reshape(self._offsets.shape)

    def allocate(self, like: Tensor, table: np.ndarray) -> Iterable[tuple[int, tuple[Tensor, ...]]]:
        """New memory, entered in the table → each layer with its parts."""
        if not self._layers:
            return ()
        parts = [like.new_empty(size, dtype=dtype) for size, dtype in self._parts]
        table[self._places] = self._offsets + _addresses(parts)
        return zip(self._layers, zip(*map(Tensor.unbind, parts), strict=True), strict=True)


def _places(layers: Iterable[int], first: int, end: int) -> np.ndarray:
    return np.array([i * PLACES_PER_LAYER + place for i in layers for place in range(first, end)], np.intp)


def _addresses(tensors: Sequence[Tensor]) -> np.ndarray:
    return np.array([tensor.data_ptr() for tensor in tensors], np.uintp)


def _pair(past: object) -> tuple[Tensor, Tensor]:
    """The two tensors that a layer reads: keys and values, or window and state."""
    assert isinstance(past, CachedKV | MambaCache)
    return past[0], past[1]
