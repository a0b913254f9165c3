"""A tower's pass on a GPU as one launch: recorded once for each shape (a CUDA graph), then replayed.

A pass over a few tokens is some hundred small kernels, and launching them from Python takes longer than running them.
A pass's inputs are copied to the addresses that the recording reads; keys and values are read in place. Results are
valid until the next pass of the same shape: `append` stores keys and values, and `commit_state`, the first step of
every view of a state, updates the Mamba states. Rows and context columns are rounded up to powers of two, so
shapes are few.

Each graph is replayed beside the layers one by one before it is used, and refused with a warning if it differs.
`TWOTOWER_GRAPHS=0` turns the runner off.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from twotower import options
from twotower.cache.layer_cache import LayerCache, MambaCache
from twotower.model.conditioning import Modulation
from twotower.model.layer_io import AttentionMetadata
from twotower.model.tower import PassInputs, PassResult, Tower
from twotower.ops.reference.attention import CachedKV
from twotower.ops.registry import select
from twotower.ops.self_check import compare
from twotower.runners.module_plan import ModulePlan, WeightPointers

if TYPE_CHECKING:
    from torch.cuda import _POOL_HANDLE

MAX_TOKENS = 256  # of a pass; with more of them its kernels take longer than their launches
MIN_CONTEXT_WIDTH = 256  # columns of the context
MAX_GRAPHS = 48  # recordings of a tower; the one used longest ago goes first
WARMUP_PASSES = 2  # passes before a recording: libraries set themselves up in the first


class CapturedGraph:
    """One pass at fixed addresses, with room for `rows` rows."""

    def __init__(self, tower: Tower, inputs: PassInputs, rows: int, pool: MemoryPool) -> None:
        own = _static_inputs(inputs, rows)
        self.inputs = _input_tensors(own)
        self._fill(inputs)
        self.replay, self.result = capturer(tower.device, pool)(lambda: tower.layer_by_layer(*own))

    def run(self, inputs: PassInputs) -> PassResult:
        """The pass over these inputs, of the recorded shape."""
        self._fill(inputs)
        self.replay()
        rows = len(inputs.tokens)
        hidden, added = self.result
        return hidden[:rows], [None if new is None else type(new)(*(part[:rows] for part in new)) for new in added]

    def _fill(self, inputs: PassInputs) -> None:
        rows = len(inputs.tokens)
        torch._foreach_copy_([own[:rows] for own in self.inputs], _input_tensors(inputs))


class MemoryPool:
    """The pool that all recordings of a runner share: their results stay, and intermediate tensors reuse memory."""

    def __init__(self) -> None:
        self._handle: _POOL_HANDLE | None = None

    @property
    def handle(self) -> _POOL_HANDLE:
        if self._handle is None:
            self._handle = torch.cuda.graph_pool_handle()
        return self._handle


class CUDAGraphRunner:
    """Serves one tower: keeps the tower's plan and recordings, by shape. A copy of a runner is empty."""

    def __init__(self) -> None:
        self.release()

    def __reduce__(self) -> tuple[type[CUDAGraphRunner], tuple[()]]:
        return type(self), ()

    def release(self) -> None:
        """Frees the recordings and their memory."""
        self.graphs: OrderedDict[Hashable, CapturedGraph] = OrderedDict()
        self.disabled_reason: str | None = None  # why passes are not recorded any more
        self._pool = MemoryPool()
        self._plan: ModulePlan | None = None
        self._weights: WeightPointers | None = None

    def prefill_chunk(self, tower: Tower) -> int | None:
        """No preference."""
        return None

    def run(self, tower: Tower, inputs: PassInputs) -> PassResult | None:
        """What `Tower.forward` returns, from a recording of such a pass, made now if there is none; None: not here."""
        if self.disabled_reason is not None or not _eligible(tower, inputs):
            return None
        weights = self._current_weights(tower)
        if weights is None:
            return None
        inputs = inputs._replace(past=_bucket_widths(inputs.past))
        rows = _bucket_rows(inputs)
        if rows > len(inputs.tokens) and inputs.meta.valid is None:  # surplus rows are padding: they visit no expert
            valid = torch.ones_like(inputs.tokens, dtype=torch.bool)
            inputs = inputs._replace(meta=replace(inputs.meta, valid=valid))
        key = options.current().kernels_key  # a recording replays the kernels that were chosen when it was made
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
        """The weights as they are now; None where a recording cannot stand for the tower."""
        if self._plan is None or not self._plan.is_current():
            self._plan, self._weights = ModulePlan(tower), None
        if not self._plan.is_unmodified(tower):
            return None
        if self._weights is None or not self._plan.weights_unchanged(self._weights):
            self._weights = self._plan.weights()
        return self._weights

    def _capture(self, tower: Tower, inputs: PassInputs, rows: int) -> CapturedGraph | None:
        """A new recording, checked beside the layers; None, with a warning, where it cannot be had."""
        try:
            graph = CapturedGraph(tower, inputs, rows, self._pool)
            self.disabled_reason = compare(graph.run(inputs), tower.layer_by_layer(*inputs))
        except Exception as error:  # a capture can fail in many ways, and the pass can do without
            self.disabled_reason = f"raised {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        if self.disabled_reason is None:
            return graph
        self.graphs.clear()
        warnings.warn(
            f"passes are not recorded on {tower.device}: one {self.disabled_reason}", RuntimeWarning, stacklevel=4
        )
        return None


def cuda_graph_unsupported_reason(device: torch.device) -> str | None:
    """Why passes are not recorded on a device, or None."""
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
    if not 0 < inputs.tokens.numel() <= MAX_TOKENS or inputs.tokens.shape[1] > tower.config.chunk_size:
        return False
    return select("experts", tower.device, tower.embeddings.weight.dtype).name != "sorted-loop"  # which asks the host


# --- shapes -----------------------------------------------------------------------------------------------------------


def _bucket_widths(past: list[LayerCache] | None) -> list[LayerCache] | None:
    """With context columns rounded up: those beyond a row's length are masked in any case."""
    if past is None:
        return None
    return [_bucket_width(own) if isinstance(own, CachedKV) and own.max_length else own for own in past]


def _bucket_width(cached: CachedKV) -> CachedKV:
    width = max(MIN_CONTEXT_WIDTH, 1 << (cached.max_length - 1).bit_length())
    return cached._replace(max_length=min(width, cached.uniform_stride) if cached.uniform_stride else width)


def _bucket_rows(inputs: PassInputs) -> int:
    """Rows of the recording: a power of two, but as they are where keys and values are seen as one even layout."""
    rows = len(inputs.tokens)
    even = any(isinstance(own, CachedKV) and own.uniform_stride for own in inputs.past or ())
    return rows if even else 1 << (rows - 1).bit_length()


def _shape_key(inputs: PassInputs) -> Hashable:
    """What a recording depends on beside its rows."""
    layers: list[Hashable] = []
    for own in inputs.past or ():
        if isinstance(own, CachedKV):
            layers.append((own.max_length, own.uniform_stride, own.k.data_ptr(), own.v.data_ptr()))
        elif own is not None:
            layers.append(tuple(part.shape[1:] for part in own))
    meta = inputs.meta
    kinds = (meta.valid is None, meta.causal, meta.start is None, inputs.modulation is None, inputs.trace)
    return inputs.tokens.shape[1], kinds, tuple(layers)


# --- inputs -----------------------------------------------------------------------------------------------------------


def _input_tensors(inputs: PassInputs) -> list[Tensor]:
    """The tensors with a row each that a pass reads, always in the same order. Layers share where their rows lie."""
    out = [inputs.tokens]
    out += [part for part in (inputs.meta.valid, inputs.meta.start) if part is not None]
    row_layout: Sequence[Tensor] = ()
    for own in inputs.past or ():
        if isinstance(own, MambaCache):
            out += own
        elif isinstance(own, CachedKV):
            row_layout = (own.start, own.stride, own.lengths)
    out += row_layout
    for modulation in inputs.modulation or ():
        out += modulation
    return out


def _static_inputs(inputs: PassInputs, rows: int) -> PassInputs:
    """The same with room for `rows` rows of its own, but for the pools of keys and values. Surplus rows are empty."""

    def room(tensor: Tensor) -> Tensor:
        return tensor.new_zeros(rows, *tensor.shape[1:])

    valid, start = (None if tensor is None else room(tensor) for tensor in (inputs.meta.valid, inputs.meta.start))
    meta = AttentionMetadata(valid=valid, causal=inputs.meta.causal, start=start)
    past: list[LayerCache] = []
    row_layout: tuple[Tensor, Tensor, Tensor] | None = None  # of all layers
    for own in inputs.past or ():
        if isinstance(own, CachedKV):
            row_layout = row_layout or (room(own.start), room(own.stride), room(own.lengths))
            starts, stride, lengths = row_layout
            past.append(own._replace(start=starts, stride=stride, lengths=lengths))
        else:
            past.append(None if own is None else MambaCache(*map(room, own)))
    modulation = None if inputs.modulation is None else [Modulation(*map(room, parts)) for parts in inputs.modulation]
    return PassInputs(room(inputs.tokens), meta, past if inputs.past else None, modulation, inputs.trace)


# --- recording --------------------------------------------------------------------------------------------------------

Capturer = Callable[[Callable[[], PassResult]], tuple[Callable[[], object], PassResult]]


def capturer(device: torch.device, pool: MemoryPool) -> Capturer:
    """What records: compute() → what does it again, and where its result then is."""

    def capture(compute: Callable[[], PassResult]) -> tuple[Callable[[], object], PassResult]:
        with torch.cuda.device(device):
            aside, now = torch.cuda.Stream(), torch.cuda.current_stream()
            aside.wait_stream(now)
            with torch.cuda.stream(aside):
                for _ in range(WARMUP_PASSES):
                    compute()
            now.wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            # Other threads may use the device meanwhile, to tell how much memory it has, say.
            with torch.cuda.graph(graph, pool=pool.handle, stream=aside, capture_error_mode="thread_local"):
                result = compute()
        return graph.replay, result

    return capture
