"""The memory of a training pass, measured on tensors without storage.

One unit of each kind of the objective runs forward and backward on the meta device. Every storage is tracked until it
is freed, so that saved and temporary tensors both count, and no formula repeats the model. Two operations are replaced
(`meta_ops.py`): in bf16, routed experts use the grouped backend, as on CUDA (in fp32 they loop, as there). Attention
saves what a fused kernel saves. Memory that a kernel allocates internally is not counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from twotower.model.attention import Attention
from twotower.model.conditioning import Modulation, TimeConditioning
from twotower.model.fp32_tensors import cast, keeps_fp32
from twotower.model.packed_layout import Layout
from twotower.model.tower import Tower
from twotower.specs import LayerSpec, TowerSpec
from twotower.training.adapter_objective import AdapterObjective, AdapterOptions
from twotower.training.layer_pair import LayerPair, run_unit
from twotower.training.logits import negative_log_likelihood
from twotower.training.objective import DenoisingObjective, DenoisingOptions
from twotower.training.planning.live_bytes import LiveBytes
from twotower.training.planning.meta_ops import FusedAttention, tower_of_cuda
from twotower.training.planning.plan_setup import ContextRole
from twotower.training.planning.profile import Profile, Share, Unit, UnitUse
from twotower.training.recipe import ADAPTER_RECIPE, AS_RELEASED
from twotower.training.targets import ONLY_TOKENS, Examples, Targets, target_losses

TEACHER = replace(AS_RELEASED, targets=Targets.parse("kl:0.7+tokens:0.3"))
AnyObjective = DenoisingObjective | AdapterObjective


def build(
    spec: TowerSpec,
    *,
    dtype: torch.dtype,
    context: ContextRole,
    activation_checkpointing: bool,
    adapters: int | None = None,
    draft_head: int | None = None,
    teacher: bool = False,
    denoiser_spec: TowerSpec | None = None,
) -> tuple[AnyObjective, int]:
    """The objective on the meta device, in the dtypes of a forward pass under FSDP; and the parameters of a tower."""
    objective: AnyObjective
    if adapters is not None:
        with torch.device("meta"):
            tower = tower_of_cuda(spec, dtype)
            count = sum(p.numel() for p in tower.parameters())
            tower.add_adapters(adapters, 0)
            _add_draft_head(tower, draft_head)
        recipe = ADAPTER_RECIPE if teacher else replace(ADAPTER_RECIPE, targets=ONLY_TOKENS)
        own = AdapterOptions(mask_token_id=0, activation_checkpointing=activation_checkpointing, recipe=recipe)
        objective = AdapterObjective(tower, own)
        cast(objective, dtype)
        return objective, count
    with torch.device("meta"):
        denoiser = tower_of_cuda(denoiser_spec or spec, dtype)
        reader = denoiser if context == "tied" else tower_of_cuda(spec, dtype)
        _add_draft_head(denoiser, draft_head)
        time = TimeConditioning(spec.hidden_size, denoiser.spec.num_layers)
    options = DenoisingOptions(
        mask_token_id=0,
        train_context=context != "frozen",
        activation_checkpointing=activation_checkpointing,
        recipe=TEACHER if teacher else AS_RELEASED,
    )
    objective = DenoisingObjective(reader, denoiser, time, options)
    cast(objective, dtype)
    return objective, sum(p.numel() for p in reader.parameters())


def _add_draft_head(tower: Tower, rank: int | None) -> None:
    if rank is not None:
        tower.add_draft_head(rank)


def measure_profile(
    spec: TowerSpec,
    *,
    row_length: int,
    micro_batch_size: int,
    block_size: int,
    dtype: torch.dtype,
    context: ContextRole = "frozen",
    activation_checkpointing: bool = True,
    adapters: int | None = None,
    draft_head: int | None = None,
    teacher: bool = False,
    denoiser: TowerSpec | None = None,
) -> Profile:
    """Measures a micro-batch in the worst case: every position is text and, for the head, masked. Takes seconds.

    denoiser: its layers, if they are not those of the context tower.
    """
    objective, per_tower = build(
        spec,
        dtype=dtype,
        context=context,
        activation_checkpointing=activation_checkpointing,
        adapters=adapters,
        draft_head=draft_head,
        teacher=teacher,
        denoiser_spec=denoiser,
    )
    blocks = micro_batch_size * row_length // block_size
    document = torch.zeros(micro_batch_size, row_length, dtype=torch.long, device="meta")
    prefix = None if adapters is None else torch.zeros(blocks, dtype=torch.long, device="meta")
    layout = Layout(document, block_size, torch.arange(blocks, device="meta"), prefix)
    stream = torch.promote_types(dtype, torch.float32) if spec.residual_in_fp32 else dtype
    measured: dict[tuple[LayerSpec, LayerSpec | None, bool], UnitUse] = {}
    with FusedAttention(), LiveBytes() as live:
        own = None
        if isinstance(objective, DenoisingObjective) and objective.time is not None:
            own = objective.time(torch.empty(blocks, device="meta"))[0]
        _ = layout.chosen_token_mask, layout.block_document, layout.starts_document, layout.causal_queries
        for module in (part for part in tower_of(objective).modules() if isinstance(part, Attention)):
            _ = [layout.rotation(module.rope, stream, chosen=chosen) for chosen in (False, True)]
        fixed = live.live
        shape = (micro_batch_size, row_length, spec.hidden_size)
        for unit in objective.units:
            assert isinstance(unit, LayerPair)
            if (key := _kind(unit)) not in measured:
                measured[key] = _measure_unit(live, unit, activation_checkpointing, layout, own, shape, stream)
        tail = _measure_tail(live, objective, shape, stream)
    units, root, replicated, trained = _shares(objective)
    pairs = zip(units, (unit for unit in objective.units if isinstance(unit, LayerPair)), strict=True)
    return Profile(
        units=tuple(Unit(share, measured[_kind(unit)], _gathers(unit)) for share, unit in pairs),
        root=root,
        head=objective.head.weight.nbytes if objective.head.weight.requires_grad else 0,
        tied_head=spec.tied_head,
        replicated=replicated,
        replicated_trained=trained,
        fixed=fixed,
        modulation=0 if own is None else 3 * own.gate.nbytes,
        tail=tail,
        per_tower=per_tower,
        denoiser=per_tower if adapters is not None else sum(p.numel() for p in tower_of(objective).parameters()),
        itemsize=dtype.itemsize,
    )


def _gathers(unit: LayerPair) -> int:
    """See `Unit.gathers`."""
    return 2 if unit.denoiser is not None or unit.train_context else int(unit.runs_context)


def _kind(unit: LayerPair) -> tuple[LayerSpec, LayerSpec | None, bool]:
    """What the memory of a unit depends on: the options of its layers, and whether the context layer runs."""
    own = None if unit.denoiser is None else replace(unit.denoiser.spec, source=0)
    return replace(unit.context.spec, source=0), own, unit.runs_context


def _measure_unit(
    live: LiveBytes,
    unit: LayerPair,
    activation_checkpointing: bool,
    layout: Layout,
    change: Modulation | None,
    shape: tuple[int, int, int],
    stream: torch.dtype,
) -> UnitUse:
    if unit.denoiser is None and not unit.runs_context:
        return UnitUse(0, 0, 0)

    def inputs() -> tuple[Tensor, Tensor]:
        clean = _stream(shape, stream) if unit.train_context else torch.empty(shape, dtype=stream, device="meta")
        noisy = _stream(shape, stream)
        return clean, layout.to_blocks(noisy)

    modulation = None if change is None else Modulation(*(part.detach().requires_grad_() for part in change))

    def forward() -> tuple[Tensor, ...]:
        clean, noisy = inputs()
        given = (None, None) if unit.denoiser is None else (noisy, modulation)
        made = run_unit(unit, activation_checkpointing, clean, *given, layout)
        return tuple(stream for stream in made if stream is not None)  # an unchanged stream is no output

    return _measure(live, unit, forward)


def _measure_tail(
    live: LiveBytes, objective: AnyObjective, shape: tuple[int, int, int], stream: torch.dtype
) -> UnitUse:
    """The final norm, the head and the loss at every position; with a teacher, its norm and head too."""
    tower, recipe = tower_of(objective), objective.options.recipe

    def forward() -> tuple[Tensor]:
        x = _stream(shape, stream)
        every, at = (torch.empty(shape[0] * shape[1], dtype=torch.long, device="meta") for _ in range(2))
        if isinstance(objective, DenoisingObjective) and not recipe.targets.teacher:
            hidden = objective.norm_f(x).flatten(0, 1).index_select(0, at)
            return (negative_log_likelihood(tower, hidden, every, every).sum(),)
        if isinstance(objective, AdapterObjective):
            hidden = objective.norm_f(x.flatten(0, 1).index_select(0, at))
        else:
            hidden = objective.norm_f(x).flatten(0, 1).index_select(0, at)
        examples = Examples(hidden, torch.empty_like(hidden), every, torch.empty_like(every, dtype=torch.bool), every)
        return (target_losses(recipe.targets, tower, tower, 0, examples).sum(),)

    return _measure(live, objective, forward)


def _stream(shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
    """A residual stream as the output of an earlier layer: not a leaf, because autograd keeps leaves alive."""
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


def tower_of(objective: AnyObjective) -> Tower:
    """The tower whose passes are trained."""
    return objective.tower if isinstance(objective, AdapterObjective) else objective.denoiser


def _shares(objective: AnyObjective) -> tuple[list[Share], Share, int, int]:
    """The parameters of each unit and of the root, as `fsdp.shard` groups them; replicated and trained elements."""
    taken: set[nn.Parameter] = set()
    groups: list[Share] = []
    replicated = trained = 0
    for module in [*objective.units, objective]:
        tensors = []
        for name, parameter in module.named_parameters():
            if parameter in taken:
                continue
            taken.add(parameter)
            if keeps_fp32(name):
                replicated += parameter.numel()
                trained += parameter.numel() * parameter.requires_grad
            else:
                rows = parameter.shape[0]
                tensors.append((rows, parameter.numel() // rows, parameter.requires_grad))
        groups.append(Share(tuple(tensors)))
    return groups[:-1], groups[-1], replicated, trained
