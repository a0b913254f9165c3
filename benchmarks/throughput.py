"""How fast is the engine with many requests at once, and with one request whose drafts are rarely accepted?

    python benchmarks/throughput.py requests [--model DIR] [--at-once 1,2,4,8,16,32,64] [--modes ar,diffusion,verified]
    python benchmarks/throughput.py worst-case [--model DIR] [--texts 8] [--tokens 256] [--rounds 5] [--threads 1]

requests: tokens per second by the number of requests at once, with the ratio that the pass's matmuls allow
(`common/matmuls.py`). The same texts are generated at every number, in groups if fewer run at once than there are
texts; the engine gets a group at once. A rate counts the tokens from the moment when every row of the group has begun
to the first end of a row ("overall" includes the prefill). There is no rate if rows end before all have begun: give
more --tokens. Latency is from a request's arrival to its end, for the
first block to its first new tokens; both include waiting for the prefill. If the number of passes depends on the text
(diffusion, verified), beginnings may be easier than ends, which favours N > 1 a little; "overall times one", in the
JSON, counts everything. Modes and numbers take turns within a round.

worst-case: seconds of verified mode with adaptive draft depth ÷ seconds of AR on the same texts, one request at a time.
Three kinds of text: random prompts continued at temperature 1.5, random prompts continued greedily, and problems of the
suite continued past their answers. AR and verified mode take turns text by text with the same seeds, so both write the
same text. Figures are medians of the ratios of a round. What a model learns about its drafts is kept from round to
round, as between requests.
"""

from __future__ import annotations

import random
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from common.matmuls import covered_share, matmul_ratios, matmul_runs
from common.models import BLOCK, DECODING
from common.program import DEVICE, JSON, MODEL, QUICK, THREADS, names, numbers, publish, start
from common.request_groups import Group, join, run_group
from common.timing import interleaved, medians, percentile
from rich.console import RenderableType
from rich.table import Table

from twotower import LLM, Generation, GenerationParams, Request, TwoTowerForCausalLM, bundled_model, model_loading
from twotower.evaluation.machine import machine_facts
from twotower.evaluation.running import generate_all
from twotower.evaluation.tasks import make_problems
from twotower.evaluation.workloads import few_shot_prompts

AT_ONCE = (1, 2, 4, 8, 16, 32, 64)
NOISE = 24  # random tokens of a prompt


# --- requests at once -------------------------------------------------------------------------------------------------


@torch.no_grad()
def measure(
    model: TwoTowerForCausalLM,
    *,
    at_once: Sequence[int] = AT_ONCE,
    modes: Sequence[str] = tuple(DECODING),
    texts: int = 16,
    context: int = 64,
    tokens: int = 128,
    rounds: int = 2,
    prompts: list[list[int]] | None = None,
    progress: Callable[[str], object] = lambda text: None,
) -> dict[str, Any]:
    """Measures every mode at every number of requests at once; at_once begins with 1."""
    most = max(texts, *at_once)
    prompts = prompts or few_shot_prompts(model, most, context)
    shared = {"max_new_tokens": tokens, "mask_token_id": model.config.mask_token, "seed": 0}
    asked = {mode: GenerationParams.of(**DECODING[mode], **shared) for mode in modes}
    length = max(map(len, prompts)) + tokens
    engines = {rows: LLM(model, rows=rows, length=length, block_size=BLOCK) for rows in at_once}
    found: dict[tuple[str, int], list[Group]] = {(mode, rows): [] for mode in modes for rows in at_once}
    for number in range(rounds + 1):
        for (mode, rows), groups in found.items():
            progress(f"round {number} of {rounds}: {mode}, {rows} at once")
            count = max(texts, rows) if number else rows  # the first round is a warm-up
            parts = [prompts[start : start + rows] for start in range(0, count, rows)]
            group = join([run_group(engines[rows], part, asked[mode]) for part in parts])
            if number:
                groups.append(group)
    first = found[modes[0], at_once[0]]
    runs = {name: run for rows in at_once for name, run in matmul_runs(model, rows).items()}
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
        rates, single = [group.rate for group in groups], [group.rate for group in alone]
        own = median_or_none([a and b and a / b for a, b in zip(rates, single, strict=True)])
        latency = sorted(value for group in groups for value in group.latency)
        block = sorted(value for group in groups for value in group.first)
        rows_found.append(
            {
                "mode": mode,
                "at once": rows,
                "tokens/s": median_or_none(rates),
                "overall tokens/s": statistics.median(group.all_tokens / group.all_seconds for group in groups),
                "times one": own,
                "overall times one": statistics.median(
                    one.all_seconds / group.all_seconds * group.all_tokens / one.all_tokens
                    for group, one in zip(groups, alone, strict=True)
                ),
                "matmuls allow": allowed[mode][rows],
                "share of it": own and own / allowed[mode][rows],
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


def median_or_none(values: Sequence[float | None]) -> float | None:
    """The median; None if a round has no rate."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if len(known) == len(values) else None


def shown(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def tables(found: dict[str, Any]) -> Iterator[RenderableType]:
    table = Table(
        "mode", "at once", "tokens/s", "× one", "matmuls", "share", "overall", "p50, ms", "p95, ms", "first p50",
        "first p95", title=f"{found['context']} tokens of prompt, {found['tokens']} new ones",
    )  # fmt: skip
    for row in found["measured"]:
        table.add_row(
            row["mode"], str(row["at once"]), shown(row["tokens/s"], 0), shown(row["times one"], 2),
            f"{row['matmuls allow']:.2f}", shown(row["share of it"], 2), f"{row['overall tokens/s']:.0f}",
            *(f"{row[f'{what} {part}'] * 1e3:.0f}" for what in ("latency", "first block") for part in ("p50", "p95")),
        )  # fmt: skip
    yield table
    for row in found["measured"]:
        if row["tokens/s"] is None:
            yield f"{row['mode']}, {row['at once']} at once: no rate: rows end before all have begun; more --tokens"
        if row["same texts as alone"] < 1:
            yield f"{row['mode']}, {row['at once']} at once: {row['same texts as alone']:.1%} of texts as alone"


# --- worst case of adaptive drafting ----------------------------------------------------------------------------------


def kinds(model: TwoTowerForCausalLM, texts: int) -> dict[str, tuple[list[list[int]], float]]:
    """Prompts and temperature of each kind of text."""
    rng = random.Random(0)
    noise = [[rng.randrange(4, model.config.vocab_size) for _ in range(NOISE)] for _ in range(texts)]
    solved = [model.tokenizer(problem.prompt)["input_ids"] for problem in make_problems("test", texts, 0)]
    return {"noise, temperature 1.5": (noise, 1.5), "noise, greedy": (noise, 0.0), "suite, greedy": (solved, 0.0)}


def written(
    model: TwoTowerForCausalLM, mode: str, number: int, prompt: list[int], tokens: int, warm: float
) -> Generation:
    """Generates one text alone, without EOS, so that all texts have the same length."""
    params = GenerationParams.of(
        mode=mode, max_new_tokens=tokens, temperature=warm, seed=number, mask_token_id=model.config.mask_token
    )
    (output,) = generate_all(model, [Request(prompt, params)], rows=1)
    return output


def worst_case(model: TwoTowerForCausalLM, texts: int, tokens: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Measures each kind of text."""
    for name, (prompts, warm) in kinds(model, texts).items():
        ratios: list[float] = []
        for number in range(rounds + 1):
            print(f"{name}: round {number} of {rounds}", file=sys.stderr)
            outputs: dict[str, list[Generation]] = {"ar": [], "verified": []}
            for i, prompt in enumerate(prompts):
                for mode in sorted(outputs, reverse=(i + number) % 2 == 0):
                    outputs[mode].append(written(model, mode, i, prompt, tokens, warm))
            ar, verified = outputs["ar"], outputs["verified"]
            if number:  # the first round is a warm-up
                ratios.append(sum(o.decode_seconds for o in verified) / sum(o.decode_seconds for o in ar))
        yield {
            "text": name, "ratio": statistics.median(ratios), "ratios": ratios,
            "drafts": sum(o.drafts for o in verified), "kept": sum(o.accepted for o in verified),
            "differ": sum(a.tokens != b.tokens for a, b in zip(ar, verified, strict=True)),
        }  # fmt: skip


def table_of_worst_case(found: Sequence[dict[str, Any]], texts: int) -> Table:
    table = Table("text", "verified ÷ AR, seconds", "lowest … highest", "drafts", "kept a draft", "texts that differ")
    for row in found:
        table.add_row(
            row["text"], f"{row['ratio']:.3f}", f"{min(row['ratios']):.3f} … {max(row['ratios']):.3f}",
            str(row["drafts"]), f"{row['kept'] / max(row['drafts'], 1):.2f}", f"{row['differ']} of {texts}",
        )  # fmt: skip
    return table


# --- two commands -----------------------------------------------------------------------------------------------------


@click.group()
def main() -> None:
    """Tokens per second of the engine."""


@main.command("requests")
@MODEL
@DEVICE
@click.option("--dtype", type=click.Choice(model_loading.DTYPES), default="auto", show_default=True)
@click.option("--at-once", callback=numbers, default=",".join(map(str, AT_ONCE)), show_default=True)
@click.option("--modes", default=",".join(DECODING), show_default=True)
@click.option("--texts", default=16, show_default=True, help="Texts at every number of requests, at least.")
@click.option("--context", default=64, show_default=True, help="Tokens of a prompt.")
@click.option("--tokens", default=128, show_default=True, help="New tokens of a text.")
@click.option("--rounds", default=2, show_default=True)
@THREADS
@QUICK
@JSON
def requests_at_once(
    path: Path | None, device: str, dtype: str, at_once: tuple[int, ...], modes: str, texts: int, context: int,
    tokens: int, rounds: int, threads: int | None, quick: bool, as_json: bool,
) -> None:  # fmt: skip
    """Many requests at once, with bundled/small or another model trained on the suite's texts."""
    start(threads)
    chosen = names(modes, DECODING, "--modes")
    if at_once[0] != 1:
        at_once = (1, *at_once)
    if quick:
        at_once, texts, context, tokens, rounds = (1, 3), 3, 24, 36, 1
    source = model_loading.source_of("bundled/small" if path is None else str(path))
    model = model_loading.load_model(source, dtype=dtype, context_device=device)
    if model.denoiser is None:
        raise click.UsageError(
            f"{source}: its denoiser is adapters, and the roofline is that of towers; round_cost.py measures adapters"
        )
    found = measure(
        model, at_once=at_once, modes=chosen, texts=texts, context=context, tokens=tokens, rounds=rounds,
        progress=lambda text: print(text, file=sys.stderr),
    )  # fmt: skip
    facts = {"model": model_loading.name_of(source), "machine": machine_facts(model)} | found
    publish("throughput requests", facts, tables(found), as_json)


@main.command("worst-case")
@MODEL
@click.option("--texts", default=8, show_default=True)
@click.option("--tokens", default=256, show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--dtype", default="float32", show_default=True)
@QUICK
@JSON
def worst_case_of_drafting(
    path: Path | None, texts: int, tokens: int, rounds: int, threads: int, dtype: str, quick: bool, as_json: bool
) -> None:
    """Verified mode with rarely accepted drafts, against AR."""
    start(threads)
    if quick:
        texts, tokens, rounds = 1, 24, 1
    model = TwoTowerForCausalLM.from_pretrained(path or bundled_model("small"), dtype=dtype)
    found = list(worst_case(model, texts, tokens, rounds))
    facts = {"machine": machine_facts(model), "texts": texts, "tokens": tokens, "measured": found}
    publish("throughput worst-case", facts, [table_of_worst_case(found, texts)], as_json)


if __name__ == "__main__":
    main()
