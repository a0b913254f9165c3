"""The inputs of a pass that a CUDA graph replays: the shape that a graph is made for, and their static copies.

Pools of keys, values and Mamba states are read in place: their addresses are part of the shape. The other inputs are
copied to the static addresses of the graph; all layers' modulation is one tensor. Rows and context width are rounded up
to powers of two, so that there are few shapes. So are the tokens of a row in a pass with masks behind a prefix, whose
number the engine chooses for each pass.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower.cache.layer_cache import CacheUpdate, KeyValue, LayerCache, MambaCache, ParallelCache, ParallelUpdate
from twotower.model.conditioning import LayerModulations
from twotower.model.layer_io import AttentionMetadata
from twotower.model.tower import PassInputs, lengths_that_repeat
from twotower.ops.reference.attention import CachedKV
from twotower.ops.reference.mamba_block import MambaStepInputs

MIN_CONTEXT_WIDTH = 256  # tokens


def graph_width(inputs: PassInputs) -> int | None:
    """The tokens of a row in the graph of a pass; None: passes of this length do not repeat.

    With a prefix, the next power of two, or a repeated length below it. Otherwise the exact number.
    """
    length, repeated = inputs.tokens.shape[1], lengths_that_repeat()
    if inputs.meta.prefix is None:
        return length if repeated is None or length in repeated else None
    return min([1 << (length - 1).bit_length(), *(own for own in repeated or () if own >= length)])


def in_buckets(inputs: PassInputs, width: int | None = None) -> tuple[PassInputs, int]:
    """The inputs with rounded context width and `width` tokens a row, and the number of rows of their graph.

    Surplus tokens and rows are padding, and keys beyond a row's length are masked. width: of `graph_width`.
    """
    past = inputs.past
    if past is not None:
        past = [_change_caches(own, _bucket_width, lambda state: state) for own in past]
    rows, (count, length) = _bucket_rows(inputs), inputs.tokens.shape
    tokens, meta, surplus = inputs.tokens, inputs.meta, (width or length) - length
    if rows != count and any(own.slots is None for own in _caches(past) if isinstance(own, MambaCache)):
        slots = torch.arange(count, device=tokens.device)  # surplus rows have no rows of the pools
        past = [_change_caches(own, lambda keys: keys, lambda state: state._replace(slots=slots)) for own in past or ()]
    if meta.token_mask is None and (rows != count or meta.prefix is not None):
        meta = replace(meta, token_mask=torch.ones_like(tokens, dtype=torch.bool))
    if surplus:
        assert meta.token_mask is not None, "only passes with a prefix are padded"
        tokens, meta = F.pad(tokens, (0, surplus)), replace(meta, token_mask=F.pad(meta.token_mask, (0, surplus)))
    return inputs._replace(tokens=tokens, meta=meta, past=past), rows


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
        meta.prefix is None,
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
    out += [part for part in _rows_of(inputs.meta) if part is not None]
    slots = {id(own.slots): own.slots for own in _caches(inputs.past) if isinstance(own, MambaCache)}
    out += [own for own in slots.values() if own is not None]
    for layout in _layouts(inputs.past).values():
        out += layout
    if inputs.modulation is not None:
        out.append(LayerModulations.of(inputs.modulation).parts)
    return out


def _rows_of(meta: AttentionMetadata) -> tuple[Tensor | None, ...]:
    """The tensors of a row dimension."""
    return meta.token_mask, meta.prefix, meta.start, meta.long


def validity(inputs: PassInputs) -> list[Tensor]:
    """The tensors that are zero for rows which are padding: the masks of tokens, and the lengths of contexts."""
    masks = [] if inputs.meta.token_mask is None else [inputs.meta.token_mask]
    return masks + [lengths for _, _, lengths in _layouts(inputs.past).values()]


def static_inputs(inputs: PassInputs, rows: int) -> PassInputs:
    """Inputs in new memory with room for `rows` rows, except for the pools. Surplus rows are empty."""

    def room(tensor: Tensor) -> Tensor:
        return tensor.new_zeros(rows, *tensor.shape[1:])

    meta = inputs.meta
    token_mask, prefix, start, long = (None if tensor is None else room(tensor) for tensor in _rows_of(meta))
    meta = AttentionMetadata(token_mask=token_mask, causal=meta.causal, prefix=prefix, start=start, long=long)
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
