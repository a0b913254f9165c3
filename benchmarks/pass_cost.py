"""What a pass costs by its size: a block denoised, a block checked, a step for many texts, in one-token steps.

    python benchmarks/pass_cost.py [--model DIR] [--context 256] [--threads 1] [--json]

A two-tower model pays where a pass over a block costs little more than a pass over one token. All passes run in turn in
one process, after a context of the same length; medians.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click

from twotower.allocator import keep_large_blocks

keep_large_blocks()

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from torch import Tensor  # noqa: E402

from twotower import TwoTowerForCausalLM, bundled_model, ready  # noqa: E402
from twotower.evaluation.machine import machine  # noqa: E402
from twotower.state import TowerState  # noqa: E402

SIZES = (1, 4, 8, 16, 32)
WARM_UP = 3


def passes(model: TwoTowerForCausalLM, context: int, room: int) -> dict[tuple[str, int], Callable[[], None]]:
    """Each kind of pass at each size, to be run up to `room` times."""
    device, mask = model.device, model.config.mask_token
    made: dict[tuple[str, int], Callable[[], None]] = {}

    def prepare(size: int) -> None:
        text = torch.randint(4, model.config.vocab_size, (size, context), device=device)
        lengths = torch.full((size,), context, device=device)
        many, one = (model.new_state(rows, context + room) for rows in (size, 1))
        model.prefill(text, lengths, many)
        model.prefill(text[:1], lengths[:1], one)
        another = one.snapshot()
        view = model.reader(one).view()
        block = torch.full((1, size), mask, device=device)
        t = torch.ones(1, device=device)

        made["step", size] = lambda: void(model.extend(text[:, :1], many))  # its texts grow by a token a run
        made["block", size] = lambda: void(model.denoise(block, t, view))
        made["check", size] = lambda: check(model, block, another, lengths[:1])

    for size in SIZES:
        prepare(size)
    return made


def check(model: TwoTowerForCausalLM, block: Tensor, state: TowerState, lengths: Tensor) -> None:
    """The context tower reads a block and its head judges every position; then the state is as before."""
    model.extend(block, state, logits=True)
    state.rollback(lengths)
    state.tighten(int(lengths))


def void(value: object) -> None:
    """A result that nobody wants."""


@torch.no_grad()
def measure(model: TwoTowerForCausalLM, context: int, repeats: int) -> dict[tuple[str, int], float]:
    """Median seconds."""
    made = passes(model, context, repeats + WARM_UP)
    times: dict[tuple[str, int], list[float]] = {key: [] for key in made}
    for repeat in range(repeats + WARM_UP):
        for key, run in made.items():
            started = time.perf_counter()
            run()
            model.synchronize()
            if repeat >= WARM_UP:
                times[key].append(time.perf_counter() - started)
    return {key: statistics.median(values) for key, values in times.items()}


@click.command()
@click.option("--model", "path", type=click.Path(exists=True, file_okay=False, path_type=Path), default=None)
@click.option("--device", type=click.Choice(("cpu", "cuda")), default="cpu", show_default=True)
@click.option("--dtype", type=click.Choice(("auto", "bfloat16", "float32")), default="auto", show_default=True)
@click.option("--context", default=256, show_default=True, help="Tokens before the pass.")
@click.option("--repeats", default=50, show_default=True)
@click.option("--threads", type=int, default=1, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="No table.")
def main(path: Path | None, device: str, dtype: str, context: int, repeats: int, threads: int, as_json: bool) -> None:
    """Measures the bundled model, or another."""
    torch.manual_seed(0)
    source = path or bundled_model()
    model = ready.load(source, dtype=dtype, context_device=device, threads=threads)
    seconds = measure(model, context, repeats)
    base = seconds["step", 1]
    if not as_json:
        table = Table("size", "step for so many texts", "block denoised", "block checked")
        for size in SIZES:
            cells = (
                f"{seconds[kind, size] * 1e3:.2f} ms, {seconds[kind, size] / base:.2f}×"
                for kind in ("step", "block", "check")
            )
            table.add_row(str(size), *cells)
        Console(file=sys.stderr).print(table)
    results = {f"{kind} {size}": value for (kind, size), value in seconds.items()}
    print(json.dumps({"benchmark": "pass_cost", "model": str(source), "machine": machine(model), "seconds": results}))


if __name__ == "__main__":
    main()
