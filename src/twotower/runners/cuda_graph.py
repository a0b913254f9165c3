"""Runs a whole pass of a tower on a GPU as one launch: a CUDA graph, captured once a shape and then replayed.

A pass over a few tokens has about a hundred small kernels. Launching them from Python takes longer than running them.
The inputs of a pass are copied to the static addresses of the graph; keys and values are read in place. Results are
valid until the next pass of the same shape: `append` copies keys and values, and `commit_state`, the first step of
every view of a state, updates the Mamba states. Rows and context width are rounded up to powers of two, so that there
are few shapes.

Before its first use, the result of a graph is compared with the pass layer by layer. If they differ, the runner warns
and captures no more graphs. `TWOTOWER_GRAPHS=0` turns the runner off.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from twotower import options
from twotower.cache.layer_cache import CacheUpdate, KeyValue, LayerCache, MambaCache, ParallelCache, ParallelUpdate
from twotower.model.conditioning import Modulation
from twotower.model.layer_io import AttentionMetadata
from twotower.model.tower import PassInputs, PassResult, Tower, steady_period
from twotower.ops.reference.attention import CachedKV
from twotower.ops.reference.mamba_block import MambaStepInputs
from twotower.ops.registry import select
from twotower.ops.self_check import compare
from twotower.runners.module_plan import ModulePlan, WeightPointers

if TYPE_CHECKING:
    from torch.cuda import _POOL_HANDLE

MAX_TOKENS = 256  # tokens of a pass; with more, the kernels take longer than their launches
MIN_CONTEXT_WIDTH = 256  # tokens
MAX_GRAPHS = 48  # graphs of a tower, least recently used first out
WARMUP_PASSES = 2  # passes before a capture, in which libraries initialise


class CapturedGraph:
    """A captured pass at static addresses, with room for `rows` rows."""

    def __init__(self, tower: Tower, inputs: PassInputs, rows: int, pool: MemoryPool) -> None:
        own = _static_inputs(inputs, rows)
        self.inputs = _input_tensors(own)
        self._fill(inputs)
        self.replay, self.result = capturer(tower.device, pool)(lambda: tower.layer_by_layer(*own))

    def run(self, inputs: PassInputs) -> PassResult:
        """Replays the pass with these inputs, which have the captured shape."""
        self._fill(inputs)
        self.replay()
        rows = len(inputs.tokens)
        hidden, updates = self.result
        return hidden[:rows], [_first_rows(new, rows) for new in updates]

    def _fill(self, inputs: PassInputs) -> None:
        rows = len(inputs.tokens)
        torch._foreach_copy_([own[:rows] for own in self.inputs], _input_tensors(inputs))


class MemoryPool:
    """The memory pool that all graphs of a runner share. Graphs keep their results and share intermediate memory."""

    def __init__(self) -> None:
        self._handle: _POOL_HANDLE | None = None

    @property
    def handle(self) -> _POOL_HANDLE:
        if self._handle is None:
            self._handle = torch.cuda.graph_pool_handle()
        return self._handle


class CUDAGraphRunner:
    """The GPU runner of one tower: caches its module plan and its graphs by shape. A copy is empty."""

    def __init__(self) -> None:
        self.release()

    def __reduce__(self) -> tuple[type[CUDAGraphRunner], tuple[()]]:
        return type(self), ()

    def release(self) -> None:
        """Frees the graphs and their memory."""
        self.graphs: OrderedDict[Hashable, CapturedGraph] = OrderedDict()
        self.disabled_reason: str | None = None  # why no more graphs are captured
        self._pool = MemoryPool()
        self._plan: ModulePlan | None = None
        self._weights: WeightPointers | None = None
        self._checked: object | None = None  # the period without changes in which the weights were checked

    def prefill_chunk(self, tower: Tower) -> int | None:
        """None: no preference."""
        return None

    def run(self, tower: Tower, inputs: PassInputs) -> PassResult | None:
        """The result of `Tower.forward`, from a graph captured on first use; None if the pass is not supported."""
        if self.disabled_reason is not None or not _eligible(tower, inputs):
            return None
        weights = self._current_weights(tower)
        if weights is None:
            return None
        inputs = inputs._replace(past=_bucket_widths(inputs.past))
        rows = _bucket_rows(inputs)
        if rows > len(inputs.tokens) and inputs.meta.token_mask is None:  # surplus rows are padding
            token_mask = torch.ones_like(inputs.tokens, dtype=torch.bool)
            inputs = inputs._replace(meta=replace(inputs.meta, token_mask=token_mask))
        key = options.current().kernels_key  # a graph replays the kernels that were selected at its capture
        shape = rows, _shape_key(inputs), weights.addresses, key
        graph = self.graphs.get(shape)
        if graph is None:
            graph = self._capture(tower, inputs, rows)
            if graph is None:
                return None
            self.graphs[shape] = graph
            if len(self.graphs) > MAX_GRAPHS:
                self.graphs.popitem(last=False)
        self.graphs.move_to_end(shape)
        return graph.run(inputs)

    def _current_weights(self, tower: Tower) -> WeightPointers | None:
        """The current weight pointers; None if a graph cannot replace the tower's forward."""
        period = steady_period()
        if period is not None and period is self._checked:
            return self._weights
        if self._plan is None or not self._plan.is_current():
            self._plan, self._weights = ModulePlan(tower), None
        if not self._plan.is_unmodified(tower):
            return None
        if self._weights is None or not self._plan.weights_unchanged(self._weights):
            self._weights = self._plan.weights()
        self._checked = period
        return self._weights

    def _capture(self, tower: Tower, inputs: PassInputs, rows: int) -> CapturedGraph | None:
        """A new graph, compared with the pass layer by layer; None, with a warning, if capture or comparison fails."""
        try:
            graph = CapturedGraph(tower, inputs, rows, self._pool)
            self.disabled_reason = compare(graph.run(inputs), tower.layer_by_layer(*inputs))
        except TimeoutError:  # a time limit of the caller, which says nothing about the graph
            raise
        except Exception as error:  # a capture can fail in many ways; the layers run instead
            self.disabled_reason = f"raised {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        if self.disabled_reason is None:
            return graph
        self.graphs.clear()
        warnings.warn(
            f"CUDA graphs are not used on {tower.device}: one {self.disabled_reason}", RuntimeWarning, stacklevel=4
        )
        return None


def cuda_graph_unsupported_reason(device: torch.device) -> str | None:
    """Why CUDA graphs are not used on a device; None if they are."""
    if not options.current().graphs:
        return "is turned off by TWOTOWER_GRAPHS=0"
    return None if device.type == "cuda" else "needs CUDA"


def _eligible(tower: Tower, inputs: PassInputs) -> bool:
    if (
        torch.is_grad_enabled()
        or torch._C._len_torch_dispatch_stack()
        or cuda_graph_unsupported_reason(tower.device) is not None
    ):
        return False
    if inputs.meta.prefix is not None:
        return False
    if not 0 < inputs.tokens.numel() <= MAX_TOKENS or inputs.tokens.shape[1] > tower.spec.chunk_size:
        return False
    backend = select("experts", tower.device, tower.embeddings.weight.dtype)
    return backend.name != "sorted-loop"  # sorted-loop reads on the host


# --- shapes -----------------------------------------------------------------------------------------------------------


def _bucket_widths(past: Sequence[LayerCache] | None) -> list[LayerCache] | None:
    """Rounds context widths up. Keys beyond a row's length are masked."""
    if past is None:
        return None
    return [_change_caches(own, _bucket_width, lambda state: state) for own in past]


def _bucket_width(cached: CachedKV) -> CachedKV:
    if not cached.max_length:
        return cached
    width = max(MIN_CONTEXT_WIDTH, 1 << (cached.max_length - 1).bit_length())
    return cached._replace(max_length=min(width, cached.uniform_stride) if cached.uniform_stride else width)


def _bucket_rows(inputs: PassInputs) -> int:
    """The rows of the graph: a power of two, or exact if keys and values are read as one contiguous view."""
    rows = len(inputs.tokens)
    even = any(isinstance(own, CachedKV) and own.uniform_stride for own in _caches(inputs.past))
    return rows if even else 1 << (rows - 1).bit_length()


def _shape_key(inputs: PassInputs) -> Hashable:
    """The part of the cache key of a graph that follows from the shapes of the inputs, without the rows."""
    layers: list[Hashable] = []
    numbers = {key: i for i, key in enumerate(_layouts(inputs.past))}
    for own in _caches(inputs.past):
        if isinstance(own, CachedKV):
            pools = own.k.data_ptr(), own.v.data_ptr()
            layers.append((own.max_length, own.uniform_stride, *pools, numbers[_layout_key(own)]))
        else:
            layers.append(tuple(part.shape[1:] for part in own))
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


# --- inputs -----------------------------------------------------------------------------------------------------------


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


def _first_rows(update: CacheUpdate, rows: int) -> CacheUpdate:
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


def _input_tensors(inputs: PassInputs) -> list[Tensor]:
    """The input tensors of a pass that have a row dimension, in a fixed order."""
    out = [inputs.tokens]
    out += [part for part in (inputs.meta.token_mask, inputs.meta.start, inputs.meta.long) if part is not None]
    for own in _caches(inputs.past):
        if isinstance(own, MambaCache):
            out += own
    for layout in _layouts(inputs.past).values():
        out += layout
    for modulation in inputs.modulation or ():
        out += modulation
    return out


def _static_inputs(inputs: PassInputs, rows: int) -> PassInputs:
    """Inputs in new memory with room for `rows` rows, except for the K/V pools. Surplus rows are empty."""

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

    past = [
        _change_caches(own, with_own_layout, lambda state: MambaCache(*map(room, state))) for own in inputs.past or ()
    ]
    modulation = None if inputs.modulation is None else [Modulation(*map(room, parts)) for parts in inputs.modulation]
    return PassInputs(room(inputs.tokens), meta, past if inputs.past else None, modulation, inputs.keep_step_inputs)


# --- capturing --------------------------------------------------------------------------------------------------------

Capturer = Callable[[Callable[[], PassResult]], tuple[Callable[[], object], PassResult]]


def capturer(device: torch.device, pool: MemoryPool) -> Capturer:
    """A function that captures compute() → a function that replays it, and the tensors that hold the result."""

    def capture(compute: Callable[[], PassResult]) -> tuple[Callable[[], object], PassResult]:
        with torch.cuda.device(device):
            aside, now = torch.cuda.Stream(), torch.cuda.current_stream()
            aside.wait_stream(now)
            with torch.cuda.stream(aside):
                for _ in range(WARMUP_PASSES):
                    compute()
            now.wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            # Other threads may call the device during the capture, for example to read its free memory.
            with torch.cuda.graph(graph, pool=pool.handle, stream=aside, capture_error_mode="thread_local"):
                result = compute()
        return graph.replay, result

    return capture
