"""Runs a whole pass of a tower on a GPU as one launch: a CUDA graph, captured once a shape and then replayed.

A pass over a few tokens has hundreds of small kernels. Launching them from Python takes longer than running them.
`graph_inputs` says what a graph copies and what it reads in place. Results are valid until the next pass of the same
shape: `append` copies keys and values, and `commit_state`, the first step of every view of a state, updates the Mamba
states.

A shape is captured at its third pass, and only for the lengths that the engine repeats (`repeated_lengths`): prompts of
any other length would fill the memory with graphs that are used once. Rounds of a model with adapters have any width;
they are padded to the next one that has a graph. The least recently used graphs are freed beyond a limit in bytes.
Before its first use, the result of a graph is compared with the layers on the same padded inputs, which must give the
same bits. If they differ, the runner warns and does not capture this shape again; after several such shapes it captures
no more graphs. `TWOTOWER_GRAPHS=0` turns the runner off.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from twotower import options
from twotower.cache.hybrid_cache import TowerState
from twotower.model.tower import PassInputs, PassResult, Tower, steady_period
from twotower.ops.registry import select
from twotower.ops.self_check import differing_bits, tensors_of
from twotower.runners.captured_step import CapturedStep, Choice, step_unsupported_reason
from twotower.runners.graph_capture import Capturer, MemoryPool, graph_bytes_limit, is_out_of_memory
from twotower.runners.graph_inputs import (
    bucket,
    first_rows,
    graph_width,
    in_buckets,
    input_tensors,
    shape_key,
    static_inputs,
    validity,
)
from twotower.runners.module_plan import ModulePlan, WeightPointers

MAX_TOKENS = 256  # tokens of a pass; with more, the kernels take longer than their launches
MAX_GRAPHS = 48  # graphs of a tower, least recently used first out
EAGER_PASSES = 2  # passes of a shape before it is captured
MAX_SHAPES = 512  # shapes whose passes are counted
MAX_REFUSED = 8  # shapes whose graphs failed; then no more are captured
PAUSE = 256  # passes without captures after one that found no memory


class CapturedGraph:
    """A captured pass at static addresses, with room for `rows` rows. nbytes: of its inputs and results.

    wrong: how the replay differs from the layers on the same inputs; None: not at all.
    """

    def __init__(self, tower: Tower, inputs: PassInputs, rows: int, pool: MemoryPool) -> None:
        self.static = static_inputs(inputs, rows)
        self.inputs, self._valid = input_tensors(self.static), validity(self.static)
        self._filled = rows
        self._fill(inputs)
        self.tokens = self.static.tokens
        self.replay, self.result = Capturer(tower.device, pool)(lambda: tower.layer_by_layer(*self.static))
        self.replay()
        self.wrong = differing_bits(self.result, tower.layer_by_layer(*self.static))
        self.nbytes = sum(tensor.nbytes for tensor in (*self.inputs, *tensors_of(self.result)))

    def run(self, inputs: PassInputs) -> PassResult:
        """Replays the pass with these inputs, which have the captured shape. Updates contain surplus tokens."""
        self._fill(inputs)
        self.replay()
        rows = len(inputs.tokens)
        hidden, updates = self.result
        return hidden[:rows], [first_rows(new, rows) for new in updates]

    def _fill(self, inputs: PassInputs) -> None:
        """Copies the inputs. Rows of an earlier pass become padding, which selects no experts of its own."""
        rows = len(inputs.tokens)
        torch._foreach_copy_([own[:rows] for own in self.inputs], input_tensors(inputs))
        if rows < self._filled and self._valid:
            torch._foreach_zero_([own[rows:] for own in self._valid])
        self._filled = rows


Graph = CapturedGraph | CapturedStep


class CUDAGraphRunner:
    """The GPU runner of one tower: caches its module plan and its graphs by shape. A copy is empty."""

    def __init__(self) -> None:
        self.release()

    def __reduce__(self) -> tuple[type[CUDAGraphRunner], tuple[()]]:
        return type(self), ()

    def release(self) -> None:
        """Frees the graphs and their memory."""
        self.graphs: OrderedDict[Hashable, Graph] = OrderedDict()
        self.refused: dict[Hashable, str] = {}  # shapes that are not captured again, with the reason
        self.disabled_reason: str | None = None  # why no more graphs are captured
        self._passes: OrderedDict[Hashable, int] = OrderedDict()  # of each shape, before its capture
        self._pause = 0  # passes until the next capture
        self._pool = MemoryPool()
        self._plan: ModulePlan | None = None
        self._weights: WeightPointers | None = None
        self._checked: object | None = None  # the period without changes in which the weights were checked

    def prefill_chunk(self, tower: Tower) -> int | None:
        """None: no preference."""
        return None

    @property
    def nbytes(self) -> int:
        """Bytes of the inputs and results of all graphs."""
        return sum(graph.nbytes for graph in self.graphs.values())

    def run(self, tower: Tower, inputs: PassInputs) -> PassResult | None:
        """The result of `Tower.forward`, from a graph; None if the pass is not supported or not captured yet."""
        (count, length), width = inputs.tokens.shape, graph_width(inputs)
        if width is None or not self._supports(tower, count, width):
            return None
        weights = self._current_weights(tower)
        if weights is None:
            return None
        inputs, rows = in_buckets(inputs, width)
        shape = rows, shape_key(inputs), *_keys(weights)
        where = f"passes of {rows} × {width} tokens on {tower.device}"
        graph = self._find(shape, where, lambda: CapturedGraph(tower, inputs, rows, self._pool))
        if not isinstance(graph, CapturedGraph):
            return None
        hidden, updates = graph.run(inputs)
        return hidden[:, :length], updates

    def step(
        self, tower: Tower, state: TowerState, tokens: Tensor, slots: Tensor, rows: Sequence[int]
    ) -> Choice | None:
        """A greedy step of tokens (B, 1) in slots (B,) of a state → tokens and confidences (B, 1), until the next step.

        The state has the step's tokens then. None, and nothing is done, if the step is not supported or not captured
        yet. rows: the slots, on the host.
        """
        if step_unsupported_reason(tower, state, rows) is not None or not self._supports(tower, *tokens.shape):
            return None
        weights = self._current_weights(tower)
        if weights is None:
            return None
        state.commit_state()
        width = bucket(state.context_width)
        layouts = [part.data_ptr() for group in state.kv_groups for part in (group.slots.start, group.slots.stride)]
        shape = "step", len(tokens), width, tuple(layouts), state.addresses.current().tobytes(), *_keys(weights)
        where = f"steps of {len(tokens)} rows on {tower.device}"
        graph = self._find(shape, where, lambda: CapturedStep(tower, state, tokens, slots, width, self._pool))
        if not isinstance(graph, CapturedStep):
            return None
        choice = graph.run(tokens, slots, state.lengths)
        state.advance(slots)
        return choice

    def _supports(self, tower: Tower, rows: int, length: int) -> bool:
        return self.disabled_reason is None and _eligible(tower, rows, length)

    def _find(self, shape: Hashable, where: str, make: Callable[[], Graph]) -> Graph | None:
        """The graph of a shape, captured if it is due; None if there is none. where: its passes, for the warning."""
        graph = self.graphs.get(shape)
        if graph is None:
            if not self._due(shape):
                return None
            graph = self._capture(make, shape, where)
            if graph is None:
                return None
            self.graphs[shape] = graph
            self._evict(graph.tokens.device)
        self.graphs.move_to_end(shape)
        return graph

    def _due(self, shape: Hashable) -> bool:
        """Whether a shape is captured now. Counts its passes."""
        if shape in self.refused:
            return False
        if self._pause:
            self._pause -= 1
            return False
        passes = self._passes.pop(shape, 0)
        if passes >= EAGER_PASSES:
            return True
        self._passes[shape] = passes + 1
        if len(self._passes) > MAX_SHAPES:
            self._passes.popitem(last=False)
        return False

    def _evict(self, device: torch.device) -> None:
        """Frees the least recently used graphs beyond the limits; the newest one stays."""
        limit, held = graph_bytes_limit(device), self.nbytes
        while len(self.graphs) > 1 and (len(self.graphs) > MAX_GRAPHS or held > limit):
            held -= self.graphs.popitem(last=False)[1].nbytes

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
            self.graphs.clear()  # they read weights that the tower has no more
        self._checked = period
        return self._weights

    def _capture(self, make: Callable[[], Graph], shape: Hashable, where: str) -> Graph | None:
        """A new graph; None if memory is short, and, with a warning, if its capture failed or it is wrong."""
        try:
            graph = make()
            wrong = graph.wrong
        except TimeoutError:  # a time limit of the caller, which says nothing about the graph
            raise
        except Exception as error:  # a capture can fail in many ways; the layers run instead
            if is_out_of_memory(error):
                self.graphs.clear()
                self._pause = PAUSE
                return None
            wrong = f"raised {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        else:
            if wrong is None:
                return graph
        self.refused[shape] = wrong
        if len(self.refused) >= MAX_REFUSED:
            self.disabled_reason, where = wrong, "any pass"
            self.graphs.clear()
        warnings.warn(f"CUDA graphs are not used for {where}: one {wrong}", RuntimeWarning, stacklevel=5)
        return None


def cuda_graph_unsupported_reason(device: torch.device) -> str | None:
    """Why CUDA graphs are not used on a device; None if they are."""
    if not options.current().graphs:
        return "is turned off by TWOTOWER_GRAPHS=0"
    return None if device.type == "cuda" else "needs CUDA"


def _keys(weights: WeightPointers) -> tuple[Hashable, ...]:
    """The weights and kernels of a graph, which replays the kernels that were selected at its capture."""
    return weights.addresses, options.current().kernels_key


def _eligible(tower: Tower, rows: int, length: int) -> bool:
    if (
        torch.is_grad_enabled()
        or torch._C._len_torch_dispatch_stack()
        or cuda_graph_unsupported_reason(tower.device) is not None
    ):
        return False
    if not 0 < rows * length <= MAX_TOKENS or length > tower.spec.chunk_size:
        return False
    backend = select("experts", tower.device, tower.embeddings.weight.dtype)
    return backend.name != "sorted-loop"  # sorted-loop reads on the host
