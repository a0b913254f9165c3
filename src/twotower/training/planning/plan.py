"""What a training run needs before it is begun: memory on each GPU, hours, messages. Needs no GPU and no weights.

Parameters and activations are counted on tensors without storage (`memory.py`), FLOPs from shapes (`flops.py`); what
`parallel.shard` does to them with torch's FSDP2 is arithmetic, and here. Utilisation, bandwidth and the reserve are
assumptions: the plan names them as such.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from twotower.config import BackboneConfig, TwoTowerConfig
from twotower.errors import ArgumentError
from twotower.training.planning.flops import StepFlops, autoregressive_step, two_tower_step
from twotower.training.planning.memory import ContextRole, Profile, Share, profile

GIB = 2**30
PlanDtype = Literal["bfloat16", "float32"]
UTILISATIONS = (0.25, 0.45)  # the range that hours are given for
RECIPE_TOKENS = 2.1e12  # the released denoiser's
SHORTER = (1e9, 1e10, 1e11)
NODE = 8  # GPUs of a machine
MOST_GPUS = 1024
FP32 = 4
STATE = 4 * FP32  # of a trained number: itself, its gradient, two moments


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A run in question.

    rows: of one step over all GPUs (None: one micro-batch each); micro_rows: of one pass on one GPU. peak_tflops: one
    GPU's dense rate in dtype. Assumed: utilisation of it, recomputation counted as work; bandwidth_gb, GB/s at which
    one GPU gathers (NCCL's bus bandwidth); reserve_gib: CUDA's own, NCCL's buffers, fragments.
    """

    gpus: int = 8
    gpu_memory_gib: float = 80.0
    row_length: int = 8192
    rows: int | None = None
    micro_rows: int = 1
    block_size: int = 16
    dtype: PlanDtype = "bfloat16"
    recompute: bool = True
    context: ContextRole = "frozen"
    tokens: float = RECIPE_TOKENS
    peak_tflops: float = 989.0
    utilisation: float = 0.35
    bandwidth_gb: float = 300.0
    reserve_gib: float = 4.0

    def __post_init__(self) -> None:
        positive = ("gpus", "gpu_memory_gib", "row_length", "micro_rows", "block_size", "tokens", "peak_tflops")
        for name in (*positive, "utilisation", "bandwidth_gb"):
            if not getattr(self, name) > 0:
                raise ArgumentError(f"{name} is {getattr(self, name)}; it must be above 0")
        if self.reserve_gib < 0:
            raise ArgumentError(f"reserve_gib is {self.reserve_gib}; it must be 0 or more")
        if self.utilisation > 1:
            raise ArgumentError(f"utilisation is {self.utilisation}; it is a fraction of the peak, as 0.35")
        if self.row_length % self.block_size:
            raise ArgumentError(f"rows of {self.row_length} columns do not divide into blocks of {self.block_size}")
        if self.rows is not None and self.rows < self.gpus:
            raise ArgumentError(f"{self.rows} rows a step are fewer than {self.gpus} GPUs; each needs at least one")
        for name, choices in (("dtype", get_args(PlanDtype)), ("context", get_args(ContextRole))):
            if getattr(self, name) not in choices:
                raise ArgumentError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(choices)}")

    @property
    def step_rows(self) -> int:
        """Rows of one step over all GPUs."""
        return self.rows or self.gpus * self.micro_rows

    @property
    def micro_batches(self) -> int:
        """Passes of one GPU in one step."""
        rows = -(-self.step_rows // self.gpus)
        return -(-rows // self.micro_rows)


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Counts; trained and frozen are what the objective holds: of a frozen context neither the head nor the layers
    that nothing reads."""

    per_tower: int
    trained: int
    frozen: int


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one GPU at the fullest moment of a step.

    weights, gradients, moments: its share of what trains, in fp32; frozen: its share, in the compute dtype; root:
    embeddings, head and time conditioning, gathered for the whole pass; gathered: the unit at work and its neighbours'
    messages; kept: activations and time conditioning; working: what the pass of that one unit needs besides.
    Gradients are summed over the GPUs after each micro-batch, so none is kept whole.
    """

    weights: int
    gradients: int
    moments: int
    frozen: int
    root: int
    gathered: int
    kept: int
    working: int
    reserve: int
    moment: str

    @property
    def total(self) -> int:
        return sum(value for value in dataclasses.astuple(self) if isinstance(value, int))


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """One step of one GPU: bytes received for gathering weights and summing gradients, and the seconds of it, against
    the seconds of computing. The two overlap: the longer counts."""

    gathered: int
    reduced: int
    seconds: float
    compute_seconds: float


@dataclass(frozen=True, kw_only=True)
class Hours:
    """For so many columns: at the assumed utilisation, and at the ends of the range (`UTILISATIONS`)."""

    tokens: float
    hours: float
    slowest: float
    fastest: float


@dataclass(frozen=True, kw_only=True)
class Remedy:
    """One change, by itself, and the bytes on a GPU after it."""

    change: str
    total: int
    fits: bool


@dataclass(frozen=True, kw_only=True)
class Plan:
    """flops and autoregressive are of one row; smallest_gpus: multiple of 8, None: not even `MOST_GPUS`; kept_by: what
    one layer of each kind, both towers, keeps for the backward pass."""

    setup: Setup
    parameters: Parameters
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
        """A column's work, as a multiple of next-token training of one tower."""
        return self.flops.total / self.autoregressive.total

    def to_dict(self) -> dict[str, Any]:
        """Plain data: bytes, FLOPs, seconds, hours."""
        facts = dataclasses.asdict(self)
        facts["memory"]["total"] = self.memory.total
        for name in ("flops", "autoregressive"):
            facts[name]["total"] = getattr(self, name).total
        return facts | {"fits": self.fits, "ratio": self.ratio}


def plan_from(config: TwoTowerConfig | BackboneConfig, options: Mapping[str, Any]) -> Plan:
    """The plan of a run given by the names of `Setup`'s fields.

    Raises:
        ArgumentError: an option that does not exist, or a value without meaning.
    """
    known = {field.name for field in dataclasses.fields(Setup)}
    if unknown := sorted(set(options) - known):
        raise ArgumentError(f"plan: {', '.join(unknown)} is no option; choose from {', '.join(sorted(known))}")
    return plan(config.backbone if isinstance(config, TwoTowerConfig) else config, Setup(**options))


def plan(config: BackboneConfig, setup: Setup) -> Plan:
    """Counts everything; takes seconds whatever the size."""
    measured = _measured(config, setup)
    memory = memory_of(measured, setup)
    limit = setup.gpu_memory_gib * GIB
    flops = two_tower_step(
        config,
        setup.row_length,
        setup.block_size,
        recompute=setup.recompute,
        train_context=setup.context != "frozen",
    )
    everything = [unit.share for unit in measured.units] + [measured.root]
    kept_by: dict[str, int] = {}
    for kind, unit in zip(config.hybrid_override_pattern, measured.units, strict=True):
        kept_by[kind] = max(kept_by.get(kind, 0), unit.use.kept)
    return Plan(
        setup=setup,
        parameters=Parameters(
            per_tower=measured.per_tower,
            trained=sum(share.count(True) for share in everything) + measured.whole_trained,
            frozen=sum(share.count(False) for share in everything) + measured.whole - measured.whole_trained,
        ),
        memory=memory,
        flops=flops,
        autoregressive=autoregressive_step(config, setup.row_length, setup.block_size, recompute=setup.recompute),
        traffic=_traffic(measured, setup, flops),
        hours=tuple(_hours(setup, flops, tokens) for tokens in sorted({*SHORTER, setup.tokens})),
        remedies=() if memory.total <= limit else tuple(_remedies(config, measured, setup)),
        smallest_gpus=_smallest(measured, setup),
        kept_by=kept_by,
    )


def memory_of(measured: Profile, setup: Setup) -> Memory:
    """The fullest moment of a step: which unit is at work, forward or backward, and what is there then."""
    gpus, size = setup.gpus, measured.itemsize
    shares = [*(unit.share for unit in measured.units), measured.root]
    trained = sum(share.padded(gpus, True) for share in shares) // gpus
    frozen = sum(share.padded(gpus, False) for share in shares) // gpus
    at, gathered, activations, kept = max(_moments(measured, gpus), key=lambda moment: moment[1] + moment[2])
    alone = gpus == 1  # nothing is given back after use: every unit stays gathered
    return Memory(
        weights=FP32 * (trained + measured.whole),
        gradients=FP32 * (trained + measured.whole_trained),
        moments=2 * FP32 * (trained + measured.whole_trained),
        frozen=size * frozen,
        root=size * measured.root.count(),
        gathered=sum(size * unit.share.count() for unit in measured.units) if alone else gathered,
        kept=kept,
        working=activations - kept,
        reserve=int(setup.reserve_gib * GIB),
        moment=at,
    )


def _moments(measured: Profile, gpus: int) -> Iterator[tuple[str, int, int, int]]:
    """(when, bytes of gathered weights and messages, bytes of activations, of these kept) through a step, as FSDP2
    goes: a unit's weights are gathered into one message, copied out of it and dropped after use. Forward, a message
    is there until the next one has come; backward, the next one is on its way meanwhile, and gradients leave in an
    fp32 message that is there until the next unit's."""
    size, units = measured.itemsize, measured.units
    message = [size * unit.share.padded(gpus) for unit in units]
    copied = [size * unit.share.count() for unit in units]
    grads = [size * unit.share.count(True) for unit in units]
    leaving = [FP32 * unit.share.padded(gpus, True) for unit in units] + [0]
    count = len(units)
    for i in range(count):
        kept = measured.fixed + measured.kept(i)
        arriving = message[i] + max(message[i - 1] if i else 0, copied[i])
        yield f"layer {i}, gathered for its forward pass", arriving, kept, kept
        yield f"layer {i}, forward", copied[i] + message[i], measured.forward(i), kept
    kept = measured.fixed + measured.kept(count)
    yield "the loss, forward", message[-1], measured.forward(count), kept
    yield "the loss, backward", message[-1], measured.backward(count), kept
    for i in reversed(range(count)):
        kept = measured.left(i) + units[i].use.kept
        before = message[i - 1] if i else 0
        yield f"layer {i}, gathered for its backward pass", copied[i] + message[i] + leaving[i + 1], kept, kept
        yield f"layer {i}, backward", copied[i] + before + leaving[i + 1], measured.backward(i), kept
        yield f"layer {i}, its gradients sent", grads[i] + leaving[i] + before, measured.left(i), measured.left(i)
    root = size * measured.root.count(True) + FP32 * measured.root.padded(gpus, True)
    yield "embeddings' and head's gradients sent", root, measured.left(0), measured.left(0)


def _traffic(measured: Profile, setup: Setup, flops: StepFlops) -> Traffic:
    shares: list[Share] = [*(unit.share for unit in measured.units), measured.root]
    moved = (setup.gpus - 1) / setup.gpus
    passes = 2 * setup.micro_batches  # forward and backward gather anew
    gathered = int(moved * passes * measured.itemsize * sum(share.padded(setup.gpus) for share in shares))
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


def _remedies(config: BackboneConfig, measured: Profile, setup: Setup) -> Iterator[Remedy]:
    """What would help, each change by itself, the cheapest first."""

    def remedy(change: str, changed: Setup, anew: bool = True) -> Remedy:
        total = memory_of(_measured(config, changed) if anew else measured, changed).total
        return Remedy(change=change, total=total, fits=total <= setup.gpu_memory_gib * GIB)

    if not setup.recompute:
        yield remedy("recomputation", dataclasses.replace(setup, recompute=True))
    if setup.micro_rows > 1:
        rows = None if setup.rows is None or setup.micro_batches == 1 else setup.rows
        yield remedy("micro-batches of 1 row", dataclasses.replace(setup, micro_rows=1, rows=rows))
    if fewest := _smallest(measured, setup):
        yield remedy(f"{fewest} GPUs", _on(setup, fewest), anew=False)
    columns = setup.row_length // 2
    if columns >= 512 and columns % setup.block_size == 0:
        yield remedy(f"rows of {columns} columns", dataclasses.replace(setup, row_length=columns))


def _smallest(measured: Profile, setup: Setup) -> int | None:
    limit = setup.gpu_memory_gib * GIB

    counts = range(NODE, MOST_GPUS + 1, NODE)
    return next((gpus for gpus in counts if memory_of(measured, _on(setup, gpus)).total <= limit), None)


def _on(setup: Setup, gpus: int) -> Setup:
    """The same run on other GPUs: as many rows a step, or at least one for each."""
    rows = None if setup.rows is None else max(setup.rows, gpus)
    return dataclasses.replace(setup, gpus=gpus, rows=rows)


def _measured(config: BackboneConfig, setup: Setup) -> Profile:
    return profile(
        config,
        row_length=setup.row_length,
        micro_rows=setup.micro_rows,
        block_size=setup.block_size,
        dtype=getattr(torch, setup.dtype),
        context=setup.context,
        recompute=setup.recompute,
    )
