"""Tokens per second against how many requests run at once, in the engine, beside what the pass's own matmuls allow.

    python benchmarks/throughput.py [--model DIR] [--at-once 1,2,4,8,16,32,64] [--modes ar,diffusion,verified] [--quick]

The same texts at every number of requests at once (in groups, where fewer run at once than there are texts); each group
is handed to the engine in one go. A rate counts the tokens between the first moment when every row of the group writes
and the first end of one (prefill apart: "overall" includes it). Latency is from a request's arrival to its end, the
first block's to its first new tokens; a request that waits for its prompt to be read waits in both. Where the number
of passes depends on the text (diffusion, verified) beginnings may be easier than ends, which favours N > 1 a little;
"overall times one", in the JSON, counts everything, the emptying at the end included.

The matmuls' ratio: the modules with weights of the passes that a block (or a step) takes, called one after the other
on random inputs for one row and for N rows, N · seconds(1) ÷ seconds(N). Modes and numbers in turn within a round.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from twotower.allocator import keep_large_blocks

keep_large_blocks()

import torch  # noqa: E402
from models import BLOCK  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from timing import Run, interleaved, medians, percentile, ratio, synchronize  # noqa: E402
from torch import nn  # noqa: E402

from twotower import LLM, Request, TwoTowerForCausalLM, model_loading  # noqa: E402
from twotower.decoding.params import GenerationParams  # noqa: E402
from twotower.evaluation.machine import machine  # noqa: E402
from twotower.evaluation.speed import few_shot_prompts  # noqa: E402
from twotower.model.moe import Experts  # noqa: E402
from twotower.model.tower import Tower  # noqa: E402

AT_ONCE = (1, 2, 4, 8, 16, 32, 64)
MODES: dict[str, dict[str, Any]] = {
    "ar": {"mode": "ar"},
    "diffusion": {"mode": "diffusion", "block_size": BLOCK, "confidence_threshold": 0.8},
    "verified": {"mode": "verified", "block_size": BLOCK, "draft_steps": 1},
}


@dataclass
class Group:
    """What running some requests at once gave; tokens and seconds: of the stretch in which all rows write."""

    tokens: int = 0
    seconds: float = 0.0
    all_tokens: int = 0
    all_seconds: float = 0.0
    latency: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    texts: list[tuple[int, ...]] = field(default_factory=list)
    denoiser_passes: int = 0
    context_passes: int = 0


def run_group(llm: LLM, prompts: Sequence[list[int]], params: GenerationParams) -> Group:
    """All of them at once, to their ends."""
    device = llm.model.device
    synchronize(device)
    started = time.perf_counter()
    numbers = [llm.add_request(Request(prompt, params)) for prompt in prompts]
    first: dict[int, float] = {}
    ended: dict[int, Any] = {}
    out, opened = Group(), 0.0
    while len(ended) < len(numbers):
        events = llm.step()
        now = time.perf_counter()  # events hold tokens on the host: what they tell of is done
        if opened and not ended:
            out.tokens += sum(len(event.tokens) for event in events)
            out.seconds = now - opened
        for event in events:
            if event.tokens:
                first.setdefault(event.row, now - started)
            if event.result is not None:
                ended[event.row] = event.result
                out.latency.append(now - started)
        if not opened and len(first) == len(numbers):
            opened = now
    out.all_seconds = time.perf_counter() - started
    results = [ended[number] for number in numbers]
    out.all_tokens = sum(len(result.tokens) for result in results)
    out.first = [first[number] for number in numbers]
    out.texts = [tuple(result.tokens) for result in results]
    out.denoiser_passes = sum(result.denoiser_passes for result in results)
    out.context_passes = sum(result.context_passes for result in results)
    return out


def join(groups: Sequence[Group]) -> Group:
    """The groups one after the other."""
    out = Group()
    for group in groups:
        for name in vars(out):
            setattr(out, name, getattr(out, name) + getattr(group, name))
    return out


# --- the matmuls alone ----------------------------------------------------------------------------------------------


def matmuls(tower: Tower, tokens: int, head: bool) -> tuple[list[Callable[[], object]], int]:
    """A tower's modules with weights, each on so many tokens of random input, and the bytes of those weights."""
    calls: list[Callable[[], object]] = []
    covered = 0
    weight = next(tower.parameters())
    for name, module in tower.named_modules():
        if name == "head" and not head:
            continue
        if isinstance(module, nn.Linear):
            x = torch.randn(1, tokens, module.in_features, device=weight.device, dtype=weight.dtype)
            calls.append(lambda module=module, x=x: module(x))
        elif isinstance(module, Experts):
            config = tower.config
            x = torch.randn(tokens, config.hidden_size, device=weight.device, dtype=weight.dtype)
            scores = torch.rand(tokens, config.n_routed_experts, device=weight.device)
            share, choice = scores.topk(config.num_experts_per_tok, -1)
            calls.append(lambda module=module, x=x, choice=choice, share=share: module(x, choice, share))
        else:
            continue  # routers, a few rows, are neither run nor counted as covered
        covered += sum(parameter.nbytes for parameter in module.parameters())
    return calls, covered


@dataclass
class Matmuls:
    """The passes at a number of rows: the denoiser over blocks, the context tower over blocks or tokens."""

    model: TwoTowerForCausalLM
    rows: int

    def runs(self) -> dict[str, Run]:
        model = self.model
        assert model.denoiser is not None
        made = {
            "step": matmuls(model.context, self.rows, True),
            "denoise": matmuls(model.denoiser, self.rows * BLOCK, True),
            "commit": matmuls(model.context, self.rows * BLOCK, False),
            "check": matmuls(model.context, self.rows * BLOCK, True),
        }
        return {
            f"{kind} {self.rows}": Run(lambda calls=calls: [call() for call in calls])
            for kind, (calls, _) in made.items()
        }


def covered_share(model: TwoTowerForCausalLM) -> float:
    """Of a tower's weights, the embedding apart: how much of them the matmuls that are timed read."""
    _, covered = matmuls(model.context, 1, True)
    every = sum(parameter.nbytes for parameter in model.context.parameters())
    return covered / (every - model.context.embeddings.weight.nbytes)


def matmul_ratios(times: dict[str, list[float]], at_once: Sequence[int], passes: float) -> dict[str, dict[int, float]]:
    """N rows' rate ÷ one row's, by the matmuls alone; a block of diffusion takes `passes` of the denoiser and a
    commit, a round of verified decoding one pass and a check."""

    def of(rows: int, weights: dict[str, float]) -> list[float]:
        columns = [[share * value for value in times[f"{kind} {rows}"]] for kind, share in weights.items()]
        return [sum(column) for column in zip(*columns, strict=True)]

    kinds = {
        "ar": {"step": 1.0},
        "diffusion": {"denoise": passes, "commit": 1.0},
        "verified": {"denoise": 1.0, "check": 1.0},
    }
    return {
        mode: {rows: rows * ratio(of(1, weights), of(rows, weights)) for rows in at_once}
        for mode, weights in kinds.items()
    }


# --- measuring --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def measure(
    model: TwoTowerForCausalLM,
    *,
    at_once: Sequence[int] = AT_ONCE,
    modes: Sequence[str] = tuple(MODES),
    texts: int = 16,
    context: int = 64,
    tokens: int = 128,
    rounds: int = 2,
    prompts: list[list[int]] | None = None,
    progress: Callable[[str], object] = lambda text: None,
) -> dict[str, Any]:
    """Every mode at every number of requests at once; at_once begins with 1."""
    most = max(texts, *at_once)
    prompts = prompts or few_shot_prompts(model, most, context)
    shared = {"max_new_tokens": tokens, "mask_token_id": model.config.mask_token, "seed": 0}
    asked = {mode: GenerationParams.of(**MODES[mode], **shared) for mode in modes}
    length = max(map(len, prompts)) + tokens
    engines = {rows: LLM(model, rows=rows, length=length, block_size=BLOCK) for rows in at_once}
    found: dict[tuple[str, int], list[Group]] = {(mode, rows): [] for mode in modes for rows in at_once}
    for number in range(rounds + 1):
        for (mode, rows), groups in found.items():
            progress(f"round {number} of {rounds}: {mode}, {rows} at once")
            count = max(texts, rows) if number else rows  # the first round warms up
            parts = [prompts[start : start + rows] for start in range(0, count, rows)]
            group = join([run_group(engines[rows], part, asked[mode]) for part in parts])
            if number:
                groups.append(group)
    first = found[modes[0], at_once[0]]
    assert all(group.tokens for groups in found.values() for group in groups), "texts too short to measure a rate"
    runs = {name: run for rows in at_once for name, run in Matmuls(model, rows).runs().items()}
    progress("matmuls alone")
    times = interleaved(runs, model.device, max(3 * rounds, 3), warm_up=2, least=0.002)
    per_block = statistics.mean(
        group.denoiser_passes / (group.all_tokens / BLOCK) for group in found.get(("diffusion", 1), first)
    )
    allowed = matmul_ratios(times, at_once, per_block)
    rows_found = []
    for (mode, rows), groups in found.items():
        alone = found[mode, at_once[0]]
        same = [
            a == b
            for group, one in zip(groups, alone, strict=True)
            for a, b in zip(group.texts, one.texts, strict=False)
        ]
        own = statistics.median(
            (group.tokens / group.seconds) / (one.tokens / one.seconds)
            for group, one in zip(groups, alone, strict=True)
        )
        latency = sorted(value for group in groups for value in group.latency)
        block = sorted(value for group in groups for value in group.first)
        rows_found.append(
            {
                "mode": mode,
                "at once": rows,
                "tokens/s": statistics.median(group.tokens / group.seconds for group in groups),
                "overall tokens/s": statistics.median(group.all_tokens / group.all_seconds for group in groups),
                "times one": own,
                "overall times one": statistics.median(
                    one.all_seconds / group.all_seconds * group.all_tokens / one.all_tokens
                    for group, one in zip(groups, alone, strict=True)
                ),
                "matmuls allow": allowed[mode][rows],
                "share of it": own / allowed[mode][rows],
                "latency p50": percentile(latency, 0.50),
                "latency p95": percentile(latency, 0.95),
                "first block p50": percentile(block, 0.50),
                "first block p95": percentile(block, 0.95),
                "tokens per pass": statistics.median(
                    group.all_tokens / max(group.denoiser_passes + group.context_passes, 1) for group in groups
                ),
                "same texts as alone": sum(same) / len(same),
            }
        )
    return {
        "context": context, "tokens": tokens, "texts": texts, "rounds": rounds, "measured": rows_found,
        "matmul seconds": medians(times), "matmuls cover": covered_share(model), "denoiser passes a block": per_block,
    }  # fmt: skip


def show(found: dict[str, Any], console: Console) -> None:
    table = Table(
        "mode", "at once", "tokens/s", "× one", "matmuls", "share", "overall", "p50, ms", "p95, ms", "first p50",
        "first p95", title=f"{found['context']} tokens of prompt, {found['tokens']} new ones",
    )  # fmt: skip
    for row in found["measured"]:
        table.add_row(
            row["mode"], str(row["at once"]), f"{row['tokens/s']:.0f}", f"{row['times one']:.2f}",
            f"{row['matmuls allow']:.2f}", f"{row['share of it']:.2f}", f"{row['overall tokens/s']:.0f}",
            *(f"{row[f'{what} {part}'] * 1e3:.0f}" for what in ("latency", "first block") for part in ("p50", "p95")),
        )  # fmt: skip
    console.print(table)
    differ = [row for row in found["measured"] if row["same texts as alone"] < 1]
    for row in differ:
        console.print(f"{row['mode']}, {row['at once']} at once: {row['same texts as alone']:.1%} of texts as alone")


def numbers(_: Any, __: Any, text: str) -> tuple[int, ...]:
    """A comma-separated list."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise click.BadParameter(f"{text!r} is no list of numbers; give some as 1,2,4") from None


@click.command()
@click.option("--model", "path", type=click.Path(exists=True, file_okay=False, path_type=Path), default=None)
@click.option("--device", type=click.Choice(("cpu", "cuda")), default="cpu", show_default=True)
@click.option("--dtype", type=click.Choice(model_loading.DTYPES), default="auto", show_default=True)
@click.option("--at-once", callback=numbers, default=",".join(map(str, AT_ONCE)), show_default=True)
@click.option("--modes", default=",".join(MODES), show_default=True)
@click.option("--texts", default=16, show_default=True, help="At least so many, at every number at once.")
@click.option("--context", default=64, show_default=True, help="Tokens of a prompt.")
@click.option("--tokens", default=128, show_default=True, help="New ones of a text.")
@click.option("--rounds", default=2, show_default=True)
@click.option("--threads", type=int, default=None, help="[default: the product's choice]")
@click.option("--quick", is_flag=True, help="Seconds.")
@click.option("--json", "as_json", is_flag=True, help="No table.")
def main(
    path: Path | None, device: str, dtype: str, at_once: tuple[int, ...], modes: str, texts: int, context: int,
    tokens: int, rounds: int, threads: int | None, quick: bool, as_json: bool,
) -> None:  # fmt: skip
    """Measures the bundled model, or another that knows the suite's texts."""
    torch.manual_seed(0)
    chosen = tuple(modes.split(","))
    unknown = sorted(set(chosen) - set(MODES))
    if unknown:
        raise click.BadParameter(f"{', '.join(unknown)}: choose of {', '.join(MODES)}", param_hint="--modes")
    if at_once[0] != 1:
        at_once = (1, *at_once)
    if quick:
        at_once, texts, context, tokens, rounds = (1, 3), 3, 24, 36, 1
    source = model_loading.source_of(None if path is None else str(path))
    model = model_loading.load(source, dtype=dtype, context_device=device, threads=threads)
    found = measure(
        model, at_once=at_once, modes=chosen, texts=texts, context=context, tokens=tokens, rounds=rounds,
        progress=lambda text: print(text, file=sys.stderr),
    )  # fmt: skip
    if not as_json:
        show(found, Console(stderr=True, width=140))
    print(
        json.dumps(
            {"benchmark": "throughput", "model": model_loading.name_of(source), "machine": machine(model)} | found
        )
    )


if __name__ == "__main__":
    main()
