"""A tower's pass on a GPU as one launch: recorded once for each shape (a CUDA graph), then replayed.

A pass over a few tokens is some hundred small kernels, and launching them from Python takes longer than running them.
What a pass reads is copied to where the recorded one read it; keys and values stay where they lie, and what it leaves
is good until the next pass of the same shape: `state.append` takes it over, and `settle`, which every reading of the
state begins with, folds in the rest. Rows and context columns are rounded up to powers of two, so shapes are few.

Each recording is replayed beside the layers one by one before it is used, and refused with a warning if it differs.
`TWOTOWER_GRAPHS=0` turns all of this off.
"""

from __future__ import annotations

import os
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from twotower.cache.layer_cache import Added, MambaPast, Past
from twotower.model.conditioning import Modulation
from twotower.model.layer_io import Visibility
from twotower.ops.reference.attention import Cached
from twotower.ops.registry import select
from twotower.ops.self_check import difference
from twotower.runners.fused_cpu import plan_of

if TYPE_CHECKING:
    from twotower.model.tower import Tower

Result = tuple[Tensor, list[Added]]
MOST_TOKENS = 256  # of a pass; with more of them its kernels take longer than their launches
LEAST_WIDTH = 256  # columns of the context
KEPT = 48  # recordings of a tower; the one used longest ago goes first
WARM_UP = 2  # passes before a recording: libraries set themselves up in the first


class Reads(NamedTuple):
    """Everything that one pass of a tower reads beside its weights."""

    tokens: Tensor
    sees: Visibility
    past: list[Past] | None
    modulation: list[Modulation] | None
    trace: bool


class Recording:
    """One pass at fixed places of memory. rows: how many it has room for."""

    def __init__(self, tower: Tower, reads: Reads, rows: int) -> None:
        self.rows = rows
        self.reads = _with_own_memory(reads, rows)
        self.inputs = _copied(self.reads)
        self._fill(reads)
        self.replay, self.result = recorder(tower.device)(lambda: tower.layer_by_layer(*self.reads))

    def run(self, reads: Reads) -> Result:
        """The pass over these inputs, of the recorded shape."""
        self._fill(reads)
        self.replay()
        rows = len(reads.tokens)
        hidden, added = self.result
        return hidden[:rows], [None if new is None else type(new)(*(part[:rows] for part in new)) for new in added]

    def _fill(self, reads: Reads) -> None:
        rows = len(reads.tokens)
        torch._foreach_copy_([own[:rows] for own in self.inputs], _copied(reads))


class Recordings:
    """A tower's, by shape. wrong: why none is used any more."""

    def __init__(self) -> None:
        self.by_shape: OrderedDict[Hashable, Recording] = OrderedDict()
        self.wrong: str | None = None


_RECORDINGS: WeakKeyDictionary[nn.Module, Recordings] = WeakKeyDictionary()


def run(tower: Tower, reads: Reads) -> Result | None:
    """What `Tower.forward` returns, from a recording of such a pass, made now if there is none; None: not here."""
    if not _wanted(tower, reads):
        return None
    plan = plan_of(tower)
    if not plan.may_run():
        return None
    known = _RECORDINGS.setdefault(tower, Recordings())
    if known.wrong is not None:
        return None
    reads = reads._replace(past=_widened(reads.past))
    rows = _bucket(reads)
    if rows > len(reads.tokens) and reads.sees.valid is None:  # the surplus rows are padding, and visit no expert alone
        reads = reads._replace(sees=replace(reads.sees, valid=torch.ones_like(reads.tokens, dtype=torch.bool)))
    shape = (
        rows,
        _shape(reads),
        tuple(plan.where()),
        tower.norm_f.weight.data_ptr(),
        tower.embeddings.weight.data_ptr(),
    )
    recording = known.by_shape.get(shape)
    if recording is None:
        recording = _made(tower, reads, rows, known)
        if recording is None:
            return None
        known.by_shape[shape] = recording
        if len(known.by_shape) > KEPT:
            known.by_shape.popitem(last=False)
    known.by_shape.move_to_end(shape)
    return recording.run(reads)


def _made(tower: Tower, reads: Reads, rows: int, known: Recordings) -> Recording | None:
    """A new recording that gives what the layers one by one give; None, with a warning, where it cannot be had."""
    try:
        recording = Recording(tower, reads, rows)
        known.wrong = difference(recording.run(reads), tower.layer_by_layer(*reads))
    except Exception as error:  # a capture can fail in many ways, and the pass can do without
        known.wrong = f"raised {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    if known.wrong is None:
        return recording
    known.by_shape.clear()
    warnings.warn(f"passes are not recorded on {tower.device}: one {known.wrong}", RuntimeWarning, stacklevel=4)
    return None


def refusal(device: torch.device) -> str | None:
    """Why passes are not recorded on a device, or None."""
    if os.environ.get("TWOTOWER_GRAPHS") == "0":
        return "is turned off by TWOTOWER_GRAPHS=0"
    return None if device.type == "cuda" else "needs CUDA"


def _wanted(tower: Tower, reads: Reads) -> bool:
    if torch.is_grad_enabled() or torch._C._len_torch_dispatch_stack() or refusal(tower.device) is not None:
        return False
    if not 0 < reads.tokens.numel() <= MOST_TOKENS or reads.tokens.shape[1] > tower.config.chunk_size:
        return False
    return select("experts", tower.device, tower.embeddings.weight.dtype).name != "sorted-loop"  # which asks the host


# --- shapes -----------------------------------------------------------------------------------------------------------


def _widened(past: list[Past] | None) -> list[Past] | None:
    """With context columns rounded up: those beyond a row's length are masked in any case."""
    return None if past is None else [_wider(own) if isinstance(own, Cached) and own.width else own for own in past]


def _wider(cached: Cached) -> Cached:
    width = max(LEAST_WIDTH, 1 << (cached.width - 1).bit_length())
    return cached._replace(width=min(width, cached.even) if cached.even else width)


def _bucket(reads: Reads) -> int:
    """Rows of the recording: a power of two, but as they are where keys and values are seen as one even layout."""
    rows = len(reads.tokens)
    even = any(isinstance(own, Cached) and own.even for own in reads.past or ())
    return rows if even else 1 << (rows - 1).bit_length()


def _shape(reads: Reads) -> Hashable:
    """What a recording depends on beside its rows."""
    layers: list[Hashable] = []
    for own in reads.past or ():
        if isinstance(own, Cached):
            layers.append((own.width, own.even, own.k.data_ptr(), own.v.data_ptr()))
        elif own is not None:
            layers.append(tuple(part.shape[1:] for part in own))
    sees = reads.sees
    kinds = (sees.valid is None, sees.causal, sees.start is None, reads.modulation is None, reads.trace)
    return reads.tokens.shape[1], kinds, tuple(layers)


# --- inputs -----------------------------------------------------------------------------------------------------------


def _copied(reads: Reads) -> list[Tensor]:
    """The tensors with a row each that a pass reads, always in the same order. Layers share where their rows lie."""
    out = [reads.tokens]
    out += [part for part in (reads.sees.valid, reads.sees.start) if part is not None]
    segments: Sequence[Tensor] = ()
    for own in reads.past or ():
        if isinstance(own, MambaPast):
            out += own
        elif isinstance(own, Cached):
            segments = (own.start, own.stride, own.lengths)
    out += segments
    for modulation in reads.modulation or ():
        out += modulation
    return out


def _with_own_memory(reads: Reads, rows: int) -> Reads:
    """The same with room for `rows` rows of its own, but for the pools of keys and values. Surplus rows are empty."""

    def room(tensor: Tensor | None) -> Any:
        return None if tensor is None else tensor.new_zeros(rows, *tensor.shape[1:])

    sees = Visibility(valid=room(reads.sees.valid), causal=reads.sees.causal, start=room(reads.sees.start))
    past: list[Past] = []
    segments: dict[str, Any] = {}
    for own in reads.past or ():
        if isinstance(own, Cached):
            segments = segments or {name: room(getattr(own, name)) for name in ("start", "stride", "lengths")}
            past.append(own._replace(**segments))
        else:
            past.append(None if own is None else MambaPast(*map(room, own)))
    modulation = None if reads.modulation is None else [Modulation(*map(room, parts)) for parts in reads.modulation]
    return Reads(room(reads.tokens), sees, past if reads.past else None, modulation, reads.trace)


# --- recording --------------------------------------------------------------------------------------------------------

Recorder = Callable[[Callable[[], Result]], tuple[Callable[[], object], Result]]


def recorder(device: torch.device) -> Recorder:
    """What records: compute() → what does it again, and where its result then is."""

    def record(compute: Callable[[], Result]) -> tuple[Callable[[], object], Result]:
        with torch.cuda.device(device):
            aside, now = torch.cuda.Stream(), torch.cuda.current_stream()
            aside.wait_stream(now)
            with torch.cuda.stream(aside):
                for _ in range(WARM_UP):
                    compute()
            now.wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            # Other threads may use the device meanwhile, to tell how much memory it has, say.
            with torch.cuda.graph(graph, pool=_memory(device), stream=aside, capture_error_mode="thread_local"):
                result = compute()
        return graph.replay, result

    return record


@cache
def _memory(device: torch.device) -> Any:
    """All recordings of a device share it: their results stay, and what they need in between is used in turn."""
    return torch.cuda.graph_pool_handle()
