"""What passes cost, beside their floors, and what that is worth: AR, the denoiser, the commit.

    python benchmarks/passes.py [--config FILE | --model DIR] [--dtype float32] [--quantization int8] [--device cuda]
        [--threads 2] [--quick]

- an AR step, a denoiser pass and a commit of one text, each beside its floor (`floor.py`);
- the denoiser pass against the naive twin (`naive.py`), whose logits are compared first; a pass of the twin is counted
  with its share of the block's clone of the cache;
- AR end to end against transformers' `NemotronHForCausalLM.generate` with the same weights and dtype;
- diffusion against AR at a forced number of tokens per pass of the denoiser (`Schedule`, a policy of `unmasking`), run
  through `twotower.generate`, so that random weights give honest timings.

All of a dtype in turn in one process; medians. Without --model: random weights of the shape in --config. Blocks hold
random tokens instead of masks, so that they visit as many experts as chance would (`models.random_for_masks`).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import click

from twotower.process import configure_process

configure_process()

import floor  # noqa: E402
import torch  # noqa: E402
from models import BLOCK, MIDSIZE, Texts, config_of, random_for_masks, random_model, random_tokens  # noqa: E402
from naive import NaiveDenoiser  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from timing import Run, interleaved, medians, ratio, synchronize  # noqa: E402
from twin import transformers_twin  # noqa: E402

from twotower import Generation, GenerationParams, TwoTowerForCausalLM, generate, model_loading  # noqa: E402
from twotower.checkpoint.quantize import quantize_  # noqa: E402
from twotower.decoding.unmasking import POLICIES, Pass, Verdict, ranks, register_policy  # noqa: E402
from twotower.evaluation.machine import described, machine  # noqa: E402
from twotower.ops.precision import multiplies_bf16_fast  # noqa: E402

RATES = (1.5, 3.0, 5.0)


# --- passes beside their floors -------------------------------------------------------------------------------------


@torch.no_grad()
def costs(
    model: TwoTowerForCausalLM, rates: floor.Rates, *, context: int, repeats: int, naive: bool, per_pass: float = 3.0
) -> dict[str, Any]:
    """Medians of every pass after a text of `context` tokens. per_pass: tokens per pass, by which the naive twin's
    clone of the cache, once a block, is shared out."""
    device, config, dtype = model.device, model.config.backbone, model.dtype
    texts = Texts.random(model, 1, context + 2 * BLOCK)
    texts.set_length(context)
    block = random_tokens(model, 1, BLOCK)
    t = torch.full((1,), 0.5, device=device)
    still = Texts.random(model, 1, context + 2 * BLOCK)  # that nothing is written to: a view is good until then
    still.set_length(context)
    view = model.reader(still.state).view()
    assert model.denoiser is not None
    shape: dict[str, Any] = {"rows": 1, "context": context, "quantization": model.quantization}
    experts: dict[str, Any] = {}

    def counted(name: str, tower: torch.nn.Module, call: Any, width: int) -> list[float]:
        with floor.counting_experts(tower) as choices:
            call()
        synchronize(device)
        numbers, how = floor.visited(choices, config, width)
        experts[name] = {"mean": sum(numbers) / max(len(numbers), 1), "how": how}
        return numbers

    def step() -> None:
        model.extend(block[:, :1], texts.state)

    def denoise() -> None:
        model.denoise(block, t, view)

    def commit() -> None:  # with what it takes until a denoiser can read the text
        model.extend(block, texts.state, logits=False)
        texts.state.settle()

    def before_step() -> None:
        """The text is as long as before, and a step finds the last one to be folded into the Mamba states, as usual."""
        texts.set_length(context - 1)
        step()

    def shorten() -> None:
        texts.set_length(context)

    runs = {
        "AR step": Run(step, before_step),
        "denoiser pass": Run(denoise),
        "commit": Run(commit, shorten),
    }
    before_step()
    step_experts = counted("AR step", model.context, step, 1)
    pass_experts = counted("denoiser pass", model.denoiser, denoise, BLOCK)
    shorten()
    commit_experts = counted("commit", model.context, commit, BLOCK)
    works = {
        "AR step": floor.work(config, dtype, width=1, experts=step_experts, **shape),
        "denoiser pass": floor.work(config, dtype, width=BLOCK, experts=pass_experts, denoiser=True, **shape),
        "commit": floor.work(config, dtype, width=BLOCK, experts=commit_experts, head=False, **shape),
    }
    found: dict[str, Any] = {}
    if naive:
        twin = NaiveDenoiser(model)
        twin.begin(view)
        found["naive logits differ by"] = difference(model.denoise(block, t, view), twin(block, t))
        runs["naive pass"] = Run(lambda: twin(block, t))
        runs["naive clone"] = Run(lambda: twin.begin(view))
    times = interleaved(runs, device, repeats)
    seconds = medians(times)
    found["passes"] = {
        name: {
            "seconds": seconds[name],
            "best": min(times[name]),
            "floor": floor.of(work, rates),
            "times floor": seconds[name] / floor.of(work, rates),
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
    """In standard deviations of the logits."""
    gap = (ours - other).abs() / other.std()
    return {"largest": float(gap.max()), "mean": float(gap.mean())}


# --- AR against transformers ----------------------------------------------------------------------------------------


@torch.no_grad()
def against_transformers(model: TwoTowerForCausalLM, *, context: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Greedy continuations of one prompt, prefill included on both sides."""
    hf = transformers_twin(model)
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

    times = interleaved({"ours": Run(ours), "theirs": Run(theirs)}, model.device, rounds, warm_up=1)
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


# --- diffusion against AR -------------------------------------------------------------------------------------------


class Schedule:
    """A policy that commits `rate` positions a pass on average over the blocks of one text: after P passes ⌊rate · P⌋,
    or the end of the block. Call `begin` before each text."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        self.passes = self.blocks = 0

    def __call__(self, seen: Pass, knob: torch.Tensor) -> Verdict:
        if seen.memory is None:
            self.blocks += 1
        self.passes += 1
        size = seen.masked.shape[1]
        due = int(float(knob[0]) * self.passes) - size * (self.blocks - 1)
        open_ = seen.masked.sum(1, keepdim=True)
        return Verdict(ranks(seen.confidence, seen.masked) < due - (size - open_), seen.confidence, True)


@contextmanager
def forced() -> Iterator[Schedule]:
    """The schedule as policy "forced"."""
    schedule = Schedule()
    register_policy("forced", schedule, knob="tokens a pass", default=1.0, low=1.0)
    try:
        yield schedule
    finally:
        del POLICIES["forced"]


def diffusion_against_ar(
    model: TwoTowerForCausalLM, *, context: int, tokens: int, rounds: int, per_pass: tuple[float, ...] = RATES
) -> list[dict[str, Any]]:
    """One text at each rate and AR, in turn; tokens per second after the prefill."""
    with forced() as schedule:
        return _at_rates(model, schedule, context, tokens, rounds, per_pass)


def _at_rates(
    model: TwoTowerForCausalLM, schedule: Schedule, context: int, tokens: int, rounds: int, per_pass: tuple[float, ...]
) -> list[dict[str, Any]]:
    prompt = [random_tokens(model, 1, context, seed=3)[0].tolist()]
    shared: dict[str, Any] = {"max_new_tokens": tokens, "mask_token_id": model.config.mask_token, "seed": 0}
    asked = {"ar": GenerationParams.of(mode="ar", **shared)}
    for rate in per_pass:
        asked[f"{rate:g}"] = GenerationParams.of(
            mode="diffusion", block_size=BLOCK, steps_per_block=BLOCK, policy="forced", knob=rate, **shared
        )
    outputs: dict[str, Generation] = {}
    launched: dict[str, int] = {}
    seconds: dict[str, list[float]] = {name: [] for name in asked}

    with random_for_masks(model, BLOCK) as counted:
        for number in range(rounds + 1):
            for name, params in asked.items():
                schedule.begin()
                counted["passes"] = 0
                (outputs[name],) = generate(model, prompt, params)
                launched[name] = counted["passes"]
                if number:
                    seconds[name].append(outputs[name].decode_seconds)
    speed = {name: tokens / value for name, value in medians(seconds).items()}
    return [
        {
            "asked": rate,
            "tokens per pass": outputs[f"{rate:g}"].tokens_per_pass,
            "passes launched": launched[f"{rate:g}"],
            "tokens/s": speed[f"{rate:g}"],
            "AR tokens/s": speed["ar"],
            "times AR": ratio(seconds["ar"], seconds[f"{rate:g}"]),
        }
        for rate in per_pass
    ]


def from_passes(passes: dict[str, Any], per_pass: float) -> float:
    """× AR that the passes' own costs give at so many tokens per pass, with nothing between passes."""
    steps = passes["denoiser pass"]["AR steps"] * BLOCK / per_pass + passes["commit"]["AR steps"]
    return BLOCK / steps


# --- one command ----------------------------------------------------------------------------------------------------


def measure(
    model: TwoTowerForCausalLM, *, context: int, repeats: int, tokens: int, rounds: int, quick: bool,
    transformers: bool = True, naive: bool = True, per_pass: tuple[float, ...] = RATES,
    rates: floor.Rates | None = None,
) -> dict[str, Any]:  # fmt: skip
    """All of it, of one model."""
    if rates is None:
        rates = floor.measure(model.device, model.dtype, quick=quick)
    found: dict[str, Any] = {"machine": machine(model), "context": context, "rates": asdict(rates)}
    found |= costs(model, rates, context=context, repeats=repeats, naive=naive)
    found["diffusion"] = diffusion_against_ar(model, context=context, tokens=tokens, rounds=rounds, per_pass=per_pass)
    for row in found["diffusion"]:
        row["times AR by passes"] = from_passes(found["passes"], row["tokens per pass"])
    if transformers:
        found["transformers"] = against_transformers(model, context=min(context, 32), tokens=tokens, rounds=rounds)
    return found


def show(found: dict[str, Any], console: Console) -> None:
    """Tables of one dtype."""
    rates = floor.Rates(**found["rates"])
    title = f"{described(found['machine'])}: {floor.described(rates)}"
    table = Table("pass", "ms", "floor, ms", "× floor", "AR steps", "reads", "experts a layer", title=title)
    for name, one in found["passes"].items():
        table.add_row(
            name, f"{one['seconds'] * 1e3:.2f}", f"{one['floor'] * 1e3:.2f}", f"{one['times floor']:.2f}",
            f"{one['AR steps']:.2f}", f"{one['bytes'] / 1e6:.1f} MB",
            f"{one['experts']['mean']:.1f} {one['experts']['how']}",
        )  # fmt: skip
    console.print(table)
    if "naive" in found:
        one, gap = found["naive"], found["naive logits differ by"]
        console.print(
            f"naive denoiser: pass {one['pass seconds'] * 1e3:.2f} ms, clone {one['clone seconds'] * 1e3:.2f} ms a "
            f"block = [b]{one['times ours']:.2f}×[/b] ours; logits differ by at most {gap['largest']:.1e} σ"
        )
    table = Table("tokens per pass", "tokens/s", "AR tokens/s", "× AR", "× AR by passes alone")
    for row in found["diffusion"]:
        table.add_row(
            f"{row['tokens per pass']:.2f}", f"{row['tokens/s']:.1f}", f"{row['AR tokens/s']:.1f}",
            f"{row['times AR']:.2f}", f"{row['times AR by passes']:.2f}",
        )  # fmt: skip
    console.print(table)
    if "transformers" in found:
        one = found["transformers"]
        same = "the same tokens" if one["same tokens"] else f"the same until token {one['same until']}"
        console.print(
            f"AR end to end: {one['ours tokens/s']:.1f} tokens/s, transformers {one['theirs tokens/s']:.1f}: "
            f"[b]{one['ratio']:.2f}×[/b]; {same}"
        )


@click.command()
@click.option("--model", "path", type=click.Path(exists=True, file_okay=False, path_type=Path), default=None)
@click.option(
    "--config", type=click.Path(exists=True, dir_okay=False, path_type=Path), default=None,
    help="Random weights of this shape.  [default: benchmarks/midsize.json]",
)  # fmt: skip
@click.option("--device", type=click.Choice(("cpu", "cuda")), default="cpu", show_default=True)
@click.option(
    "--dtype", "dtypes", type=click.Choice(floor.DTYPES), multiple=True,
    help="Can be repeated.  [default: float32, and bfloat16 where the device multiplies it]",
)  # fmt: skip
@click.option(
    "--quantization", "quantizations", type=click.Choice(model_loading.QUANTIZATIONS), multiple=True, default=("none",),
    show_default=True, help="Can be repeated: each with each dtype. int8 without the twins.",
)  # fmt: skip
@click.option("--context", default=256, show_default=True, help="Tokens before the pass.")
@click.option("--repeats", default=30, show_default=True, help="Of each pass.")
@click.option("--tokens", default=96, show_default=True, help="Of each text.")
@click.option("--rounds", default=3, show_default=True, help="Of texts.")
@click.option("--threads", type=int, default=None, help="[default: torch's]")
@click.option("--quick", is_flag=True, help="A tiny model, seconds.")
@click.option("--json", "as_json", is_flag=True, help="No tables.")
def main(
    path: Path | None, config: Path | None, device: str, dtypes: tuple[str, ...], quantizations: tuple[str, ...],
    context: int, repeats: int, tokens: int, rounds: int, threads: int | None, quick: bool, as_json: bool,
) -> None:  # fmt: skip
    """Measures one model, dtype by dtype."""
    configure_process(threads)
    where = torch.device(device)
    if not dtypes:
        dtypes = floor.DTYPES if multiplies_bf16_fast(where) and not quick else floor.DTYPES[:1]
    if quick:
        context, repeats, tokens, rounds = 64, 5, 48, 1
    shape = None if quick and config is None else config or MIDSIZE
    console, results = Console(stderr=True, width=120), []
    for dtype, quantization in product(dtypes, quantizations):
        torch.manual_seed(0)
        started = time.perf_counter()
        if path is not None:
            model = model_loading.load_model(path, dtype=dtype, quantization=quantization, context_device=device)
        else:
            model = random_model(config_of(shape), getattr(torch, dtype), where)
            if quantization == "int8":
                quantize_(model)
        plain = quantization == "none"
        print(f"{dtype}: model made in {time.perf_counter() - started:.1f} s", file=sys.stderr)
        found = measure(
            model, context=context, repeats=repeats, tokens=tokens, rounds=rounds, quick=quick, transformers=plain,
            naive=plain,
        )  # fmt: skip
        if not as_json:
            show(found, console)
        results.append(found)
        del model
    source = str(path or (shape.name if shape else "tiny"))
    print(json.dumps({"benchmark": "passes", "model": source, "block_size": BLOCK, "measured": results}))


if __name__ == "__main__":
    main()
