"""`StateCaches`: the caches of all layers for some rows of a state, made only if someone reads them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import is_
from typing import Protocol, overload

import numpy as np
from torch import Tensor

from twotower.cache.kv_group import KVGroup
from twotower.cache.layer_cache import LayerCache, MambaCache, ParallelCache
from twotower.cache.pools import AttentionPool, MambaPool, Pool
from twotower.ops.reference.attention import CachedKV


class CachedState(Protocol):
    """The parts of a `TowerState` that a pass reads."""

    lengths: Tensor
    max_seq_len: int
    pools: list[Pool]
    attention_pools: list[tuple[int, AttentionPool]]
    mamba_pools: list[tuple[int, MambaPool]]
    kv_groups: list[KVGroup]
    addresses: PoolAddresses

    @property
    def context_width(self) -> int: ...


class StateCaches(Sequence[LayerCache]):
    """One cache a layer, for all rows of a state or the given slots (B,) of lengths (B,).

    layers: the numbers of the layers whose caches these are, for a denoiser that lacks layers; None: all.

    A runner that reads the pools of the state by address does not need the caches one by one: making and reading those
    of 30 layers takes longer than a small model's pass. Valid until the next `extend`.
    """

    def __init__(
        self, state: CachedState, rows: Tensor | None, lengths: Tensor, layers: Sequence[int] | None = None
    ) -> None:
        self.state, self.rows, self.lengths, self.layers = state, rows, lengths, layers
        self._at = state.lengths
        self._made: list[LayerCache] | None = None

    def pool_addresses(self, every: np.ndarray) -> np.ndarray:
        """The addresses of the pools of these layers, in the order of `PoolAddresses`. every: those of the state."""
        if self.layers is None:
            return every
        state = self.state
        own = [[layer for layer, _ in pools] for pools in (state.attention_pools, state.mamba_pools)]
        starts = 0, 2 * len(own[0])
        places = [
            start + 2 * there.index(layer) + part
            for start, there in zip(starts, own, strict=True)
            for layer in self.layers
            if layer in there
            for part in (0, 1)
        ]
        return every[places]

    def _caches(self) -> list[LayerCache]:
        if self._made is None:
            assert self.state.lengths is self._at, "a view was read after its state had changed"
            self._made = self._all()
        return self._made

    def _all(self) -> list[LayerCache]:
        past = caches_at(self.state, self.rows, self.lengths, self.state.context_width)
        return past if self.layers is None else [past[layer] for layer in self.layers]

    def __len__(self) -> int:
        return len(self.state.pools if self.layers is None else self.layers)

    def __iter__(self) -> Iterator[LayerCache]:
        return iter(self._caches())

    @overload
    def __getitem__(self, layer: int) -> LayerCache: ...
    @overload
    def __getitem__(self, layer: slice) -> list[LayerCache]: ...
    def __getitem__(self, layer: int | slice) -> LayerCache | list[LayerCache]:
        return self._caches()[layer]


def caches_at(state: CachedState, rows: Tensor | None, lengths: Tensor, width: int) -> list[LayerCache]:
    """One cache a layer, for all rows of a state or the given slots (B,) of lengths (B,). width: of the context."""
    past = list[LayerCache]([None] * len(state.pools))
    for group in state.kv_groups:
        for layer, cached in group.caches(rows, lengths, width):
            past[layer] = cached
    for layer, mamba in state.mamba_pools:
        keys, own = past[layer], MambaCache(mamba.conv_window, mamba.ssm_state, rows)
        past[layer] = ParallelCache(keys, own) if isinstance(keys, CachedKV) else own
    return past


def caches_of(past: Sequence[LayerCache], layers: Sequence[int] | None) -> Sequence[LayerCache]:
    """The caches of these layers, in this order, of those of all layers; None: of all."""
    if layers is None:
        return past
    if isinstance(past, StateCaches):
        return StateCaches(past.state, past.rows, past.lengths, layers)
    return [past[layer] for layer in layers]


class PoolAddresses:
    """The addresses of the pools of a state, which passes ask for again and again.

    pools: of each layer with attention, then of each Mamba layer.
    """

    def __init__(self, pools: Sequence[AttentionPool | MambaPool]) -> None:
        self._pools = pools
        self._tensors: list[Tensor] = []
        self._addresses = np.zeros(0, np.uintp)

    def current(self) -> np.ndarray:
        """The addresses of keys and values, then of windows and states. The same array while the tensors stay."""
        tensors = [
            part
            for own in self._pools
            for part in ((own.k, own.v) if isinstance(own, AttentionPool) else (own.conv_window, own.ssm_state))
        ]
        if len(tensors) != len(self._tensors) or not all(map(is_, tensors, self._tensors)):
            self._tensors = tensors
            self._addresses = np.array(list(map(Tensor.data_ptr, tensors)), np.uintp)
        return self._addresses
