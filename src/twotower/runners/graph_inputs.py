"""The inputs of a pass that a CUDA graph replays: the shape that a graph is made for, and their static copies.

Pools of keys, values and Mamba states are read in place: their addresses are part of the shape. The other inputs are
copied to the static addresses of the graph; all layers' modulation is one tensor. Rows and context width are rounded up
to powers of two, so that there are few shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from twotower.cache.layer_cache import CacheUpdate, KeyValue, LayerCache, MambaCache, ParallelCache, ParallelUpdate
from twotower.model.conditioning import LayerModulations
from twotower.model.layer_io import AttentionMetadata
from twotower.model.tower import PassInputs
from twotower.ops.reference.attention import CachedKV
from twotower.ops.reference.mamba_block import MambaStepInputs

MIN_CONTEXT_WIDTH = 256  # tokens


def in_buckets(inputs: PassInputs) -> tuple[PassInputs, int]:
    """The inputs with a rounded context width, and the number of rows of their graph, of which the surplus is padding.

    Keys beyond a row's length are masked.
    """
    past = inputs.past
    if past is not None:
        past = [_change_caches(own, _bucket_width, lambda state: state) for own in past]
    rows, count = _bucket_rows(inputs), len(inputs.tokens)
    if rows == count:
        return inputs._replace(past=past), rows
    if past is not None and any(own.slots is None for own in _caches(past) if isinstance(own, MambaCache)):
        slots = torch.arange(count, device=inputs.tokens.device)  # surplus rows have no rows of the pools
        past = [_change_caches(own, lambda keys: keys, lambda state: state._replace(slots=slots)) for own in past]
    meta = inputs.meta
    if meta.token_mask is None:
        meta = replace(meta, token_mask=torch.ones_like(inputs.tokens, dtype=torch.bool))
    return inputs._replace(past=past, meta=meta), rows


def bucket(width: int) -> int:
    """The context width of a graph: a power of two."""
    return max(MIN_CONTEXT_WIDTH, 1 << (width - 1).bit_length())


def _bucket_width(cached: CachedKV) -> CachedKV:
    if not cached.max_length:
        return cached
    width = bucket(cached.max_length)
    return cached._replace(max_length=min(width, cached.uniform_stride) if cached.uniform_stride else width)


def _bucket_rows(inputs: PassInputs) -> int:
    """The rows of the graph: a power of two, or exact if keys and values are read as one contiguous view."""
    rows = len(inputs.tokens)
    even = any(isinstance(own, CachedKV) and own.uniform_stride for own in _caches(inputs.past))
    return rows if even else 1 << (rows - 1).bit_length()


def shape_key(inputs: PassInputs) -> Hashable:
    """The part of the cache key of a graph that follows from the shapes of the inputs, without the rows."""
    layers: list[Hashable] = []
    numbers = {key: i for i, key in enumerate(_layouts(inputs.past))}
    for own in _caches(inputs.past):
        if isinstance(own, CachedKV):
            pools = own.k.data_ptr(), own.v.data_ptr()
            layers.append((own.max_length, own.uniform_stride, *pools, numbers[_layout_key(own)]))
        else:
            layers.append((own.conv_window.data_ptr(), own.ssm_state.data_ptr(), own.slots is None))
    meta = inputs.meta
    kinds = (
        meta.token_mask is None,
        meta.causal,
        meta.start is None,
        meta.long is None,
        inputs.modulation is None,
        inputs.keep_step_inputs,
    )
    return inputs.tokens.shape[1], kinds, tuple(layers)


def _caches(past: Sequence[LayerCache] | None) -> Iterator[CachedKV | MambaCache]:
    """The caches of all layers, in order; those of a `ParallelCache` one by one."""
    for own in past or ():
        parts = own if isinstance(own, ParallelCache) else (own,)
        yield from (part for part in parts if isinstance(part, CachedKV | MambaCache))


def _change_caches(
    cache: LayerCache, keys: Callable[[CachedKV], CachedKV], state: Callable[[MambaCache], MambaCache]
) -> LayerCache:
    """The cache of a layer with `keys` applied to its KV cache and `state` to its Mamba cache."""
    if isinstance(cache, ParallelCache):
        assert isinstance(cache.attention, CachedKV)
        return ParallelCache(keys(cache.attention), state(cache.mamba))
    if isinstance(cache, CachedKV):
        return keys(cache)
    return state(cache) if isinstance(cache, MambaCache) else cache


def first_rows(update: CacheUpdate, rows: int) -> CacheUpdate:
    """The update of the first rows."""
    if isinstance(update, ParallelUpdate):
        inputs = update.mamba
        keys = KeyValue(*(part[:rows] for part in update.attention))
        return ParallelUpdate(keys, None if inputs is None else MambaStepInputs(*(part[:rows] for part in inputs)))
    return None if update is None else type(update)(*(part[:rows] for part in update))


RowLayout = tuple[Tensor, Tensor, Tensor]  # start, stride and lengths of a `CachedKV`


def _layout_key(cached: CachedKV) -> tuple[int, int, int]:
    return id(cached.start), id(cached.stride), id(cached.lengths)


def _layouts(past: Sequence[LayerCache] | None) -> dict[tuple[int, int, int], RowLayout]:
    """The row layouts of the KV caches, in the order of the layers. Layers that share their tensors have one."""
    caches = (own for own in _caches(past) if isinstance(own, CachedKV))
    return {_layout_key(own): (own.start, own.stride, own.lengths) for own in caches}


def input_tensors(inputs: PassInputs) -> list[Tensor]:
    """The input tensors of a pass that have a row dimension, in a fixed order."""
    out = [inputs.tokens]
    out += [part for part in (inputs.meta.token_mask, inputs.meta.start, inputs.meta.long) if part is not None]
    slots = {id(own.slots): own.slots for own in _caches(inputs.past) if isinstance(own, MambaCache)}
    out += [own for own in slots.values() if own is not None]
    for layout in _layouts(inputs.past).values():
        out += layout
    if inputs.modulation is not None:
        out.append(LayerModulations.of(inputs.modulation).parts)
    return out


def validity(inputs: PassInputs) -> list[Tensor]:
    """The tensors that are zero for rows which are padding: the masks of tokens, and the lengths of contexts."""
    masks = [] if inputs.meta.token_mask is None else [inputs.meta.token_mask]
    return masks + [lengths for _, _, lengths in _layouts(inputs.past).values()]


def static_inputs(inputs: PassInputs, rows: int) -> PassInputs:
    """Inputs in new memory with room for `rows` rows, except for the pools. Surplus rows are empty."""

    def room(tensor: Tensor) -> Tensor:
        return tensor.new_zeros(rows, *tensor.shape[1:])

    meta = inputs.meta
    rows_of = meta.token_mask, meta.start, meta.long
    token_mask, start, long = (None if tensor is None else room(tensor) for tensor in rows_of)
    meta = AttentionMetadata(token_mask=token_mask, causal=meta.causal, start=start, long=long)
    layouts = {key: tuple(map(room, layout)) for key, layout in _layouts(inputs.past).items()}

    def with_own_layout(cached: CachedKV) -> CachedKV:
        starts, stride, lengths = layouts[_layout_key(cached)]
        return cached._replace(start=starts, stride=stride, lengths=lengths)

    slots: dict[int, Tensor] = {}

    def with_own_slots(state: MambaCache) -> MambaCache:
        if state.slots is None:
            return state
        return state._replace(slots=slots.setdefault(id(state.slots), room(state.slots)))

    past = [_change_caches(own, with_own_layout, with_own_slots) for own in inputs.past or ()]
    given = inputs.modulation
    modulation = None if given is None else LayerModulations(room(LayerModulations.of(given).parts))
    return PassInputs(room(inputs.tokens), meta, past if inputs.past else None, modulation, inputs.keep_step_inputs)
