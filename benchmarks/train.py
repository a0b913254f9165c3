"""What does a training step cost, and what does each part of the design contribute?

    python benchmarks/train.py step [--device cuda] [--dtype bfloat16] [--quick] [--json]
    python benchmarks/train.py counts [--rows 4] [--row-length 512] [--json]
    python benchmarks/train.py ablations DATA OUT [--steps 1200] [--seed 1 --seed 2] [--only NAME …]

step: a training step of the denoiser, and one of adapters of rank 32, against an autoregressive step of the same
backbone on the same tokens. The steps (forward, backward, AdamW) take turns in one process; the ratios are of medians.
Memory is what autograd keeps between forward and backward, without parameters, for one row of 4,096 tokens.

counts: kernels that a pass launches on a GPU, and reads that make the host wait, on tensors without storage
(`common/training_counts.py`).

ablations: a backbone of about a million parameters is trained once on dialogues and the suite's problems. Each
variation then trains a denoiser from it for the same number of steps, and is measured on the same held-out text: masked
NLL in nats by noise level, and, if generation supports the variation, tokens per pass and the suite's exact-match
accuracy at threshold 0.8. Finished runs are kept in OUT and not repeated; the table shows the runs that exist.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
from common import ablations, training_counts
from common.models import BLOCK
from common.program import DIRECTORY, JSON, QUICK, THREADS, publish, start
from common.timing import TimedCall, interleaved
from rich.table import Table

from twotower.config import TwoTowerConfig
from twotower.evaluation.machine import device_facts
from twotower.families.nemotron_h import spec_of
from twotower.modeling_twotower import TwoTowerForCausalLM
from twotower.nemotron_h_fields import NemotronHFields
from twotower.recipes.small import SHAPE
from twotower.training import fsdp
from twotower.training.adapter_objective import AdapterObjective, AdapterOptions
from twotower.training.data import Batch
from twotower.training.noise import Corruption
from twotower.training.objective import AutoregressiveObjective, DenoisingObjective, DenoisingOptions
from twotower.training.optimizer import ShardedAdamW
from twotower.training.runs import compute_dtype

MASK, RANK = 3, 32


def shapes() -> dict[str, NemotronHFields]:
    """The bundled model's shape, and a shape with ten times the parameters."""
    bundled = TwoTowerConfig(**{key: value for key, value in SHAPE.items() if key != "model_type"}).layer_fields
    large = replace(
        bundled, hidden_size=640, mamba_num_heads=20, num_attention_heads=20, num_key_value_heads=4,
        intermediate_size=1920, moe_intermediate_size=640, moe_shared_expert_intermediate_size=1280, vocab_size=2048,
    )  # fmt: skip
    return {"bundled": bundled, "ten times": large}


def batch_for(objective: Any, rows: int, length: int, vocabulary: int) -> tuple[Batch, Corruption | None]:
    """Rows and their noise, on the host as in training: a pass computes its indices there."""
    batch = packed(rows, length, vocabulary)
    return batch, objective.draw_noise(batch, BLOCK)


def packed(rows: int, length: int, vocabulary: int) -> Batch:
    """Rows of two documents each, with random tokens; every block is trained."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(4, vocabulary, (rows, length), generator=generator)
    document = (torch.arange(length) * 2 // length).expand(rows, -1).contiguous()
    yes = torch.ones(rows, length, dtype=torch.bool)
    return Batch(tokens, document, yes, yes, ~yes, torch.arange(rows))


def objectives(
    shape: NemotronHFields,
    world: fsdp.World,
    dtype: torch.dtype,
    activation_checkpointing: bool,
    kinds: Sequence[str] = ("ar", "denoiser", "adapters"),
) -> dict[str, Any]:
    """The objectives, on towers of their own, sharded as in training. kinds: those wanted."""
    config = TwoTowerConfig(**{name: getattr(shape, name) for name in shape.__dataclass_fields__})
    torch.manual_seed(0)
    made = {kind: OBJECTIVES[kind](config, activation_checkpointing) for kind in kinds}
    for objective in made.values():
        fsdp.shard(objective, objective.units, world, dtype)
    return made


def autoregressive(config: TwoTowerConfig, activation_checkpointing: bool) -> Any:
    tower = TwoTowerForCausalLM(config, towers="context").context
    return AutoregressiveObjective(tower, activation_checkpointing=activation_checkpointing)


def denoising(config: TwoTowerConfig, activation_checkpointing: bool) -> Any:
    both = TwoTowerForCausalLM(config)
    assert both.denoiser is not None
    options = DenoisingOptions(mask_token_id=MASK, activation_checkpointing=activation_checkpointing)
    return DenoisingObjective(both.context, both.denoiser, both.time, options)


def adapting(config: TwoTowerConfig, activation_checkpointing: bool) -> Any:
    tower = TwoTowerForCausalLM(config, towers="context").context
    tower.add_adapters(RANK, MASK)
    tower.reset_parameters()
    options = AdapterOptions(mask_token_id=MASK, activation_checkpointing=activation_checkpointing)
    return AdapterObjective(tower, options)


OBJECTIVES: dict[str, Callable[[TwoTowerConfig, bool], Any]] = {
    "ar": autoregressive, "denoiser": denoising, "adapters": adapting,
}  # fmt: skip


def step(objective: Any, optimizer: ShardedAdamW, batch: Batch, noise: Any) -> None:
    """Makes one optimizer step."""
    (objective(batch, noise, BLOCK) / batch.tokens.numel()).backward()
    optimizer.step(1e-5, optimizer.gradient_norm())


def kept_bytes(objective: Any, batch: Batch, noise: Any) -> int:
    """Bytes that autograd saves in a forward pass, each storage once, without parameters."""
    own = {fsdp.local(p.detach()).untyped_storage().data_ptr() for p in objective.parameters()}
    found: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = fsdp.local(tensor.detach()).untyped_storage()
        if storage.data_ptr() not in own and not isinstance(tensor, torch.nn.Parameter):
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = objective(batch, noise, BLOCK)
    total = sum(found.values())
    loss.backward()
    objective.zero_grad()
    return total


def measure(
    name: str, shape: NemotronHFields, world: fsdp.World, dtype: torch.dtype, *, repeats: int, rows: int,
    length: int, kept_length: int,
) -> dict[str, Any]:  # fmt: skip
    """Measures both steps of one shape."""
    result: dict[str, Any] = {"shape": name, "kept_length": kept_length, "kept_bytes": {}}
    for activation_checkpointing in (False, True):
        made = objectives(shape, world, dtype, activation_checkpointing)
        for kind, objective in made.items():
            long, noise = batch_for(objective, 1, kept_length, shape.vocab_size)
            result["kept_bytes"][f"{kind}{' activation checkpointing' if activation_checkpointing else ''}"] = (
                kept_bytes(objective, long, noise)
            )
        runs = {}
        for kind, objective in made.items():
            given = batch_for(objective, rows, length, shape.vocab_size)
            optimizer = ShardedAdamW(objective, world, 0.1, 1.0)
            runs[kind] = TimedCall(lambda o=objective, p=optimizer, given=given: step(o, p, *given))
        times = interleaved(runs, world.device, repeats, warm_up=1)
        median = {kind: statistics.median(values) for kind, values in times.items()}
        result["activation checkpointing" if activation_checkpointing else "plain"] = {
            "ar_seconds": median["ar"],
            "denoiser_seconds": median["denoiser"],
            "adapters_seconds": median["adapters"],
            "ratio": median["denoiser"] / median["ar"],
            "ratio_of_best": min(times["denoiser"]) / min(times["ar"]),
            "adapters_ratio": median["adapters"] / median["ar"],
            "adapters_ratio_of_best": min(times["adapters"]) / min(times["ar"]),
        }
        result["parameters_per_tower"] = sum(p.numel() for p in made["ar"].parameters())
    return result


def table_of_steps(results: Sequence[dict[str, Any]]) -> Table:
    table = Table(
        "shape", "parameters", "", "AR step s", "denoiser step s", "ratio", "adapters step s", "ratio", "kept, AR",
        "kept, denoiser", "kept, adapters",
    )  # fmt: skip
    for result in results:
        for label, suffix in (("plain", ""), ("activation checkpointing", " activation checkpointing")):
            row, kept = result[label], result["kept_bytes"]
            table.add_row(
                result["shape"], f"{result['parameters_per_tower'] / 1e6:.1f} M", label,
                f"{row['ar_seconds']:.3f}", f"{row['denoiser_seconds']:.3f}", f"{row['ratio']:.2f}",
                f"{row['adapters_seconds']:.3f}", f"{row['adapters_ratio']:.2f}",
                *(f"{kept[kind + suffix] / 2**20:.0f} MiB" for kind in ("ar", "denoiser", "adapters")),
            )  # fmt: skip
    return table


@click.group()
def main() -> None:
    """Costs of training, and the contribution of its parts."""


@main.command("step")
@click.option("--device", type=click.Choice(("cpu", "cuda")), default=None, help="[default: CUDA if there is a GPU]")
@click.option("--dtype", type=click.Choice(("auto", "bfloat16", "float32")), default="auto", show_default=True)
@click.option("--repeats", default=7, show_default=True)
@click.option("--rows", default=4, show_default=True)
@click.option("--row-length", default=512, show_default=True)
@THREADS
@QUICK
@JSON
def step_costs(
    device: str | None, dtype: str, repeats: int, rows: int, row_length: int, threads: int | None, quick: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Steps of a denoiser and of adapters against an AR step, in both shapes (--quick: one shape, few tokens)."""
    start(threads)
    kept_length, chosen = 4096, shapes()
    if quick:
        repeats, rows, row_length, kept_length = 1, 1, 64, 64
        chosen = {"bundled": chosen["bundled"]}
    world = fsdp.start(device)
    compute = compute_dtype(dtype, world.device)
    results = [
        measure(
            name, shape, world, compute, repeats=repeats, rows=rows, length=row_length, kept_length=kept_length
        )
        for name, shape in chosen.items()
    ]  # fmt: skip
    facts = {"machine": device_facts(world.device, compute), "block_size": BLOCK, "results": results}
    publish("train step", facts, [table_of_steps(results)], as_json)
    fsdp.stop()


@main.command("counts")
@click.option("--rows", default=4, show_default=True)
@click.option("--row-length", default=512, show_default=True)
@QUICK
@JSON
def kernel_counts(rows: int, row_length: int, quick: bool, as_json: bool) -> None:
    """Kernels that a training pass of the bundled shape launches on a GPU, and reads of the GPU. Needs none."""
    start(1)
    if quick:
        rows, row_length = 1, 64
    shape = shapes()["bundled"]
    batch, spec = packed(rows, row_length, shape.vocab_size), spec_of(shape)
    table, results = Table("objective", "dtype", "forward", "backward", "norm", "reads of the GPU"), []
    for kind in OBJECTIVES:
        for dtype in (torch.bfloat16, torch.float32):
            objective = training_counts.objective_without_storage(kind, spec, dtype)
            found = training_counts.count_pass(objective, batch, BLOCK)
            name, reads = str(dtype).removeprefix("torch."), sum(found.host_reads().values())
            results.append({"objective": kind, "dtype": name, "kernels": found.kernels(), "reads": reads})
            table.add_row(kind, name, *map(str, found.kernels().values()), str(reads))
    facts = {"rows": rows, "row_length": row_length, "torch": torch.__version__, "results": results}
    publish("train counts", facts, [table], as_json)


@main.command("ablations")
@click.argument("data", type=DIRECTORY)
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--steps", default=1200, show_default=True, help="Steps of each denoiser.")
@click.option("--backbone-steps", default=2500, show_default=True)
@click.option("--seed", "seeds", type=int, multiple=True, default=(1, 2), show_default=True)
@click.option("--only", multiple=True, type=click.Choice([one.name for one in ablations.VARIATIONS]))
@click.option("--device", type=click.Choice(("cpu", "cuda")), default="cpu", show_default=True)
@THREADS
def ablations_of_the_design(
    data: Path, out: Path, steps: int, backbone_steps: int, seeds: tuple[int, ...], only: tuple[str, ...], device: str,
    threads: int | None,
) -> None:  # fmt: skip
    """Trains each variation that is not finished, then prints the table in Markdown."""
    start(threads)
    out.mkdir(parents=True, exist_ok=True)
    world = fsdp.start(device)
    material = ablations.prepare(data, out, backbone_steps, world)
    for seed in seeds:
        for variation in ablations.VARIATIONS:
            if not only or variation.name in only:
                ablations.run_once(material, variation, seed, steps, out)
    print("\n".join(ablations.table(out, seeds)))
    fsdp.stop()


if __name__ == "__main__":
    main()
