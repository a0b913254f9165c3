"""What does a pass of a model with adapters cost, in steps of the autoregressive model?

    python benchmarks/round_cost.py --model DIR [--weights float32 …] [--width 2 …] [--rounds 9] [--threads 1] [--json]

A round of such a model is one pass over `width` tokens: the pending token, drafted tokens and masks. The gain is tokens
a round ÷ the cost of a round, so the cost is given in AR steps of the same model, engine and weights. Here every round
has one pending token and masks, none of which is confident, so adapters act at all but one token.

- step, round: milliseconds of an AR step and of a round, by `generate` with one text.
- host: what a round takes outside the C++ kernels.
- adapters: the time of a pass with adapters ÷ that of a plain pass over as many tokens (`extend` and logits).

All calls take turns; figures are medians over the rounds that count.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from common.models import Texts, random_tokens
from common.program import DIRECTORY, JSON, QUICK, THREADS, publish, start
from common.timing import TimedCall, interleaved
from peers import WEIGHTS
from rich.table import Table

from twotower import TwoTowerForCausalLM, bundled_model, model_loading
from twotower.decoding.params import GenerationParams
from twotower.engine.generation import generate
from twotower.evaluation.machine import machine_facts, machine_summary
from twotower.runners import decode_pass

NEVER = 0.999999  # no drafted token of an untrained model, and few of a trained one, are as sure
PASSES = 16  # passes in a row that are compared with plain ones


class Rounds:
    """Rounds of one width. Each call adds the milliseconds of a round, and of its kernels, to `taken`.

    The time of a text of `width` tokens is subtracted: the prompt, and rounds that the end of the text makes narrower.
    """

    def __init__(self, model: TwoTowerForCausalLM, prompt: list[int], width: int | None, tokens: int) -> None:
        self.model, self.prompt, self.width, self.tokens = model, prompt, width, tokens
        self.taken: list[tuple[float, float]] = []

    def __call__(self) -> None:
        least = self.width or 1
        short, long = self._text(least), self._text(least + self.tokens)
        passes, total, inside = (after - before for before, after in zip(short, long, strict=True))
        self.taken.append((total / passes * 1e3, inside / passes * 1e3))

    def _text(self, tokens: int) -> tuple[float, float, float]:
        """Decodes a text → its passes, its seconds, and the seconds in the kernels of decoding."""
        mode: dict[str, Any] = {"mode": "ar"}
        if self.width is not None:
            mode = {"mode": "diffusion", "block_size": self.width, "confidence_threshold": NEVER}
            mode["deterministic"] = True  # else passes become narrow
        params = GenerationParams.of(max_new_tokens=tokens, eos_token_id=(), **mode)
        original, inside = decode_pass.call, [0.0]

        def timed(*arguments: Any) -> None:
            before = time.perf_counter()
            original(*arguments)
            inside[0] += time.perf_counter() - before

        decode_pass.call = timed
        started = time.perf_counter()
        try:
            (output,) = generate(self.model, [self.prompt], params)
        finally:
            decode_pass.call = original
        return output.passes_of_both, time.perf_counter() - started, inside[0]

    def median(self, skipped: int) -> tuple[float, float]:
        """Milliseconds of a round, and of its part outside the kernels."""
        total, inside = (statistics.median(column[skipped:]) for column in zip(*self.taken, strict=True))
        return total, total - inside


def adapter_ratio(model: TwoTowerForCausalLM, width: int, length: int, rounds: int) -> float:
    """The time of passes with adapters at all but one token ÷ the time of plain passes: a median of ratios."""
    texts = Texts.random(model, 1, length + PASSES * width)
    tokens, first = random_tokens(model, 1, width), torch.tensor([1])

    def passes(prefix: torch.Tensor | None) -> None:
        for _ in range(PASSES):
            model.extend(tokens, texts.state, prefix=prefix)

    calls = {
        name: TimedCall(lambda prefix=prefix: passes(prefix), lambda: texts.set_length(length))
        for name, prefix in (("plain", None), ("adapters", first))
    }
    with torch.no_grad():
        times = interleaved(calls, torch.device("cpu"), rounds)
    return statistics.median(b / a for a, b in zip(times["plain"], times["adapters"], strict=True))


def measure(path: Path, weights: str, widths: Sequence[int], prompt: int, tokens: int, rounds: int) -> dict[str, Any]:
    kind = WEIGHTS[weights]
    model = model_loading.load_model(path, dtype=kind.dtype, quantization=kind.quantization)
    if model.config.denoiser.adapters is None:
        raise click.UsageError(f"{path} has no adapters; make a model with twotower init --denoiser-lora R")
    text = random_tokens(model, 1, prompt)[0].tolist()
    runs = {width: Rounds(model, text, width, tokens) for width in (None, *widths)}
    warm_up = 2
    for _ in range(rounds + warm_up):
        for run in runs.values():
            run()
    step, host = runs[None].median(warm_up)
    rows = []
    for width in widths:
        took, outside = runs[width].median(warm_up)
        ratio = adapter_ratio(model, width, prompt, rounds)
        rows.append({"width": width, "ms": took, "steps": took / step, "host_ms": outside, "adapters": ratio})
    return {
        "machine": machine_facts(model), "weights": weights, "prompt": prompt, "tokens": tokens, "step_ms": step,
        "step_host_ms": host, "rounds": rows,
    }  # fmt: skip


def tables(found: dict[str, Any]) -> Iterator[Table]:
    title = f"{machine_summary(found['machine'])}, {found['weights']}; AR step {found['step_ms']:.3f} ms"
    table = Table("width", "ms", "AR steps", "host, ms", "adapters ÷ plain", title=title)
    for row in found["rounds"]:
        cells = f"{row['ms']:.3f}", f"{row['steps']:.2f}", f"{row['host_ms']:.3f}", f"{row['adapters']:.2f}"
        table.add_row(str(row["width"]), *cells)
    yield table


@click.command()
@click.option("--model", "path", type=DIRECTORY, default=None, help="[default: bundled/adapters]")
@click.option("--weights", type=click.Choice(list(WEIGHTS)), multiple=True, default=["float32"], show_default=True)
@click.option("--width", "widths", type=int, multiple=True, default=(2, 4, 6, 8, 12, 16), show_default=True)
@click.option("--prompt", default=64, show_default=True, help="Tokens of the prompt.")
@click.option("--tokens", default=128, show_default=True, help="New tokens.")
@click.option("--rounds", default=9, show_default=True, help="Rounds that count.")
@THREADS
@QUICK
@JSON
def main(
    path: Path | None, weights: tuple[str, ...], widths: tuple[int, ...], prompt: int, tokens: int, rounds: int,
    threads: int | None, quick: bool, as_json: bool,
) -> None:  # fmt: skip
    """Measures one checkpoint, with one kind of weights after the other."""
    start(threads)
    if quick:
        prompt, tokens, rounds = 8, 12, 2
    path = path or bundled_model("adapters")
    results = [measure(path, kind, widths, prompt, tokens, rounds) for kind in weights]
    publish("round_cost", {"model": str(path), "measured": results}, (t for f in results for t in tables(f)), as_json)


if __name__ == "__main__":
    sys.exit(main())
