"""Sizes and addresses for the C++ pass of a tower (ops/cpu/layers.h), prepared once a shape.

Each pass fills in the addresses that change: the modulation, the caches that the layers read, and the cache updates.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from twotower.cache.layer_cache import STORED, CacheUpdate, KeyValue, ParallelUpdate
from twotower.cache.state_caches import StateCaches
from twotower.model.tower import PassInputs
from twotower.ops.precision import accumulation_dtype
from twotower.ops.reference.mamba_block import MambaStepInputs, empty_step_inputs
from twotower.runners.layer_options import RotationTable, layer_options, pass_options
from twotower.runners.rotation_tables import RotationTables
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
PAST_POOLS, PAST_LAYOUT = PAST_KEYS[:2], PAST_KEYS[2:]


class PassShape(NamedTuple):
    """The cache key of pass tables.

    cached: whether the pass reads a state. stored: whether its updates are kept; appends: the pass stores keys and
    values itself.
    """

    rows: int
    length: int
    dtype: torch.dtype
    cached: bool
    modulated: bool
    stored: bool
    appends: bool


def shape_of(inputs: PassInputs, dtype: torch.dtype) -> PassShape:
    """The shape of a pass of a tower in `dtype`."""
    rows, length = inputs.tokens.shape
    cached, stored = inputs.past is not None, inputs.keep_step_inputs
    appends = cached and stored and inputs.appended is not None
    return PassShape(rows, length, dtype, cached, inputs.modulation is not None, stored, appends)


class PassTables:
    """The tables of one shape. Only one pass may use them at a time."""

    def __init__(self, spec: TowerSpec, shape: PassShape) -> None:
        self._spec, pattern = spec, spec.pattern
        self._attention, mamba = ([i for i, kind in enumerate(pattern) if kind in kinds] for kinds in ("*P", "MP"))
        self._inputs = np.zeros(len(pattern) * PLACES_PER_LAYER, np.uintp)
        self._modulation_places = _places(range(len(pattern)), MODULATION)
        self._pool_places = np.concatenate([_places(self._attention, PAST_POOLS), _places(mamba, PAST_STATE)])
        self._pools: np.ndarray | None = None  # the addresses in the state from which these places are filled
        windows: dict[int | None, list[int]] = {spec.window_of(i): [] for i in self._attention}
        for i in self._attention:
            windows[spec.window_of(i)].append(i)
        self._layout_places = {
            window: _places(own, PAST_LAYOUT).reshape(len(own), -1) for window, own in windows.items()
        }
        self.appends = shape.appends
        kept = self._attention if shape.stored and not shape.appends else []
        self._new_keys = UpdateBuffers(kept, NEW_KEYS, _keys(spec, shape))
        self._step_inputs = UpdateBuffers(mamba if shape.stored else [], STEP_INPUTS, _steps(spec, shape))
        self._options = layer_options(spec)
        wide = spec.residual_in_fp32 and accumulation_dtype(shape.dtype) != shape.dtype
        self._pass = pass_options(spec, shape.rows, shape.length, wide)
        self._ropes = (RotationTable * max(len(spec.ropes), 1))()
        self.inputs, self.ropes = self._inputs.ctypes.data, ctypes.addressof(self._ropes)
        self.layer_options, self.pass_options = ctypes.addressof(self._options), ctypes.addressof(self._pass)

    def round_activations(self, to_int8: bool) -> None:
        """Whether products of quantised weights round their activations to int8; before the first pass they do not."""
        self._pass.int8_activations = to_int8

    def fill(self, inputs: PassInputs, rotations: RotationTables) -> list[Tensor] | None:
        """Fills in the input addresses → the tensors at these addresses, which must live until the pass has run.

        Returns None if the C++ pass does not support the caches or the memory layout of the modulation.
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
        if isinstance(inputs.past, StateCaches):
            kept += self._fill_from_state(inputs.past)
        elif inputs.past is not None:
            return None
        return kept + self._fill_rotations(inputs, rotations) if self._spec.ropes else kept

    def modulate_from(self, modulation: Tensor) -> None:
        """Makes the pass read its modulation from a contiguous tensor (B, 3·layers, H)."""
        self._pass.modulation_stride = modulation.stride(0)
        steps = np.arange(modulation.shape[1], dtype=np.uintp) * (modulation.shape[2] * modulation.itemsize)
        self._inputs[self._modulation_places] = steps + modulation.data_ptr()

    def _fill_rotations(self, inputs: PassInputs, rotations: RotationTables) -> list[Tensor]:
        """Fills in the rotations, if possible from the tables of all positions → tensors as of `fill`."""
        past, meta, start = inputs.past, inputs.meta, 0
        turns = None
        if isinstance(past, StateCaches) and meta.start is past.lengths:
            start, turns = past.lengths.data_ptr(), rotations.up_to(past.state.max_seq_len + inputs.tokens.shape[1])
        if turns is None:
            start, turns = 0, meta.with_rotations(self._spec.ropes, inputs.tokens, torch.float32).rotations
        for table, turn in zip(self._ropes, turns, strict=True):
            table.cos, table.sin, table.pairs = turn.cos.data_ptr(), turn.sin.data_ptr(), turn.cos.shape[-1]
            table.start, table.length, table.interleaved = start, inputs.tokens.shape[1], turn.interleaved
        return [part for turn in turns for part in (turn.cos, turn.sin)]

    def _fill_from_state(self, past: StateCaches) -> list[Tensor]:
        """Fills in the addresses of a state's pools, and where its rows lie in them → tensors as of `fill`."""
        pools = past.state.addresses.current()
        if pools is not self._pools:
            self._pools = pools
            self._inputs[self._pool_places] = past.pool_addresses(pools)
        kept: list[Tensor] = []
        for group in past.state.kv_groups:
            for window, layout in group.layouts(past.rows, past.lengths).items():
                if window in self._layout_places:  # a denoiser that lacks layers may have none with this window
                    self._inputs[self._layout_places[window]] = _addresses(layout)
                    kept += layout
        return kept

    def updates(self, like: Tensor) -> list[CacheUpdate]:
        """Allocates the cache updates of all layers on the device of `like`."""
        updates: list[CacheUpdate] = [None] * self._spec.num_layers
        steps = {i: MambaStepInputs(*parts) for i, parts in self._step_inputs.allocate(like, self._inputs)}
        for i, own in steps.items():
            updates[i] = own
        keys = dict.fromkeys(self._attention if self.appends else (), STORED)
        for i, parts in self._new_keys.allocate(like, self._inputs, transposed=True):
            keys[i] = KeyValue(*parts)
        for i, new in keys.items():
            updates[i] = ParallelUpdate(new, steps.get(i)) if self._spec.layers[i].kind == "P" else new
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
