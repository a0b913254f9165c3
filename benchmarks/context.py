"""How do time and memory grow with the length of a text?

    python benchmarks/context.py time [--config FILE | --model DIR] [--lengths 1024,2048,…] [-o curve.png] [--quick]
    python benchmarks/context.py memory [--config FILE | --model DIR] [--lengths 1024,8192,…] [--quick]

time: an AR step, a denoising pass and a commit after texts of 1K … 32K tokens (up to 131072), all lengths and passes in
turn. Only attention should grow with the text. The slope (milliseconds per 1,000 tokens) is compared with two
rooflines: bytes of K/V ÷ the best read rate of the same run, and the slope of the pass's roofline, which for a block of
16 on a CPU is that of attention's products. The texts are not prefilled: random K/V and Mamba states are written into
the state's pools (`models.Texts`), in seconds instead of minutes.

memory: loading time, peak memory, time to the first block, and the memory of a text's state (`common/memory.py`). The
random weights of --config are first written to a temporary directory, so they are in the page cache.
"""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch
from common import memory, roofline
from common.models import BLOCK, model_for, name_of
from common.pass_runs import PassRuns
from common.program import CONFIG, DEVICE, DTYPE, JSON, MODEL, QUICK, THREADS, numbers, publish, start
from common.timing import interleaved, medians
from rich.console import RenderableType
from rich.table import Table

from twotower import TwoTowerForCausalLM
from twotower.evaluation.machine import device_facts, machine_facts
from twotower.nemotron_h_fields import NemotronHFields
from twotower.plotting import BLUE, DPI, GREEN, GREY, ORANGE, drawing

LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
PASSES = ("AR step", "denoiser pass", "commit")
PER_PASS = 3.0  # tokens per pass, for figures per committed token


@torch.no_grad()
def measure(
    model: TwoTowerForCausalLM, rates: roofline.Rates, *, lengths: Sequence[int] = LENGTHS, repeats: int = 7
) -> dict[str, Any]:
    """Measures every pass after every length."""
    config, passes = model.config.layer_fields, PassRuns(model, max(lengths))
    runs = {f"{name} {length}": run for length in lengths for name, run in passes.after(length).items()}
    seconds = medians(interleaved(runs, model.device, repeats, warm_up=2))
    curves = {name: [seconds[f"{name} {length}"] for length in lengths] for name in PASSES}
    slopes = {name: slope(lengths, curve) for name, curve in curves.items()}
    widths = {"AR step": 1, "denoiser pass": BLOCK, "commit": BLOCK}
    added = {name: added_by_a_token(config, model.dtype, width) for name, width in widths.items()}
    roofline_slope = added["AR step"][0] / rates.bytes_per_second
    own_slopes = {name: roofline.roofline_seconds(*more, rates) for name, more in added.items()}
    count = math.ceil(BLOCK / PER_PASS)
    committed = [
        (count * one + two) / BLOCK for one, two in zip(curves["denoiser pass"], curves["commit"], strict=True)
    ]
    return {
        "lengths": list(lengths),
        "seconds": curves,
        "roofline slope": roofline_slope * 1e6,  # ms per 1,000 tokens
        "slopes": {name: value * 1e6 for name, value in slopes.items()},
        "times roofline slope": {name: value / roofline_slope for name, value in slopes.items() if roofline_slope},
        "own roofline slopes": {name: value * 1e6 for name, value in own_slopes.items()},
        "times own roofline slope": {name: slopes[name] / value for name, value in own_slopes.items() if value},
        "committed token": {"tokens per pass": BLOCK / count, "seconds": committed,
                            "last to first": committed[-1] / committed[0]},
        "rates": asdict(rates),
    }  # fmt: skip


def added_by_a_token(config: NemotronHFields, dtype: torch.dtype, width: int) -> tuple[float, float]:
    """Additional bytes and operations of a pass per additional token of context."""
    none, one = (roofline.work(config, dtype, rows=1, width=width, context=n) for n in (0, 1))
    return one.bytes - none.bytes, one.operations - none.operations


def slope(lengths: Sequence[int], curve: Sequence[float]) -> float:
    """The slope of the least-squares line."""
    middle, mean = sum(lengths) / len(lengths), sum(curve) / len(curve)
    over = sum((x - middle) * (y - mean) for x, y in zip(lengths, curve, strict=True))
    return over / sum((x - middle) ** 2 for x in lengths)


def draw(found: dict[str, Any], title: str, path: Path) -> None:
    """Draws the curves; for each, a line from its first point with the slope of the roofline."""
    with drawing():
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(figsize=(7, 4))
        lengths = found["lengths"]
        for (name, curve), colour in zip(found["seconds"].items(), (BLUE, ORANGE, GREEN), strict=True):
            label = f"{name}: {found['slopes'][name]:.3f} ms per 1K"
            axes.plot(lengths, [value * 1e3 for value in curve], "o-", color=colour, label=label, markersize=4)
            rising = [curve[0] * 1e3 + found["roofline slope"] * (n - lengths[0]) / 1e3 for n in lengths]
            axes.plot(lengths, rising, ":", color=GREY)
        axes.plot([], [], ":", color=GREY, label=f"reading K/V alone: {found['roofline slope']:.3f} ms per 1K")
        axes.set(xlabel="tokens before the pass", ylabel="ms", title=title, ylim=(0, None))
        axes.legend()
        figure.savefig(path, dpi=DPI)
        plt.close(figure)


def time_tables(found: dict[str, Any]) -> Iterator[RenderableType]:
    table = Table("tokens before", *(f"{name}, ms" for name in PASSES))
    for i, length in enumerate(found["lengths"]):
        table.add_row(f"{length:,}", *(f"{found['seconds'][name][i] * 1e3:.3f}" for name in PASSES))
    table.add_section()
    table.add_row("ms per 1K tokens", *(f"{found['slopes'][name]:.4f}" for name in PASSES))
    if found["times roofline slope"]:
        table.add_row("× reading K/V", *(f"{found['times roofline slope'][name]:.2f}" for name in PASSES))
        table.add_row("× its own roofline", *(f"{found['times own roofline slope'][name]:.2f}" for name in PASSES))
    yield table
    one = found["committed token"]
    yield (
        f"K/V alone: {found['roofline slope']:.4f} ms per 1K; at {one['tokens per pass']:.2f} tokens a pass a "
        f"committed one costs {one['last to first']:.2f}× as much after {found['lengths'][-1]:,} "
        f"as after {found['lengths'][0]:,}"
    )


def memory_tables(found: dict[str, Any]) -> Iterator[RenderableType]:
    def size(value: float) -> str:
        return f"{value / 2**20:.1f} MiB"

    table = Table("", "weights", "load, s", "load's peak", "anonymous", "peak", "first tokens, ms", "block, ms")
    for name, one in found["loads"].items():
        table.add_row(
            name, size(one["weights bytes"]), f"{one['load seconds']:.2f}", size(one["peak of the load"]),
            size(one["anonymous peak of the load"]), size(one.get("peak on device", one["peak"])),
            f"{one['first event'] * 1e3:.1f}", f"{one['first block'] * 1e3:.1f}",
        )  # fmt: skip
    yield table
    table = Table("text", "AR", "two-tower", "more", "ratio", "published shape, bf16")
    for row, big in zip(found["states"], found["published shape, bf16"], strict=True):
        table.add_row(
            f"{row['length']:,}", size(row["AR"]), size(row["two-tower"]), size(row["scratch"]),
            f"{row['ratio']:.4f}", size(big["bytes"]),
        )  # fmt: skip
    yield table
    tokens = found["state bytes a token"]
    yield f"bytes a token: AR {tokens['AR']:.0f}, two-tower {tokens['two-tower']:.0f}"


@click.group()
def main() -> None:
    """Time and memory of a long text."""


@main.command("time")
@MODEL
@CONFIG
@DEVICE
@DTYPE
@click.option("--lengths", callback=numbers, default=",".join(map(str, LENGTHS)), show_default=True)
@click.option("--repeats", default=7, show_default=True)
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), default=None, help="A PNG file.")
@THREADS
@QUICK
@JSON
def time_of_passes(
    path: Path | None, config: Path | None, device: str, dtype: str, lengths: tuple[int, ...], repeats: int,
    output: Path | None, threads: int | None, quick: bool, as_json: bool,
) -> None:  # fmt: skip
    """Time of a pass by the length of the text before it."""
    start(threads)
    if quick:
        lengths, repeats = (1024, 8192, 32768), 3
    if len(set(lengths)) < 2:
        raise click.BadParameter("has fewer than two lengths; give at least two", param_hint="--lengths")
    model = model_for(path, config, quick, dtype=dtype, device=device)
    rates = roofline.measure(model.device, model.dtype, quick=quick)
    found = measure(model, rates, lengths=lengths, repeats=repeats)
    name, where = name_of(path, config, quick), machine_facts(model)
    facts = {"model": name, "machine": where, "block_size": BLOCK} | found
    if output is not None:
        draw(found, f"{name}, {dtype}, {where['threads']} threads", output)
        print(f"{output} drawn", file=sys.stderr)
    publish("context time", facts, time_tables(found), as_json)


@main.command("memory")
@MODEL
@CONFIG
@DEVICE
@DTYPE
@click.option("--lengths", callback=numbers, default=",".join(map(str, memory.LENGTHS)), show_default=True)
@click.option("--prompt", default=128, show_default=True, help="Tokens before the first block.")
@click.option("--rounds", default=5, show_default=True, help="First blocks in each process; the first warms up.")
@THREADS
@QUICK
@JSON
def memory_of_texts(
    path: Path | None, config: Path | None, device: str, dtype: str, lengths: tuple[int, ...], prompt: int,
    rounds: int, threads: int | None, quick: bool, as_json: bool,
) -> None:  # fmt: skip
    """Loading time, peak memory, time to the first block, and the state of a text."""
    start(threads)
    if quick:
        lengths, prompt, rounds = (1024, 4096), 16, 2
    model = model_for(path, config, quick, dtype=dtype, device=device)
    found = memory.measure_states(model, lengths)
    with tempfile.TemporaryDirectory() as directory:
        if path is None:
            model.save_pretrained(directory)
        del model
        cases = ("diffusion",) if quick else tuple(memory.CASES)
        found["loads"] = memory.loads(
            path or Path(directory), cases, device=device, dtype=dtype, threads=threads, prompt=prompt, rounds=rounds
        )
    where = device_facts(torch.device(device), getattr(torch, dtype))
    facts = {"model": name_of(path, config, quick), "machine": where, "prompt": prompt, "block_size": BLOCK} | found
    publish("context memory", facts, memory_tables(found), as_json)


if __name__ == "__main__":
    main()
