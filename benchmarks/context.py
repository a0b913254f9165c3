"""What a pass costs against the length of the text before it, beside what reading its keys and values takes.

    python benchmarks/context.py [--config FILE | --model DIR] [--lengths 1024,2048,…] [-o curve.png] [--quick]

An AR step, a denoiser pass and a commit after texts of 1K … 32K tokens (131072 can be asked for), all lengths and
passes in turn. Nothing but attention should grow with the text, so the slope, milliseconds for 1,000 tokens, stands
beside the floor's: bytes of K/V ÷ the best read rate of the same run; and beside the slope of the pass's own floor,
which for a block of 16 on a processor is that of attention's products. The texts are made up, not read: random K/V and
Mamba states are written into the state's pools (`models.Texts`), which costs seconds where a prefill takes minutes.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from twotower.process import configure_process

configure_process()

import floor  # noqa: E402
import torch  # noqa: E402
from models import BLOCK, MIDSIZE, Texts, config_of, random_model, random_tokens  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from throughput import numbers  # noqa: E402
from timing import Run, interleaved, medians  # noqa: E402

from twotower import TwoTowerForCausalLM, model_loading  # noqa: E402
from twotower.cache.hybrid_cache import ContextView  # noqa: E402
from twotower.config import BackboneConfig  # noqa: E402
from twotower.evaluation.machine import machine  # noqa: E402
from twotower.plotting import BLUE, DPI, GREEN, GREY, ORANGE, drawing  # noqa: E402

LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
PASSES = ("AR step", "denoiser pass", "commit")
PER_PASS = 3.0  # tokens per pass, where a figure per committed token is wanted


@torch.no_grad()
def measure(
    model: TwoTowerForCausalLM, rates: floor.Rates, *, lengths: Sequence[int] = LENGTHS, repeats: int = 7
) -> dict[str, Any]:
    """Every pass after every length."""
    device, config = model.device, model.config.backbone
    texts = Texts.random(model, 1, max(lengths) + 2 * BLOCK)
    reader = model.reader(texts.state)
    block, t = random_tokens(model, 1, BLOCK), torch.full((1,), 0.5, device=device)
    views: list[ContextView] = []

    def shorten(length: int) -> None:
        texts.set_length(length)

    def look(length: int) -> None:
        shorten(length)
        views[:] = [reader.view()]

    def step() -> None:
        model.extend(block[:, :1], texts.state)

    def stepped(length: int) -> None:
        """So that the step finds the last one's token to be folded into the Mamba states, as usual."""
        shorten(length - 1)
        step()

    def commit() -> None:
        model.extend(block, texts.state, logits=False)
        texts.state.settle()

    runs: dict[str, Run] = {}
    for length in lengths:
        runs[f"AR step {length}"] = Run(step, lambda n=length: stepped(n))
        runs[f"denoiser pass {length}"] = Run(lambda: model.denoise(block, t, views[0]), lambda n=length: look(n))
        runs[f"commit {length}"] = Run(commit, lambda n=length: shorten(n))
    seconds = medians(interleaved(runs, device, repeats, warm_up=2))
    curves = {name: [seconds[f"{name} {length}"] for length in lengths] for name in PASSES}
    slopes = {name: slope(lengths, curve) for name, curve in curves.items()}
    widths = {"AR step": 1, "denoiser pass": BLOCK, "commit": BLOCK}
    added = {name: added_by_a_token(config, model.dtype, width) for name, width in widths.items()}
    floor_slope = added["AR step"][0] / rates.bytes_per_second
    own_slopes = {name: floor.floor(*more, rates) for name, more in added.items()}
    passes = math.ceil(BLOCK / PER_PASS)
    committed = [
        (passes * one + two) / BLOCK for one, two in zip(curves["denoiser pass"], curves["commit"], strict=True)
    ]
    return {
        "lengths": list(lengths),
        "seconds": curves,
        "floor slope": floor_slope * 1e6,  # ms for 1,000 tokens
        "slopes": {name: value * 1e6 for name, value in slopes.items()},
        "times floor slope": {name: value / floor_slope for name, value in slopes.items()} if floor_slope else {},
        "own floor slopes": {name: value * 1e6 for name, value in own_slopes.items()},
        "times own floor slope": {name: slopes[name] / value for name, value in own_slopes.items() if value},
        "committed token": {"tokens per pass": BLOCK / passes, "seconds": committed,
                            "last to first": committed[-1] / committed[0]},
        "rates": asdict(rates),
    }  # fmt: skip


def added_by_a_token(config: BackboneConfig, dtype: torch.dtype, width: int) -> tuple[float, float]:
    """Bytes and operations that a pass takes more for one more token before it."""
    none, one = (floor.work(config, dtype, rows=1, width=width, context=n) for n in (0, 1))
    return one.bytes - none.bytes, one.operations - none.operations


def slope(lengths: Sequence[int], curve: Sequence[float]) -> float:
    """Of the least-squares line."""
    middle, mean = sum(lengths) / len(lengths), sum(curve) / len(curve)
    over = sum((x - middle) * (y - mean) for x, y in zip(lengths, curve, strict=True))
    return over / sum((x - middle) ** 2 for x in lengths)


def draw(found: dict[str, Any], title: str, path: Path) -> None:
    """The curves, and for each the line that starts where it does and rises as the floor."""
    with drawing():
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(figsize=(7, 4))
        lengths = found["lengths"]
        for (name, curve), colour in zip(found["seconds"].items(), (BLUE, ORANGE, GREEN), strict=True):
            label = f"{name}: {found['slopes'][name]:.3f} ms per 1K"
            axes.plot(lengths, [value * 1e3 for value in curve], "o-", color=colour, label=label, markersize=4)
            rising = [curve[0] * 1e3 + found["floor slope"] * (n - lengths[0]) / 1e3 for n in lengths]
            axes.plot(lengths, rising, ":", color=GREY)
        axes.plot([], [], ":", color=GREY, label=f"reading K/V alone: {found['floor slope']:.3f} ms per 1K")
        axes.set(xlabel="tokens before the pass", ylabel="ms", title=title, ylim=(0, None))
        axes.legend()
        figure.savefig(path, dpi=DPI)
        plt.close(figure)


def show(found: dict[str, Any], console: Console) -> None:
    table = Table("tokens before", *(f"{name}, ms" for name in PASSES))
    for i, length in enumerate(found["lengths"]):
        table.add_row(f"{length:,}", *(f"{found['seconds'][name][i] * 1e3:.3f}" for name in PASSES))
    table.add_section()
    table.add_row("ms per 1K tokens", *(f"{found['slopes'][name]:.4f}" for name in PASSES))
    if found["times floor slope"]:
        table.add_row("× reading K/V", *(f"{found['times floor slope'][name]:.2f}" for name in PASSES))
        table.add_row("× its own floor", *(f"{found['times own floor slope'][name]:.2f}" for name in PASSES))
    console.print(table)
    one = found["committed token"]
    console.print(
        f"K/V alone: {found['floor slope']:.4f} ms per 1K; at {one['tokens per pass']:.2f} tokens a pass a committed "
        f"one costs {one['last to first']:.2f}× as much after {found['lengths'][-1]:,} as after {found['lengths'][0]:,}"
    )


@click.command()
@click.option("--model", "path", type=click.Path(exists=True, file_okay=False, path_type=Path), default=None)
@click.option("--config", type=click.Path(exists=True, dir_okay=False, path_type=Path), default=None)
@click.option("--device", type=click.Choice(("cpu", "cuda")), default="cpu", show_default=True)
@click.option("--dtype", type=click.Choice(floor.DTYPES), default="float32", show_default=True)
@click.option("--lengths", callback=numbers, default=",".join(map(str, LENGTHS)), show_default=True)
@click.option("--repeats", default=7, show_default=True)
@click.option("--threads", type=int, default=None, help="[default: torch's]")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), default=None, help="A PNG.")
@click.option("--quick", is_flag=True, help="A tiny model, seconds.")
@click.option("--json", "as_json", is_flag=True, help="No table.")
def main(
    path: Path | None, config: Path | None, device: str, dtype: str, lengths: tuple[int, ...], repeats: int,
    threads: int | None, output: Path | None, quick: bool, as_json: bool,
) -> None:  # fmt: skip
    """Measures one model."""
    configure_process(threads)
    torch.manual_seed(0)
    if quick:
        lengths, repeats = (1024, 8192, 32768), 3
    if len(set(lengths)) < 2:
        raise click.BadParameter("give at least two lengths", param_hint="--lengths")
    where, what = torch.device(device), getattr(torch, dtype)
    shape = None if quick and config is None else config or MIDSIZE
    if path is not None:
        model = model_loading.load_model(path, dtype=dtype, context_device=device)
    else:
        model = random_model(config_of(shape), what, where)
    found = measure(model, floor.measure(where, what, quick=quick), lengths=lengths, repeats=repeats)
    source = str(path or (shape.name if shape else "tiny"))
    if not as_json:
        show(found, Console(stderr=True, width=120))
    facts = {"benchmark": "context", "model": source, "machine": machine(model)}
    if output is not None:
        draw(found, f"{source}, {dtype}, {facts['machine']['threads']} threads", output)
        print(f"{output} drawn", file=sys.stderr)
    print(json.dumps(facts | {"block_size": BLOCK} | found))


if __name__ == "__main__":
    main()
