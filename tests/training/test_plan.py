"""The training plan, compared with torch's FLOP counter, the CPU's allocator and FSDP2."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from conftest import SHAPE, build_random_model, random_two_tower
from shaped_models import SHAPES as SHAPED
from shaped_models import config_of
from tiny_backbones import CORE, SHAPES, two_tower
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity
from torch.utils.flop_counter import FlopCounterMode

from twotower import TwoTowerConfig
from twotower.cli.plan_page import render
from twotower.config import GenericTwoTowerConfig
from twotower.errors import ArgumentError
from twotower.families import tower_spec
from twotower.model.moe import Experts
from twotower.training.adapter_objective import AdapterObjective, AdapterOptions
from twotower.training.data.batch import Batch
from twotower.training.noise import Corruption
from twotower.training.objective import AutoregressiveObjective, DenoisingObjective, DenoisingOptions
from twotower.training.planning.flops import adapter_step, autoregressive_step, two_tower_step
from twotower.training.planning.live_bytes import LiveBytes
from twotower.training.planning.memory import measure_profile
from twotower.training.planning.meta_ops import GroupedExperts
from twotower.training.planning.plan import Plan, make_plan, plan_from
from twotower.training.planning.plan_setup import GIB, Setup
from twotower.training.planning.profile import Profile
from twotower.training.planning.step_memory import memory_of
from twotower.training.recipe import RecipeChoices

RELEASED = Path(__file__).parents[1] / "golden" / "released"
BLOCK, RANK = 16, 6
slow = pytest.mark.slow
WIDE = SHAPE | {"hidden_size": 64, "head_dim": 16, "mamba_num_heads": 8, "mamba_head_dim": 16, "intermediate_size": 128}


def objective_of(
    pattern: str, dtype: torch.dtype = torch.float32, context: str = "frozen", activation_checkpointing: bool = False
) -> DenoisingObjective:
    """pattern: of a Nemotron-H model, or a name of `SHAPES`, or of denoisers that lack layers."""
    if pattern in SHAPED:
        model = random_two_tower(config_of(pattern), 5, dtype)
    else:
        model = (
            two_tower(pattern, dtype=dtype) if pattern in SHAPES else build_random_model(pattern, dtype=dtype, **WIDE)
        )
    assert model.denoiser is not None
    assert model.time is not None
    denoiser = model.context if context == "tied" else model.denoiser
    options = DenoisingOptions(
        mask_token_id=3, activation_checkpointing=activation_checkpointing, train_context=context != "frozen"
    )
    return DenoisingObjective(model.context, denoiser, model.time, options)


def adapters_of(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> AdapterObjective:
    """name: of `SHAPES`."""
    model = two_tower(name, dtype=dtype, rank=RANK)
    return AdapterObjective(model.context, AdapterOptions(mask_token_id=3, **options))


def rows(count: int, length: int, masked: float, block: int = BLOCK) -> tuple[Batch, Corruption]:
    """Rows of one document each; in every four positions, the first share is masked."""
    every = torch.ones(count, length, dtype=torch.bool)
    tokens = torch.randint(4, 64, (count, length), generator=torch.Generator().manual_seed(0))
    batch = Batch(tokens, torch.zeros_like(tokens), every, every, ~every, torch.arange(count))
    hidden = (torch.arange(length) % 4 < 4 * masked).expand(count, -1)
    return batch, Corruption(torch.full((count, length // block), masked), hidden)


# --- FLOPs ---------------------------------------------------------------------------------------------------------


def solve_flops(system: torch.Size, right: torch.Size, *_: object, **__: object) -> int:
    """A multiply-add for each entry of the triangle, in each column of the right-hand side."""
    return math.prod(right) * system[-1]


SOLVES = {torch.ops.aten.linalg_solve_triangular: solve_flops}  # torch has no figure


@pytest.mark.parametrize(
    ("pattern", "activation_checkpointing", "context"),
    [
        ("M*E-ME", False, "frozen"),
        ("M*E-ME", True, "trained"),
        ("E*", True, "frozen"),
        ("hybrid, fewer experts", True, "frozen"),
        ("hybrid, dense", False, "trained"),
        *(
            pytest.param(name, at % 2 == 0, ("frozen", "trained")[at % 2], marks=() if name in CORE else slow)
            for at, name in enumerate(SHAPES)
        ),
    ],
)
def test_flops_are_those_that_torch_counts(pattern: str, activation_checkpointing: bool, context: str) -> None:
    objective = objective_of(pattern, context=context, activation_checkpointing=activation_checkpointing)
    config = objective.context.spec
    batch, noise = rows(1, 320, masked=0.5, block=4)  # 80 blocks: their states are combined in groups
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=SOLVES) as counter:
        objective(batch, noise, 4).backward()
    counted = two_tower_step(
        config,
        320,
        4,
        activation_checkpointing=activation_checkpointing,
        train_context=context != "frozen",
        denoiser=objective.denoiser.spec,
    ).total
    assert counted == pytest.approx(counter.get_total_flops(), rel=1e-6)


@pytest.mark.parametrize("activation_checkpointing", [False, True])
@pytest.mark.parametrize("name", ["nemotron_h", "llama", "qwen3_next", "qwen2_moe"])
def test_flops_of_adapters_are_those_that_torch_counts(name: str, activation_checkpointing: bool) -> None:
    objective = adapters_of(name, activation_checkpointing=activation_checkpointing)
    batch, noise = rows(1, 320, masked=0.5, block=4)  # adapters act everywhere, and half of the columns are trained
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=SOLVES) as counter:
        objective(batch, noise, 4).backward()
    step = adapter_step(
        objective.tower.spec, RANK, 320, 4, activation_checkpointing=activation_checkpointing, trained_share=159 / 320
    )
    assert step.total == pytest.approx(counter.get_total_flops(), rel=1e-6 if not activation_checkpointing else 0.03)


def test_flops_of_a_teacher_are_those_that_torch_counts() -> None:
    model = build_random_model("M*E-", **WIDE)
    assert model.denoiser is not None
    assert model.time is not None
    recipe = RecipeChoices(targets="kl:0.7+tokens:0.3").resolve(gated=False)
    options = DenoisingOptions(mask_token_id=3, recipe=recipe)
    objective = DenoisingObjective(model.context, model.denoiser, model.time, options)
    batch, noise = rows(1, 320, masked=0.5, block=4)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        objective(batch, noise, 4).backward()
    step = two_tower_step(model.spec, 320, 4, activation_checkpointing=False, teacher=True)
    assert step.total == pytest.approx(counter.get_total_flops(), rel=1e-6)


def test_flops_of_next_token_training_are_those_that_torch_counts() -> None:
    model = build_random_model("M*E-ME", **WIDE)
    batch, _ = rows(1, 256, masked=0.5)
    for activation_checkpointing in (False, True):
        objective = AutoregressiveObjective(model.context, activation_checkpointing=activation_checkpointing)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            objective(batch, None, BLOCK).backward()
        counted = autoregressive_step(model.spec, 256, BLOCK, activation_checkpointing=activation_checkpointing).total
        assert counted == pytest.approx(counter.get_total_flops(), rel=1e-6)


# --- memory -------------------------------------------------------------------------------------------------------


def peak_of(measured: Profile) -> int:
    steps = range(len(measured.units) + 1)
    return max(max(measured.forward(i), measured.backward(i)) for i in steps)


@pytest.mark.parametrize(
    ("pattern", "dtype", "context", "activation_checkpointing", "tolerance"),
    [
        ("M*-M", torch.float32, "frozen", False, 0.002),
        ("MM-", torch.float32, "frozen", True, 0.02),
        ("*-M", torch.float32, "tied", True, 0.02),
        ("M*E-ME", torch.float32, "frozen", True, 0.02),
        ("M*E-ME", torch.bfloat16, "frozen", False, 0.002),
        ("M*E-ME", torch.bfloat16, "frozen", True, 0.01),
        ("hybrid, fewer experts", torch.bfloat16, "frozen", True, 0.02),
        *(
            pytest.param(name, torch.bfloat16, "frozen", at % 2 == 0, 0.02, marks=() if name in CORE else slow)
            for at, name in enumerate(SHAPES)
        ),
    ],
)
def test_activations_are_those_of_a_real_pass(
    pattern: str, dtype: torch.dtype, context: str, activation_checkpointing: bool, tolerance: float
) -> None:
    objective = objective_of(pattern, dtype, context, activation_checkpointing)
    for module in objective.modules():
        if isinstance(module, Experts) and dtype == torch.bfloat16:
            module.__class__ = GroupedExperts  # as on CUDA; on a CPU they loop over the experts
    for parameter in objective.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    batch, noise = rows(2, 256, masked=1.0)
    with LiveBytes() as live:
        loss = objective(batch, noise, BLOCK)
        kept = live.live
        loss.backward()
    measured = measure_profile(
        objective.context.spec,
        denoiser=objective.denoiser.spec,
        row_length=256,
        micro_batch_size=2,
        block_size=BLOCK,
        dtype=dtype,
        context=context,
        activation_checkpointing=activation_checkpointing,
    )
    assert peak_of(measured) == pytest.approx(live.peak, rel=tolerance)
    if context == "frozen":  # otherwise the last context layer's output, which no loss reads, is freed
        count = len(measured.units)
        # After the forward pass the context's rotations are freed; the plan counts them until the end.
        rel = 0.01 if pattern in SHAPES else 0.005
        assert measured.fixed + measured.kept(count) + measured.tail.kept == pytest.approx(kept, rel=rel)


@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_activations_of_adapters_are_those_of_a_real_pass(activation_checkpointing: bool) -> None:
    objective = adapters_of("nemotron_h", torch.bfloat16, activation_checkpointing=activation_checkpointing)
    for module in objective.modules():
        if isinstance(module, Experts):
            module.__class__ = GroupedExperts
    for parameter in objective.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    batch, noise = rows(2, 256, masked=1.0)
    with LiveBytes() as live:
        objective(batch, noise, BLOCK).backward()
    measured = measure_profile(
        objective.tower.spec,
        row_length=256,
        micro_batch_size=2,
        block_size=BLOCK,
        dtype=torch.bfloat16,
        activation_checkpointing=activation_checkpointing,
        adapters=RANK,
        teacher=True,
    )
    assert peak_of(measured) == pytest.approx(live.peak, rel=0.03)


def test_a_plan_of_a_denoiser_that_lacks_layers() -> None:
    """It trains fewer parameters in fewer hours, and one network for both towers is refused."""
    config = config_of("hybrid, fewer experts")
    full = GenericTwoTowerConfig(backbone=config.backbone, mask_token_id=3)
    options = {"gpus": 8, "row_length": 64}
    own, whole = (plan_from(each, options) for each in (config, full))
    assert own.parameters.trained < whole.parameters.trained
    assert own.parameters.per_tower == whole.parameters.per_tower == whole.parameters.denoiser
    assert own.parameters.denoiser < own.parameters.per_tower
    assert own.traffic.gathered < whole.traffic.gathered
    assert "of the context tower, " in render(own)
    assert own.hours[-1].hours < whole.hours[-1].hours
    assert own.memory.moments < whole.memory.moments
    with pytest.raises(ArgumentError, match="one network for both towers"):
        plan_from(config, {**options, "context": "tied"})


@contextmanager
def allocated() -> Iterator[list[int]]:
    """The peak of the CPU allocator in a `with` block, above the bytes before it."""
    most: list[int] = []
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        yield most
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    most.append(peak)


def shard_over_eight() -> None:
    """FSDP2 as the first of eight processes, of which the others do not exist: messages are allocated but not filled.

    Prints the planned bytes and the allocator's bytes for each setup.
    """
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from twotower.training.fsdp import World, local, shard

    torch.set_num_threads(1)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    world = World(0, 8, torch.device("cpu"), init_device_mesh("cpu", (8,)))
    shape = WIDE | {"hidden_size": 128, "n_routed_experts": 16, "moe_intermediate_size": 256}
    shape |= {"intermediate_size": 512}
    found = []
    for pattern, length, activation_checkpointing in (
        ("M*EME", 128, True), ("-M*", 256, False), ("qwen2", 128, False), ("llama", 16, True), ("qwen3", 16, True),
    ):  # fmt: skip
        model = (
            two_tower(pattern, vocab_size=160 if length > 16 else 4096)  # short rows: embeddings need most memory
            if pattern in SHAPES
            else build_random_model(pattern, **shape)
        )
        assert model.denoiser is not None
        assert model.time is not None
        options = DenoisingOptions(mask_token_id=3, activation_checkpointing=activation_checkpointing)
        objective = DenoisingObjective(model.context, model.denoiser, model.time, options)
        shard(objective, objective.units, world, torch.bfloat16)
        batch, noise = rows(1, length, masked=1.0)
        objective(batch, noise, BLOCK).backward()  # from here on gradients exist, as after the first step
        with allocated() as most:
            objective(batch, noise, BLOCK).backward()
        setup = Setup(row_length=length, activation_checkpointing=activation_checkpointing)
        measured = measure_profile(
            model.spec, row_length=length, micro_batch_size=1, block_size=BLOCK, dtype=torch.bfloat16,
            activation_checkpointing=activation_checkpointing,
        )  # fmt: skip
        planned = memory_of(measured, setup)
        own = [local(parameter) for parameter in objective.parameters()]
        found.append(
            {
                "weights": [planned.weights + planned.frozen, sum(t.untyped_storage().nbytes() for t in own)],
                "step": [planned.root + planned.gathered + planned.kept + planned.working, most[0]],
            }
        )
    dist.destroy_process_group()
    print(json.dumps(found))


@pytest.mark.slow  # in a new process, for ten seconds
def test_memory_is_that_of_fsdp() -> None:
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}  # the helpers in tests/
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=120, check=False, env=env)
    assert done.returncode == 0, done.stderr
    for case in json.loads(done.stdout.splitlines()[-1]):
        planned, real = case["weights"]
        assert planned == real
        planned, real = case["step"]
        assert planned == pytest.approx(real, rel=0.02)


# --- the plan -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def eight() -> Plan:
    """The released model on eight GPUs of 80 GiB."""
    return plan_from(TwoTowerConfig.read(RELEASED), {"gpus": 8})


def test_the_released_model(eight: Plan) -> None:
    assert eight.parameters.per_tower == pytest.approx(31.58e9, rel=1e-3)
    trained = eight.parameters.trained
    state = eight.memory.weights + eight.memory.gradients + eight.memory.moments
    assert state == pytest.approx(16 * trained / 8, rel=1e-3)
    assert eight.memory.frozen == pytest.approx(2 * eight.parameters.frozen / 8, rel=1e-3)
    assert not eight.fits
    assert eight.smallest_gpus == 16
    assert [remedy.change for remedy in eight.remedies if remedy.fits] == ["16 GPUs"]
    hours = {row.tokens: row.hours for row in eight.hours}
    assert hours[1e10] == pytest.approx(10 * hours[1e9])
    per_column = eight.flops.total / 8192
    assert hours[1e9] == pytest.approx(1e9 * per_column / (8 * 989e12 * 0.35) / 3600)


def test_the_page_names_verdict_and_assumptions(eight: Plan) -> None:
    text = click.unstyle(render(eight))
    assert "does not fit" in text
    assert "16 GPUs" in text
    assert "assumed" in text
    assert max(map(len, text.splitlines())) <= 100
    assert json.loads(json.dumps(eight.to_dict(), allow_nan=False))["memory"]["total"] == eight.memory.total


def test_adapters_of_the_released_model_fit_one_gpu() -> None:
    config = TwoTowerConfig.read(RELEASED)
    one = plan_from(config, {"gpus": 1, "adapters": 32, "teacher": True})
    assert one.fits
    assert one.smallest_gpus == 1
    assert one.memory.frozen == pytest.approx(2 * one.parameters.frozen, rel=1e-3)  # once, in bf16
    assert one.memory.weights + one.memory.gradients + one.memory.moments == pytest.approx(
        16 * one.parameters.trained, rel=1e-3
    )
    assert one.parameters.per_tower == pytest.approx(31.58e9, rel=1e-3)
    assert 20e6 < one.parameters.trained < 40e6
    text = click.unstyle(render(one))
    assert "adapters of rank 32" in text
    assert "on one GPU" in text
    assert max(map(len, text.splitlines())) <= 100


def test_remedies_come_in_order_and_do_what_they_say() -> None:
    config = tower_spec(TwoTowerConfig(**WIDE, hybrid_override_pattern="ME*M"))
    setup = Setup(
        gpus=8,
        gpu_memory_gib=0.03,
        row_length=1024,
        batch_size=64,
        micro_batch_size=4,
        activation_checkpointing=False,
        reserve_gib=0.0,
    )
    made = make_plan(config, setup)
    assert made.setup.micro_batches == 2
    assert [remedy.change for remedy in made.remedies[:2]] == ["recomputation", "micro-batches of 1 row"]
    assert all(remedy.total < made.memory.total for remedy in made.remedies[:2])
    assert made.remedies[-1].change == "rows of 512 tokens"


def test_experts_are_cut_among_no_more_gpus_than_there_are() -> None:
    config = tower_spec(TwoTowerConfig(**WIDE, hybrid_override_pattern="ME"))  # 8 experts
    totals = {g: make_plan(config, Setup(gpus=g, row_length=64, reserve_gib=0.0)).memory.weights for g in (8, 64)}
    experts = 2 * WIDE["n_routed_experts"] * WIDE["moe_intermediate_size"] * WIDE["hidden_size"]
    assert totals[64] > 4 * experts / 8


def test_one_gpu_keeps_every_layer_gathered() -> None:
    config = tower_spec(TwoTowerConfig(**WIDE, hybrid_override_pattern="M-"))
    made = make_plan(config, Setup(gpus=1, row_length=64))
    assert made.memory.gathered > 0
    assert made.traffic.seconds == 0
    assert made.memory.total < GIB * 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpus": 0}, "gpus is 0"),
        ({"row_length": 100}, "give a multiple of the block size 16"),
        ({"batch_size": 4}, "fewer than 8 GPUs"),
        ({"utilisation": 35}, "fraction"),
        ({"dtype": "int8"}, "choose one of"),
        ({"gpu": 8}, "unknown option gpu"),
    ],
)
def test_meaningless_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        plan_from(TwoTowerConfig.read(RELEASED), options)


if __name__ == "__main__":
    shard_over_eight()
