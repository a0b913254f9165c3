"""What a training pass holds in memory, measured on tensors without storage.

The objective's own units run forward and backward on the meta device, one of each kind, while every storage that is
made is followed until it is freed: what autograd keeps and what only exists for a moment are both seen, and no formula
repeats the model. Two operations are stood in for: in bf16 routed experts run as the grouped backend, which CUDA takes
(in fp32 both take the gathered one), and attention is an autograd function that keeps what a fused kernel keeps.
What a kernel allocates inside itself is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, ValuesView
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from twotower.config import BackboneConfig
from twotower.model.conditioning import Modulation, TimeConditioning
from twotower.model.moe import Experts
from twotower.model.packed_forward import Layout
from twotower.model.tower import Tower
from twotower.model.wide_tensors import cast, is_wide
from twotower.ops.reference.experts import experts_grouped
from twotower.training.layer_pair import PairedLayer, run_unit
from twotower.training.objective import DenoisingObjective, DenoisingOptions, negative_log_likelihood

ContextRole = Literal["frozen", "trained", "tied"]


@dataclass(frozen=True)
class Share:
    """Tensors that are cut along their first dimension and gathered together: (rows, elements of a row, trained)."""

    tensors: tuple[tuple[int, int, bool], ...]

    def count(self, trained: bool | None = None) -> int:
        """Numbers in all, or only what trains (True) or is frozen (False)."""
        return sum(rows * width for rows, width, trains in self.tensors if trained in (None, trains))

    def padded(self, gpus: int, trained: bool | None = None) -> int:
        """The same, each tensor filled up to a multiple of the GPUs: what gathering and scattering move."""
        return sum(-(-rows // gpus) * gpus * width for rows, width, trains in self.tensors if trained in (None, trains))


@dataclass(frozen=True)
class UnitUse:
    """Bytes of one unit's pass over a micro-batch, its parameters apart.

    kept: from its forward to its backward pass, inputs included; forward, backward: the most at one time in either,
    inputs and `kept` included, and in the backward pass the gradients of its parameters as they come.
    """

    kept: int
    forward: int
    backward: int


@dataclass(frozen=True)
class Unit:
    share: Share
    use: UnitUse


@dataclass(frozen=True)
class Profile:
    """The pass over one micro-batch on one GPU, whatever the number of GPUs.

    root: what is gathered for the whole pass. whole: numbers every GPU has all of
    (of these trained). fixed: time conditioning and document maps.
    modulation: one layer's time conditioning. tail: the final norm, the head and the loss.
    """

    units: tuple[Unit, ...]
    root: Share
    head: int
    whole: int
    whole_trained: int
    fixed: int
    modulation: int
    tail: UnitUse
    per_tower: int
    itemsize: int

    def kept(self, before: int) -> int:
        """What the forward passes of the units before this one have left behind."""
        return sum(unit.use.kept for unit in self.units[:before])

    def forward(self, i: int) -> int:
        """The most at one time during a unit's forward pass, parameters apart; i = number of units: the loss."""
        use = self.units[i].use if i < len(self.units) else self.tail
        return self.fixed + self.kept(i) + use.forward

    def backward(self, i: int) -> int:
        """The same in its backward pass."""
        use = self.units[i].use if i < len(self.units) else self.tail
        return self.left(i) + use.backward

    def left(self, i: int) -> int:
        """What is there between the backward passes of units i + 1 and i, besides what unit i kept: the head's
        gradient, and the time conditioning's of the later layers, which are all added up at the end."""
        later = len(self.units) - i
        return self.fixed + self.kept(i) + (self.head + (later - 1) * self.modulation if later else 0)


class LiveBytes(TorchDispatchMode):
    """Follows every storage made inside it: `live` bytes now, `peak` since it was last set. What was there before
    counts nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._meet((args, kwargs.values()), new=False)
        out = func(*args, **kwargs)
        self._meet(out, new=True)
        return out

    def restart(self) -> None:
        self.peak = self.live

    def _meet(self, value: Any, new: bool) -> None:
        """Every tensor in an operation's arguments or results."""
        if isinstance(value, Tensor):
            self._follow(value, new)
        elif isinstance(value, list | tuple | ValuesView):
            for part in value:
                self._meet(part, new)

    def _follow(self, tensor: Tensor, new: bool) -> None:
        storage = tensor.untyped_storage()
        if (key := storage._cdata) in self._known:
            return
        self._known.add(key)
        size = storage.nbytes() if new else 0
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def build(
    config: BackboneConfig, *, dtype: torch.dtype, context: ContextRole, recompute: bool
) -> tuple[DenoisingObjective, int]:
    """The objective without storage, as `parallel.shard` hands it to a forward pass → and a tower's parameters."""
    with torch.device("meta"):
        denoiser = Tower(config)
        reader = denoiser if context == "tied" else Tower(config)
        time = TimeConditioning(config.hidden_size, config.num_layers)
    for module in [*reader.modules(), *denoiser.modules()]:
        if isinstance(module, Experts) and dtype == torch.bfloat16:
            module.forward = partial(_grouped, module)  # type: ignore[method-assign]
    options = DenoisingOptions(mask_token_id=0, train_context=context != "frozen", recompute=recompute)
    objective = DenoisingObjective(reader, denoiser, time, options)
    cast(objective, dtype)
    return objective, sum(p.numel() for p in denoiser.parameters())


def profile(
    config: BackboneConfig,
    *,
    row_length: int,
    micro_rows: int,
    block_size: int,
    dtype: torch.dtype,
    context: ContextRole = "frozen",
    recompute: bool = True,
) -> Profile:
    """Measures a micro-batch; every column is text and, for the head, masked: the most it can be. Takes seconds."""
    objective, per_tower = build(config, dtype=dtype, context=context, recompute=recompute)
    document = torch.zeros(micro_rows, row_length, dtype=torch.long, device="meta")
    layout = Layout(document, block_size, chosen=torch.arange(micro_rows * row_length // block_size, device="meta"))
    measured: dict[tuple[str, bool], UnitUse] = {}
    with FusedAttention(), LiveBytes() as live:
        change = objective.time(torch.empty(micro_rows * row_length // block_size, device="meta"))
        modulation = 3 * change[0].gate.nbytes
        _ = layout.valid_chosen, layout.block_document, layout.fresh
        fixed = live.live
        shape = (micro_rows, row_length, config.hidden_size)
        stream = torch.promote_types(dtype, torch.float32) if config.residual_in_fp32 else dtype
        for unit in objective.units:
            assert isinstance(unit, PairedLayer)
            key = (unit.denoiser.kind, unit.reads)
            if key not in measured:
                measured[key] = _measure_unit(live, unit, recompute, layout, change[0], shape, stream)
        tail = _measure_tail(live, objective, shape, stream)
    units, root, whole, trained = _shares(objective)
    kinds = [(u.denoiser.kind, u.reads) for u in objective.units if isinstance(u, PairedLayer)]
    return Profile(
        units=tuple(Unit(share, measured[key]) for share, key in zip(units, kinds, strict=True)),
        root=root,
        head=objective.head.weight.nbytes,
        whole=whole,
        whole_trained=trained,
        fixed=fixed,
        modulation=modulation,
        tail=tail,
        per_tower=per_tower,
        itemsize=dtype.itemsize,
    )


def _measure_unit(
    live: LiveBytes,
    unit: PairedLayer,
    recompute: bool,
    layout: Layout,
    change: Modulation,
    shape: tuple[int, int, int],
    stream: torch.dtype,
) -> UnitUse:
    def inputs() -> tuple[Tensor, Tensor]:
        clean = _stream(shape, stream) if unit.train_context else torch.empty(shape, dtype=stream, device="meta")
        noisy = _stream(shape, stream)
        return clean, layout.to_blocks(noisy)

    modulation = Modulation(*(part.detach().requires_grad_() for part in change))

    def forward() -> tuple[Tensor, ...]:
        clean, noisy = run_unit(unit, recompute, *inputs(), modulation, layout)
        return (clean, noisy) if unit.reads else (noisy,)  # a stream that only passes through is an input

    return _measure(live, unit, forward)


def _measure_tail(
    live: LiveBytes, objective: DenoisingObjective, shape: tuple[int, int, int], stream: torch.dtype
) -> UnitUse:
    """The final norm, the head and the loss at every column."""

    def forward() -> tuple[Tensor]:
        x = _stream(shape, stream)
        every = torch.empty(shape[0] * shape[1], dtype=torch.long, device="meta")
        hidden = objective.norm_f(x).flatten(0, 1).index_select(0, every)
        return (negative_log_likelihood(objective.head, hidden, every).sum(),)

    return _measure(live, objective, forward)


def _stream(shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
    """A residual stream as an earlier layer made it: no leaf, for autograd holds on to leaves."""
    leaf = torch.empty((), dtype=dtype, device="meta", requires_grad=True)
    return leaf.expand(shape).clone(memory_format=torch.contiguous_format)


def _measure(live: LiveBytes, module: nn.Module, forward: Callable[[], tuple[Tensor, ...]]) -> UnitUse:
    before = live.live
    live.restart()
    outputs = forward()
    peak = live.peak - before
    made = {out.untyped_storage()._cdata: out.untyped_storage().nbytes() for out in outputs}
    kept = live.live - before - sum(made.values())
    edges = [torch.autograd.graph.get_gradient_edge(out) for out in outputs if out.grad_fn is not None]
    grads = [torch.empty_like(out) for out in outputs if out.grad_fn is not None]
    del outputs
    live.restart()
    torch.autograd.backward(edges, grads)
    backward = live.peak - before
    del edges, grads
    module.zero_grad()
    return UnitUse(kept, peak, backward)


def _shares(objective: DenoisingObjective) -> tuple[list[Share], Share, int, int]:
    """The parameters of each unit and of the root, as `parallel.shard` groups them, and the numbers
    in whole ones, all and trained."""
    taken: set[nn.Parameter] = set()
    groups: list[Share] = []
    whole = trained = 0
    for module in [*objective.units, objective]:
        tensors = []
        for name, parameter in module.named_parameters():
            if parameter in taken:
                continue
            taken.add(parameter)
            if is_wide(name):
                whole += parameter.numel()
                trained += parameter.numel() * parameter.requires_grad
            else:
                rows = parameter.shape[0]
                tensors.append((rows, parameter.numel() // rows, parameter.requires_grad))
        groups.append(Share(tuple(tensors)))
    return groups[:-1], groups[-1], whole, trained


def _grouped(module: Experts, hidden: Tensor, choice: Tensor, weight: Tensor) -> Tensor:
    return experts_grouped(hidden, choice, weight, module.up_proj, module.down_proj)


class FusedAttention(TorchFunctionMode):
    """Attention that keeps what a fused kernel keeps, instead of the scores that torch's fall-back would form."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        return _Fused.apply(*args, kwargs["attn_mask"])


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        out, bias = torch.empty_like(q), torch.empty_like(mask, dtype=q.dtype)
        log_sum = torch.empty(q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
        ctx.save_for_backward(q, k, v, bias, out, log_sum)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, *_ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None
