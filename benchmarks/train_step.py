"""What a training step of the denoiser costs, against an autoregressive step of the same backbone on the same tokens.

    python benchmarks/train_step.py [--device cuda] [--dtype bfloat16] [--json]

Both steps run in turn in one process (forward, backward, AdamW), so that whatever else the machine does falls on both;
the ratio is of medians. Memory is what autograd keeps between forward and backward, parameters not counted, for one row
of 4,096 tokens.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import click

from twotower.process import configure_process

configure_process()

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from twotower.config import BackboneConfig, TwoTowerConfig  # noqa: E402
from twotower.evaluation.machine import surroundings  # noqa: E402
from twotower.modeling_twotower import TwoTowerForCausalLM  # noqa: E402
from twotower.recipes.bundled import SHAPE  # noqa: E402
from twotower.training import fsdp  # noqa: E402
from twotower.training.data import Batch  # noqa: E402
from twotower.training.objective import (  # noqa: E402
    AutoregressiveObjective,
    DenoisingObjective,
    DenoisingOptions,
)
from twotower.training.optimizer import Optimizer  # noqa: E402
from twotower.training.runs import compute_dtype  # noqa: E402

BLOCK = 16
MASK = 3


def shapes() -> dict[str, BackboneConfig]:
    """The bundled model's, and one of ten times its parameters."""
    bundled = TwoTowerConfig(**{key: value for key, value in SHAPE.items() if key != "model_type"}).backbone
    large = replace(
        bundled, hidden_size=640, mamba_num_heads=20, num_attention_heads=20, num_key_value_heads=4,
        intermediate_size=1920, moe_intermediate_size=640, moe_shared_expert_intermediate_size=1280, vocab_size=2048,
    )  # fmt: skip
    return {"bundled": bundled, "ten times": large}


def packed(rows: int, length: int, vocabulary: int, device: torch.device) -> Batch:
    """Rows of two documents each, random tokens, every block trained."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(4, vocabulary, (rows, length), generator=generator)
    document = (torch.arange(length) * 2 // length).expand(rows, -1).contiguous()
    yes = torch.ones(rows, length, dtype=torch.bool)
    return Batch(tokens, document, yes, yes, ~yes, torch.arange(rows)).to(device)


def objectives(shape: BackboneConfig, world: fsdp.World, dtype: torch.dtype, recompute: bool) -> dict[str, Any]:
    """Both, on towers of their own, sharded as in training."""
    config = TwoTowerConfig(**{name: getattr(shape, name) for name in shape.__dataclass_fields__})
    torch.manual_seed(0)
    alone, both = TwoTowerForCausalLM(config, towers="context"), TwoTowerForCausalLM(config)
    assert both.denoiser is not None
    assert both.time is not None
    made = {
        "ar": AutoregressiveObjective(alone.context, recompute=recompute),
        "denoiser": DenoisingObjective(
            both.context, both.denoiser, both.time, DenoisingOptions(mask_token_id=MASK, recompute=recompute)
        ),
    }
    for objective in made.values():
        fsdp.shard(objective, objective.units, world, dtype)
    return made


def step(objective: Any, optimizer: Optimizer, batch: Batch, noise: Any) -> None:
    """One update."""
    (objective(batch, noise, BLOCK) / batch.tokens.numel()).backward()
    optimizer.step(1e-5, optimizer.gradient_norm())


def seconds(run: Callable[[], None], device: torch.device) -> float:
    """Of one call."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def kept_bytes(objective: Any, batch: Batch, noise: Any) -> int:
    """What autograd saves in a forward pass, each storage once, without parameters."""
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
    name: str, shape: BackboneConfig, world: fsdp.World, dtype: torch.dtype, repeats: int, rows: int, length: int
) -> dict[str, Any]:
    """Both steps of one shape."""
    batch = packed(rows, length, shape.vocab_size, world.device)
    long = packed(1, 4096, shape.vocab_size, world.device)
    result: dict[str, Any] = {"shape": name, "kept_bytes_4096": {}}
    for recompute in (False, True):
        made = objectives(shape, world, dtype, recompute)
        for kind, objective in made.items():
            noise = objective.draw(long, BLOCK)
            noise = noise and noise.to(world.device)
            result["kept_bytes_4096"][f"{kind}{' recompute' if recompute else ''}"] = kept_bytes(objective, long, noise)
        runs = {}
        for kind, objective in made.items():
            noise = objective.draw(batch, BLOCK)
            optimizer = Optimizer(objective, world, 0.1, 1.0)
            runs[kind] = (objective, optimizer, batch, noise and noise.to(world.device))
        times: dict[str, list[float]] = {kind: [] for kind in runs}
        for repeat in range(repeats + 1):
            for kind, arguments in runs.items():
                taken = seconds(lambda arguments=arguments: step(*arguments), world.device)  # type: ignore[misc]
                if repeat:  # the first warms up
                    times[kind].append(taken)
        median = {kind: statistics.median(values) for kind, values in times.items()}
        label = "recompute" if recompute else "plain"
        result[label] = {
            "ar_seconds": median["ar"],
            "denoiser_seconds": median["denoiser"],
            "ratio": median["denoiser"] / median["ar"],
            "ratio_of_best": min(times["denoiser"]) / min(times["ar"]),
        }
        result["parameters_per_tower"] = sum(p.numel() for p in made["ar"].parameters())
    return result


@click.command()
@click.option("--device", type=click.Choice(("cpu", "cuda")), default=None)
@click.option("--dtype", type=click.Choice(("auto", "bfloat16", "float32")), default="auto")
@click.option("--repeats", default=7, show_default=True)
@click.option("--rows", default=4, show_default=True)
@click.option("--row-length", default=512, show_default=True)
@click.option("--threads", type=int, default=None)
@click.option("--json", "as_json", is_flag=True)
def main(
    device: str | None, dtype: str, repeats: int, rows: int, row_length: int, threads: int | None, as_json: bool
) -> None:
    """Measures both shapes."""
    configure_process(threads)
    world = fsdp.start(device)
    compute = compute_dtype(dtype, world.device)
    results = [measure(name, shape, world, compute, repeats, rows, row_length) for name, shape in shapes().items()]
    if not as_json:
        table = Table("shape", "parameters", "", "AR step s", "denoiser step s", "ratio", "kept, AR", "kept, denoiser")
        for result in results:
            for label, suffix in (("plain", ""), ("recompute", " recompute")):
                row, kept = result[label], result["kept_bytes_4096"]
                table.add_row(
                    result["shape"], f"{result['parameters_per_tower'] / 1e6:.1f} M", label,
                    f"{row['ar_seconds']:.3f}", f"{row['denoiser_seconds']:.3f}", f"{row['ratio']:.2f}",
                    f"{kept['ar' + suffix] / 2**20:.0f} MiB", f"{kept['denoiser' + suffix] / 2**20:.0f} MiB",
                )  # fmt: skip
        Console(file=sys.stderr).print(table)
    found = {"benchmark": "train_step", "machine": surroundings(world.device, compute), "block_size": BLOCK}
    print(json.dumps(found | {"results": results}))
    fsdp.stop()


if __name__ == "__main__":
    main()
