"""How does a pass compare with its roofline, with transformers, and with a naive implementation?

    python benchmarks/passes.py [--config FILE | --model DIR] [--dtype float32] [--quantization int8] [--device cuda]
        [--threads 2] [--quick]
    python benchmarks/passes.py --rates-only [--config FILE] [--context 256]

- an AR step, a denoising pass and a commit of one text, each with its roofline (`common/roofline.py`);
- the denoising pass against the naive reference (`common/naive.py`), whose logits are compared first. A pass of the
  reference includes its share of the block's copy of the cache;
- AR end to end against transformers' `NemotronHForCausalLM.generate` with the same weights and dtype;
- diffusion against AR at a forced number of tokens per denoising pass, through `twotower.generate`.

--rates-only measures the machine's rates and prints the rooflines of the three passes, with experts chosen at random.
It also prints how many times AR diffusion would be at these rooflines, with 1, 8 and 64 texts at once.

All passes of a dtype take turns in one process; figures are medians. Without --model: random weights of the shape in
--config. Blocks hold random tokens instead of masks, so that they visit as many experts as in a trained model.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import click
import torch
from common import roofline
from common.forced_rate import RATES, diffusion_against_ar
from common.models import BLOCK, MIDSIZE, config_of, model_for, name_of, random_tokens
from common.naive import NaiveDenoiser
from common.pass_runs import PassRuns
from common.program import CONFIG, DEVICE, JSON, MODEL, QUICK, THREADS, publish, start
from common.times_ar import ROWS, TOKENS_PER_PASS, at_roofline
from common.timing import TimedCall, interleaved, medians, ratio, synchronize
from common.transformers_baseline import transformers_baseline
from rich.console import RenderableType
from rich.table import Table

from twotower import TwoTowerForCausalLM
from twotower.evaluation.machine import device_facts, machine_facts, machine_summary
from twotower.ops.precision import has_fast_bf16_matmul

# --- passes and their rooflines ----------------------------------------------------------------------------------


@torch.no_grad()
def costs(
    model: TwoTowerForCausalLM, rates: roofline.Rates, *, context: int, repeats: int, naive: bool, per_pass: float = 3.0
) -> dict[str, Any]:
    """Medians of every pass after a text of `context` tokens.

    per_pass: tokens per pass, which sets a pass's share of the naive reference's copy of the cache.
    """
    device, config, dtype = model.device, model.config.layer_fields, model.dtype
    assert model.denoiser is not None
    shape: dict[str, Any] = {"rows": 1, "context": context, "quantization": model.quantization}
    experts: dict[str, Any] = {}
    runs = PassRuns(model, context).after(context)

    def work_of(name: str, tower: torch.nn.Module, width: int, **more: bool) -> roofline.Work:
        """The work of a pass, with the experts that its tokens choose."""
        runs[name].before()
        with roofline.counting_experts(tower) as choices:
            runs[name].call()
        synchronize(device)
        visited, how = roofline.visited(choices, config, width)
        experts[name] = {"mean": sum(visited) / max(len(visited), 1), "how": how}
        return roofline.work(config, dtype, width=width, experts=visited, **more, **shape)

    works = {
        "AR step": work_of("AR step", model.context, 1),
        "denoiser pass": work_of("denoiser pass", model.denoiser, BLOCK, denoiser=True),
        "commit": work_of("commit", model.context, BLOCK, head=False),
    }
    found: dict[str, Any] = {}
    if naive:
        still, reference = PassRuns(model, context), NaiveDenoiser(model)
        view = still.look(context)
        reference.begin(view)
        found["naive logits differ by"] = difference(still.denoise(), reference(still.block, still.t))
        runs["naive pass"] = TimedCall(lambda: reference(still.block, still.t))
        runs["naive clone"] = TimedCall(lambda: reference.begin(view))
    times = interleaved(runs, device, repeats)
    seconds = medians(times)
    found["passes"] = {
        name: {
            "seconds": seconds[name],
            "best": min(times[name]),
            "roofline": roofline.pass_seconds(work, rates),
            "times roofline": seconds[name] / roofline.pass_seconds(work, rates),
            "AR steps": ratio(times[name], times["AR step"]),
            "bytes": work.bytes,
            "operations": work.operations,
            "experts": experts[name],
        }
        for name, work in works.items()
    }
    if naive:
        passes = -(-BLOCK // per_pass)
        whole = [a + b / passes for a, b in zip(times["naive pass"], times["naive clone"], strict=True)]
        found["naive"] = {
            "pass seconds": seconds["naive pass"],
            "clone seconds": seconds["naive clone"],
            "passes a block": passes,
            "times ours": ratio(whole, times["denoiser pass"]),
        }
    return found


def difference(ours: torch.Tensor, other: torch.Tensor) -> dict[str, float]:
    """The largest difference of logits, in standard deviations of the logits."""
    gap = (ours - other).abs() / other.std()
    return {"largest": float(gap.max()), "mean": float(gap.mean())}


# --- AR against transformers ----------------------------------------------------------------------------------------


@torch.no_grad()
def against_transformers(model: TwoTowerForCausalLM, *, context: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Greedy continuations of one prompt; both sides include the prefill."""
    hf = transformers_baseline(model)
    prompt = random_tokens(model, 1, context, seed=2)
    written: dict[str, list[int]] = {}

    def ours() -> None:
        written["ours"] = model.generate_ar(prompt, max_new_tokens=tokens)[0, context:].tolist()

    def theirs() -> None:
        out = hf.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, min_new_tokens=tokens,
            do_sample=False, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        written["theirs"] = out[0, context:].tolist()

    times = interleaved({"ours": TimedCall(ours), "theirs": TimedCall(theirs)}, model.device, rounds, warm_up=1)
    seconds = medians(times)
    same = [a == b for a, b in zip(written["ours"], written["theirs"], strict=True)]
    return {
        "tokens": tokens,
        "ours tokens/s": tokens / seconds["ours"],
        "theirs tokens/s": tokens / seconds["theirs"],
        "ratio": ratio(times["theirs"], times["ours"]),
        "same tokens": all(same),
        "same until": same.index(False) if False in same else tokens,
    }


def from_passes(passes: dict[str, Any], per_pass: float) -> float:
    """× AR computed from the costs of passes at a number of tokens per pass, without time between passes."""
    steps = passes["denoiser pass"]["AR steps"] * BLOCK / per_pass + passes["commit"]["AR steps"]
    return BLOCK / steps


# --- one command ----------------------------------------------------------------------------------------------------


def measure(
    model: TwoTowerForCausalLM, *, context: int, repeats: int, tokens: int, rounds: int, quick: bool,
    transformers: bool = True, naive: bool = True, per_pass: tuple[float, ...] = RATES,
    rates: roofline.Rates | None = None,
) -> dict[str, Any]:  # fmt: skip
    """All measurements of one model."""
    if rates is None:
        rates = roofline.measure(model.device, model.dtype, quick=quick)
    found: dict[str, Any] = {"machine": machine_facts(model), "context": context, "rates": asdict(rates)}
    found |= costs(model, rates, context=context, repeats=repeats, naive=naive)
    found["diffusion"] = diffusion_against_ar(model, context=context, tokens=tokens, rounds=rounds, per_pass=per_pass)
    for row in found["diffusion"]:
        row["times AR by passes"] = from_passes(found["passes"], row["tokens per pass"])
    if transformers:
        found["transformers"] = against_transformers(model, context=min(context, 32), tokens=tokens, rounds=rounds)
    return found


def tables(found: dict[str, Any]) -> Iterator[RenderableType]:
    """The tables of one dtype."""
    rates = roofline.Rates(**found["rates"])
    title = f"{machine_summary(found['machine'])}: {roofline.rates_summary(rates)}"
    table = Table("pass", "ms", "roofline, ms", "× roofline", "AR steps", "reads", "experts a layer", title=title)
    for name, one in found["passes"].items():
        table.add_row(
            name, f"{one['seconds'] * 1e3:.2f}", f"{one['roofline'] * 1e3:.2f}", f"{one['times roofline']:.2f}",
            f"{one['AR steps']:.2f}", f"{one['bytes'] / 1e6:.1f} MB",
            f"{one['experts']['mean']:.1f} {one['experts']['how']}",
        )  # fmt: skip
    yield table
    if "naive" in found:
        one, gap = found["naive"], found["naive logits differ by"]
        yield (
            f"naive denoiser: pass {one['pass seconds'] * 1e3:.2f} ms, clone {one['clone seconds'] * 1e3:.2f} ms a "
            f"block = [b]{one['times ours']:.2f}×[/b] ours; logits differ by at most {gap['largest']:.1e} σ"
        )
    table = Table("tokens per pass", "tokens/s", "AR tokens/s", "× AR", "× AR by passes alone")
    for row in found["diffusion"]:
        table.add_row(
            f"{row['tokens per pass']:.2f}", f"{row['tokens/s']:.1f}", f"{row['AR tokens/s']:.1f}",
            f"{row['times AR']:.2f}", f"{row['times AR by passes']:.2f}",
        )  # fmt: skip
    yield table
    if "transformers" in found:
        one = found["transformers"]
        same = "the same tokens" if one["same tokens"] else f"the same until token {one['same until']}"
        yield (
            f"AR end to end: {one['ours tokens/s']:.1f} tokens/s, transformers {one['theirs tokens/s']:.1f}: "
            f"[b]{one['ratio']:.2f}×[/b]; {same}"
        )


def rates_and_rooflines(config: Path | None, device: str, dtype: str, context: int, quick: bool) -> dict[str, Any]:
    """The machine's rates, and the rooflines of the passes over one text of the shape in `config`."""
    where, what = torch.device(device), getattr(torch, dtype)
    rates = roofline.measure(where, what, quick=quick)
    works = roofline.passes_of(config_of(config or MIDSIZE).layer_fields, what, context)
    return {
        "machine": device_facts(where, what), "model": str(config or MIDSIZE.name), "rates": asdict(rates),
        "work": {name: asdict(one) for name, one in works.items()},
        "rooflines": {name: roofline.pass_seconds(one, rates) for name, one in works.items()},
        "times AR by rows": {
            f"{per_pass:g}": at_roofline(config_of(config or MIDSIZE).layer_fields, what, rates, context=context,
                                         per_pass=per_pass)
            for per_pass in TOKENS_PER_PASS
        },
    }  # fmt: skip


def roofline_table(found: dict[str, Any]) -> Table:
    table = Table(
        "pass", "reads", "computes", "roofline", title=roofline.rates_summary(roofline.Rates(**found["rates"]))
    )
    for name, one in found["work"].items():
        read = f"{sum(one['parts'].values()) / 1e6:.1f} MB"
        table.add_row(name, read, f"{one['operations'] / 1e9:.3f} GFLOP", f"{found['rooflines'][name] * 1e3:.3f} ms")
    return table


def times_ar_table(found: dict[str, Any]) -> Table:
    """× AR at the roofline, by tokens per pass and rows."""
    table = Table("tokens per pass", *(f"{rows} rows" for rows in ROWS), title="× AR, if each pass took its roofline")
    for per_pass, by_rows in found["times AR by rows"].items():
        table.add_row(per_pass, *(f"{value:.2f}" for value in by_rows.values()))
    return table


@click.command()
@MODEL
@CONFIG
@DEVICE
@click.option(
    "--dtype", "dtypes", type=click.Choice(roofline.DTYPES), multiple=True,
    help="Can be repeated.  [default: float32, and bfloat16 if the device has fast matmuls in it]",
)  # fmt: skip
@click.option(
    "--quantization", "quantizations", type=click.Choice(("none", "int8", "int4")), multiple=True, default=("none",),
    show_default=True, help="Can be repeated, for each dtype. int8, int4: without transformers and naive reference.",
)  # fmt: skip
@click.option("--context", default=256, show_default=True, help="Tokens before the pass.")
@click.option("--repeats", default=30, show_default=True, help="Repeats of each pass.")
@click.option("--tokens", default=96, show_default=True, help="Tokens of each text.")
@click.option("--rounds", default=3, show_default=True, help="Rounds of texts.")
@click.option("--rates-only", is_flag=True, help="Only the machine's rates and the rooflines, of the first dtype.")
@THREADS
@QUICK
@JSON
def main(
    path: Path | None, config: Path | None, device: str, dtypes: tuple[str, ...], quantizations: tuple[str, ...],
    context: int, repeats: int, tokens: int, rounds: int, rates_only: bool, threads: int | None, quick: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Measures one model, dtype by dtype."""
    start(threads)
    if not dtypes:
        both = has_fast_bf16_matmul(torch.device(device)) and not quick
        dtypes = roofline.DTYPES if both else roofline.DTYPES[:1]
    if rates_only:
        facts = rates_and_rooflines(config, device, dtypes[0], context, quick)
        publish("passes", facts, [roofline_table(facts), times_ar_table(facts)], as_json)
        return
    if quick:
        context, repeats, tokens, rounds = 64, 5, 48, 1
    results: list[dict[str, Any]] = []
    shown: list[RenderableType] = []
    for dtype, quantization in product(dtypes, quantizations):
        started = time.perf_counter()
        model = model_for(
            path, config, quick, dtype=dtype, device=device, quantization=quantization
        )  # fmt: skip
        print(f"{dtype}: model made in {time.perf_counter() - started:.1f} s", file=sys.stderr)
        plain = quantization == "none"
        found = measure(
            model, context=context, repeats=repeats, tokens=tokens, rounds=rounds, quick=quick, transformers=plain,
            naive=plain,
        )  # fmt: skip
        shown += tables(found)
        results.append(found)
        del model
    facts = {"model": name_of(path, config, quick), "block_size": BLOCK, "measured": results}
    publish("passes", facts, shown, as_json)


if __name__ == "__main__":
    main()
