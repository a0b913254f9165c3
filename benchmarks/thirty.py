"""Is an AR step of the published shape, quantised, bound by reading its weights on a CPU, and does it fit the memory?

    python benchmarks/thirty.py [--quantization int4] [--layers 52] [--threads 2] [--towers one|context]

The context tower of `benchmarks/published.json` gets random weights, written directly in the layout of the kernels
(`common/quantized_weights.py`). --layers N keeps the first N layers of the pattern, with the whole embedding and head.

Every round times an AR step, a pass over a block without logits (a commit), with --towers one a denoising pass over a
block, and a read of a large array by the same threads, in turns. A pass must read the weights of its layers (of routed
experts only those that its tokens chose, counted), the head, the K/V of the text and the Mamba states. These bytes ÷
the time of the pass are its GB/s. "Of the read rate" is the median over the rounds.

--towers one: the same weights serve as both towers, so both kinds of passes fit; a pass reads as much as with two.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from common import quantized_weights, roofline
from common.memory import resident
from common.models import BLOCK, PUBLISHED, config_of, cut_to_layers
from common.pass_runs import PassRuns
from common.program import CONFIG, JSON, QUICK, THREADS, publish, start
from common.timing import TimedCall, interleaved, medians, ratio
from rich.table import Table

from twotower import TwoTowerConfig, TwoTowerForCausalLM
from twotower.byte_units import format_bytes
from twotower.evaluation.machine import machine_facts, machine_summary
from twotower.quantization import QuantizationPlan
from twotower.system_memory import available_memory

OTHER_MEMORY = 1 << 30  # libraries, the array of the read rate, states and buffers of passes: 0.7 GiB at 52 layers
AR_STEP, COMMIT, DENOISE, READ = "AR step", "commit", "denoiser pass", "read"


def model_of(config: TwoTowerConfig, plan: str, dtype: str, both: bool) -> TwoTowerForCausalLM:
    """The model with random weights.

    Raises:
        click.UsageError: the plan leaves a part unquantised, or the memory is too small.
    """
    model = quantized_weights.quantized_shape(config, plan, getattr(torch, dtype), shared=both)
    if left := quantized_weights.unquantized_parts(model):
        raise click.UsageError(f"--quantization {plan} leaves {', '.join(left)} unquantised; give int4, int8, or both")
    needed, free = quantized_weights.weight_bytes(model) + OTHER_MEMORY, available_memory()
    if free is not None and needed > free:
        raise click.UsageError(
            f"{config.num_hidden_layers} layers in {plan} need {format_bytes(needed)} and {format_bytes(free)} is "
            "free; give fewer --layers"
        )
    quantized_weights.materialize(model)
    return model


def fastest_read(quick: bool) -> tuple[str, Callable[[], object], int]:
    """The operation that reads a large array fastest: its name, a call, and the bytes of the array."""
    calls = roofline.reads(torch.device("cpu"), torch.float32, quick=quick)
    rates = roofline.best_rates(calls, torch.device("cpu"), 3)
    name = max(rates, key=rates.__getitem__)
    return name, *calls[name]


@torch.no_grad()
def works_of(model: TwoTowerForCausalLM, runs: dict[str, TimedCall], context: int) -> dict[str, dict[str, Any]]:
    """The bytes that each pass must read, by part, and the experts that its tokens chose."""
    fields, found = model.config.layer_fields, {}
    for name, run in runs.items():
        width = 1 if name == AR_STEP else BLOCK
        run.before()
        with roofline.counting_experts(model.context) as choices:
            run.call()
        visited, how = roofline.visited(choices, fields, width)
        shape: dict[str, Any] = {"rows": 1, "width": width, "context": context, "experts": visited}
        states = roofline.work(fields, model.dtype, **shape).parts
        parts = quantized_weights.bytes_read(model, visited, head=name != COMMIT, denoiser=name == DENOISE)
        parts |= {part: states[part] for part in ("embeddings", "K/V", "Mamba states")}
        found[name] = {
            "bytes": sum(parts.values()), "parts": parts,
            "experts": {"mean": sum(visited) / max(len(visited), 1), "how": how},
        }  # fmt: skip
    return found


@torch.no_grad()
def measure(model: TwoTowerForCausalLM, *, context: int, repeats: int, quick: bool) -> dict[str, Any]:
    """Times the passes and the read in turns."""
    runs = PassRuns(model, context).after(context)
    passes = works_of(model, runs, context)
    how, read, size = fastest_read(quick)
    times = interleaved(runs | {READ: TimedCall(read)}, model.device, repeats)
    seconds, best_rate = medians(times), size / min(times[READ])
    for name, one in passes.items():
        share = one["bytes"] / size * ratio(times[READ], times[name])
        one |= {
            "seconds": seconds[name], "best": min(times[name]), "bytes_per_second": one["bytes"] / seconds[name],
            "of the read rate": share, "AR steps": ratio(times[name], times[AR_STEP]),
            "of the best read rate": one["bytes"] / min(times[name]) / best_rate,
        }  # fmt: skip
    rates = [size / taken for taken in times[READ]]
    return {
        "read": {"operation": how, "bytes": size, "bytes_per_second": statistics.median(rates), "best": max(rates)},
        "passes": passes,
    }


def table_of(facts: dict[str, Any]) -> Table:
    memory, read = facts["memory"], facts["read"]
    title = (
        f"{machine_summary(facts['machine'])}: {facts['layers']} layers, weights {memory['weights'] / 2**30:.2f} GiB, "
        f"peak {memory['peak'] / 2**30:.2f} GiB; reads {read['bytes_per_second'] / 1e9:.1f} GB/s (best "
        f"{read['best'] / 1e9:.1f})"
    )
    table = Table("pass", "ms", "reads", "GB/s", "of the read rate", "of the best", "AR steps", "experts", title=title)
    for name, one in facts["passes"].items():
        table.add_row(
            name, f"{one['seconds'] * 1e3:.1f}", f"{one['bytes'] / 1e9:.3f} GB",
            f"{one['bytes_per_second'] / 1e9:.1f}", f"{one['of the read rate']:.0%}",
            f"{one['of the best read rate']:.0%}", f"{one['AR steps']:.2f}", f"{one['experts']['mean']:.1f} a layer",
        )  # fmt: skip
    return table


@click.command()
@CONFIG
@click.option("--quantization", "plan", default="int4", show_default=True, help="A plan that quantises all parts.")
@click.option("--layers", type=click.IntRange(1), default=None, help="The first layers only.  [default: all]")
@click.option("--towers", type=click.Choice(("one", "context")), default="one", show_default=True,
              help="one: the weights also serve as the denoiser.")  # fmt: skip
@click.option("--dtype", type=click.Choice(roofline.DTYPES), default="bfloat16", show_default=True)
@click.option("--context", default=256, show_default=True, help="Tokens before the pass.")
@click.option("--repeats", default=15, show_default=True, help="Rounds, after three that warm up.")
@THREADS
@QUICK
@JSON
def main(
    config: Path | None, plan: str, layers: int | None, towers: str, dtype: str, context: int, repeats: int,
    threads: int | None, quick: bool, as_json: bool,
) -> None:  # fmt: skip
    """Memory and time of one quantised tower of the published shape, beside the read rate."""
    start(threads)
    if quick:
        context, repeats = 64, 3
    plan = str(QuantizationPlan.parse(plan))
    path = config or (None if quick else PUBLISHED)
    shape = cut_to_layers(config_of(path), layers)
    started = time.perf_counter()
    model = model_of(shape, plan, dtype, towers == "one")
    made = time.perf_counter() - started
    print(f"weights made in {made:.1f} s", file=sys.stderr)
    found = measure(model, context=context, repeats=repeats, quick=quick)
    facts: dict[str, Any] = {
        "model": path.name if path else "tiny", "layers": shape.num_hidden_layers, "quantization": model.quantization,
        "towers": towers, "machine": machine_facts(model), "context": context, "block_size": BLOCK,
        "memory": {
            "weights": quantized_weights.weight_bytes(model), "peak": resident(), "seconds to make": made,
        },
    }  # fmt: skip
    facts |= found
    publish("thirty", facts, [table_of(facts)], as_json)


if __name__ == "__main__":
    main()
