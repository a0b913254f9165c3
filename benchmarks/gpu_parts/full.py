"""Part 5: the passes of the published shape: AR step, denoiser pass, commit; 1, 8 and 64 texts of 1K to 128K tokens."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from common import roofline
from common.models import BLOCK
from common.pass_runs import PassRuns
from common.times_ar import TOKENS_PER_PASS, times_ar

from gpu_parts.choices import PASSES as CHOICES
from gpu_parts.choices import chosen, sides, title
from gpu_parts.clock import timed, wait
from gpu_parts.profile import profiled
from gpu_parts.record import Figures, Record
from gpu_parts.setting import Setting, full_model, release
from twotower import TwoTowerForCausalLM

K = 1024
# Rows and tokens, the most important first.
SHAPES = ((1, K), (64, K), (8, K), (1, 32 * K), (8, 32 * K), (1, 128 * K))
SMALL = ((1, 64), (2, 64))
PASSES = ("AR step", "denoiser pass", "commit")


@torch.no_grad()
def run(setting: Setting, record: Record) -> None:
    rates = setting.rates(record)
    started = time.perf_counter()
    model, form = full_model(setting)
    wait(setting.device)
    record.add("the model", note=form.text, seconds=time.perf_counter() - started)
    shapes = SMALL if setting.small else SHAPES
    seconds = setting.budget(record, len(PASSES) * (len(shapes) + 6))
    measure_shape(setting, record, model, rates, shapes[0], seconds, profiles=True)
    for side in sides(CHOICES):
        with chosen(model, side):
            for shape in shapes[: 1 if setting.small else 2]:
                measure_shape(setting, record, model, rates, shape, seconds, f", {title(side)}")
    for shape in shapes[1:]:
        measure_shape(setting, record, model, rates, shape, seconds)


def measure_shape(
    setting: Setting,
    record: Record,
    model: TwoTowerForCausalLM,
    rates: roofline.Rates,
    shape: tuple[int, int],
    seconds: float,
    side: str = "",
    profiles: bool = False,
) -> None:
    """All passes over `rows` texts of `length` tokens, and what they give as a multiple of AR. side: of a choice."""
    rows, length = shape
    what = f"{rows} × {length} tokens{side}"
    runs: list[PassRuns] = []

    def state() -> Figures:
        started = time.perf_counter()
        runs.append(PassRuns(model, length, rows))
        wait(setting.device)
        return {"detail": True, "seconds": time.perf_counter() - started}

    if record.measure(f"{what}: state", state, least=seconds) is None:
        return
    works = works_of(model, rows, length)
    found: dict[str, float] = {}
    for name, run in runs[0].after(length).items():

        def figures(name: str = name, run: object = run) -> Figures:
            times = timed(run.call, setting.device, seconds, run.before)  # type: ignore[attr-defined]
            least = roofline.pass_seconds(works[name], rates) * 1e3
            return times | {"roofline ms": least, "× roofline": times["ms"] / least}

        measured = record.measure(f"{what}: {name}", figures, least=seconds)
        if profiles:
            run.before()
            record.measure(f"{what}: profile of {name}", lambda run=run: profiled(run.call, setting.device))
        if measured is not None:
            found[name] = measured["ms"]
    if len(found) == len(PASSES):
        record.add(f"{what}: × AR", **dict(against_ar(found)))
    del runs[:]
    release(model)


def works_of(model: TwoTowerForCausalLM, rows: int, length: int) -> dict[str, roofline.Work]:
    """What each pass must read and compute, with experts chosen at random."""
    return roofline.passes_of(
        model.config.layer_fields, model.dtype, length, BLOCK, rows=rows, quantization=model.quantization
    )  # fmt: skip


def against_ar(milliseconds: dict[str, float]) -> Iterator[tuple[str, float]]:
    """Tokens a second as a multiple of AR at the same rows, by tokens per pass."""
    for rate in TOKENS_PER_PASS:
        yield f"{rate:g} a pass", times_ar(*(milliseconds[name] for name in PASSES), rate)
