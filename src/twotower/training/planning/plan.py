"""Estimates what a training run needs: memory on each GPU, hours, communication. Needs no GPU and no weights.

Parameters and activations are measured on tensors without storage (`memory.py`), FLOPs are computed from shapes
(`flops.py`). The effect of sharding with torch's FSDP2 is computed here and in `step_memory.py`. Utilisation,
bandwidth and the memory reserve are assumptions, and the plan says so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from twotower.config import TwoTowerConfig
from twotower.errors import ArgumentError
from twotower.families import tower_spec
from twotower.families.denoiser import denoiser_of
from twotower.specs import TowerSpec
from twotower.training.planning.flops import StepFlops, adapter_step, autoregressive_step, two_tower_step
from twotower.training.planning.memory import measure_profile
from twotower.training.planning.plan_setup import GIB, Setup
from twotower.training.planning.profile import Profile, Share
from twotower.training.planning.step_memory import FP32, Memory, memory_of

UTILISATIONS = (0.25, 0.45)  # hours are also given for the ends of this range
SHORTER = (1e9, 1e10, 1e11)
NODE = 8  # GPUs of a machine
MOST_GPUS = 1024


@dataclass(frozen=True, kw_only=True)
class TrainedParameters:
    """Numbers of parameters. per_tower: of the context tower; denoiser: of the denoiser tower.

    The objective of a frozen context tower excludes its head and the layers that are not run.
    """

    per_tower: int
    denoiser: int
    trained: int
    frozen: int


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Communication of one GPU in one step: bytes of gathered weights and of reduced gradients, and seconds.

    compute_seconds: of the step's computation. Communication and computation overlap, so the longer one counts.
    """

    gathered: int
    reduced: int
    seconds: float
    compute_seconds: float


@dataclass(frozen=True, kw_only=True)
class Hours:
    """Hours for a number of tokens: at the assumed utilisation and at the ends of `UTILISATIONS`."""

    tokens: float
    hours: float
    slowest: float
    fastest: float


@dataclass(frozen=True, kw_only=True)
class Remedy:
    """A single change of the setup, and the bytes on a GPU with it."""

    change: str
    total: int
    fits: bool


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The plan of a run. flops, autoregressive: of one row.

    smallest_gpus: a multiple of 8, for adapters also 1, 2 or 4; None: even `MOST_GPUS` are too few. kept_by: bytes that
    a layer pair of each kind keeps for the backward pass.
    """

    setup: Setup
    parameters: TrainedParameters
    memory: Memory
    flops: StepFlops
    autoregressive: StepFlops
    traffic: Traffic
    hours: tuple[Hours, ...]
    remedies: tuple[Remedy, ...]
    smallest_gpus: int | None
    kept_by: dict[str, int]

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.setup.gpu_memory_gib * GIB

    @property
    def ratio(self) -> float:
        """FLOPs per token, relative to next-token training of one tower."""
        return self.flops.total / self.autoregressive.total

    def to_dict(self) -> dict[str, object]:
        """The plan as plain data: bytes, FLOPs, seconds, hours."""
        facts = dataclasses.asdict(self)
        facts["memory"]["total"] = self.memory.total
        for name in ("flops", "autoregressive"):
            facts[name]["total"] = getattr(self, name).total
        return facts | {"fits": self.fits, "ratio": self.ratio}


def plan_from(config: TwoTowerConfig | TowerSpec, options: Mapping[str, Any]) -> Plan:
    """The plan of a run that is given by the names of `Setup`'s fields.

    Raises:
        ArgumentError: an unknown option, or an invalid value.
    """
    known = {field.name for field in dataclasses.fields(Setup)}
    if unknown := sorted(set(options) - known):
        raise ArgumentError(f"plan: unknown option {', '.join(unknown)}; choose from {', '.join(sorted(known))}")
    if not isinstance(config, TwoTowerConfig):
        return make_plan(config, Setup(**options))
    context, setup = tower_spec(config), Setup(**options)
    denoiser = denoiser_of(config, context)
    if denoiser is not context and setup.context == "tied":
        raise ArgumentError("plan: one network for both towers (--tie) needs a denoiser with all layers; leave it out")
    return make_plan(context, setup, denoiser)


def make_plan(spec: TowerSpec, setup: Setup, denoiser: TowerSpec | None = None) -> Plan:
    """Makes the plan of a run. Takes seconds for a model of any size.

    denoiser: its layers, if they are not those of the context tower.
    """
    measured = _measured(spec, setup, denoiser)
    memory = memory_of(measured, setup)
    limit = setup.gpu_memory_gib * GIB
    flops = _flops(spec, setup, denoiser)
    everything = [unit.share for unit in measured.units] + [measured.root]
    kept_by: dict[str, int] = {}
    for kind, unit in zip(spec.pattern, measured.units, strict=True):
        kept_by[kind] = max(kept_by.get(kind, 0), unit.use.kept)
    return Plan(
        setup=setup,
        parameters=TrainedParameters(
            per_tower=measured.per_tower,
            denoiser=measured.denoiser,
            trained=sum(share.count(True) for share in everything) + measured.replicated_trained,
            frozen=sum(share.count(False) for share in everything) + measured.replicated - measured.replicated_trained,
        ),
        memory=memory,
        flops=flops,
        autoregressive=autoregressive_step(
            spec, setup.row_length, setup.block_size, activation_checkpointing=setup.activation_checkpointing
        ),
        traffic=_traffic(measured, setup, flops),
        hours=tuple(_hours(setup, flops, tokens) for tokens in sorted({*SHORTER, setup.tokens})),
        remedies=() if memory.total <= limit else tuple(_remedies(spec, measured, setup, denoiser)),
        smallest_gpus=_smallest(measured, setup),
        kept_by=kept_by,
    )


def _flops(spec: TowerSpec, setup: Setup, denoiser: TowerSpec | None) -> StepFlops:
    sizes = setup.row_length, setup.block_size
    if setup.adapters is not None:
        return adapter_step(
            spec,
            setup.adapters,
            *sizes,
            draft_head=setup.draft_head,
            activation_checkpointing=setup.activation_checkpointing,
            teacher=setup.teacher,
        )
    return two_tower_step(
        spec,
        *sizes,
        activation_checkpointing=setup.activation_checkpointing,
        train_context=setup.context != "frozen",
        teacher=setup.teacher,
        denoiser=denoiser,
        draft_head=setup.draft_head,
    )


def _traffic(measured: Profile, setup: Setup, flops: StepFlops) -> Traffic:
    shares: list[Share] = [*(unit.share for unit in measured.units), measured.root]
    moved = (setup.gpus - 1) / setup.gpus
    # The forward and the backward pass each gather the weights of most units.
    counts = [*(unit.gathers for unit in measured.units), 2]
    elements = sum(count * share.padded(setup.gpus) for count, share in zip(counts, shares, strict=True))
    gathered = int(moved * setup.micro_batches * measured.itemsize * elements)
    reduced = int(moved * setup.micro_batches * FP32 * sum(share.padded(setup.gpus, True) for share in shares))
    rows = setup.step_rows / setup.gpus
    return Traffic(
        gathered=gathered,
        reduced=reduced,
        seconds=(gathered + reduced) / (setup.bandwidth_gb * 1e9),
        compute_seconds=rows * flops.total / (setup.peak_tflops * 1e12 * setup.utilisation),
    )


def _hours(setup: Setup, flops: StepFlops, tokens: float) -> Hours:
    def at(utilisation: float) -> float:
        return tokens * flops.total / setup.row_length / (setup.gpus * setup.peak_tflops * 1e12 * utilisation) / 3600

    return Hours(
        tokens=tokens, hours=at(setup.utilisation), slowest=at(min(UTILISATIONS)), fastest=at(max(UTILISATIONS))
    )


def _remedies(spec: TowerSpec, measured: Profile, setup: Setup, denoiser: TowerSpec | None) -> Iterator[Remedy]:
    """Single changes that reduce memory, the cheapest first."""

    def remedy(change: str, changed: Setup, anew: bool = True) -> Remedy:
        total = memory_of(_measured(spec, changed, denoiser) if anew else measured, changed).total
        return Remedy(change=change, total=total, fits=total <= setup.gpu_memory_gib * GIB)

    if not setup.activation_checkpointing:
        yield remedy("recomputation", dataclasses.replace(setup, activation_checkpointing=True))
    if setup.micro_batch_size > 1:
        batch_size = None if setup.micro_batches == 1 else setup.batch_size
        yield remedy("micro-batches of 1 row", dataclasses.replace(setup, micro_batch_size=1, batch_size=batch_size))
    if fewest := _smallest(measured, setup):
        yield remedy(f"{fewest} GPU{'s'[: fewest > 1]}", setup.on(fewest), anew=False)
    length = setup.row_length // 2
    if length >= 512 and length % setup.block_size == 0:
        yield remedy(f"rows of {length} tokens", dataclasses.replace(setup, row_length=length))


def _smallest(measured: Profile, setup: Setup) -> int | None:
    limit = setup.gpu_memory_gib * GIB

    few = () if setup.adapters is None else (1, 2, 4)
    counts = (*few, *range(NODE, MOST_GPUS + 1, NODE))
    return next((gpus for gpus in counts if memory_of(measured, setup.on(gpus)).total <= limit), None)


def _measured(spec: TowerSpec, setup: Setup, denoiser: TowerSpec | None) -> Profile:
    return measure_profile(
        spec,
        row_length=setup.row_length,
        micro_batch_size=setup.micro_batch_size,
        block_size=setup.block_size,
        dtype=getattr(torch, setup.dtype),
        context=setup.context,
        activation_checkpointing=setup.activation_checkpointing,
        adapters=setup.adapters,
        draft_head=setup.draft_head,
        teacher=setup.teacher,
        denoiser=denoiser,
    )
