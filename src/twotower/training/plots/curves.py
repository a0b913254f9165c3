"""A run's log as pictures: RUN/training.png, and RUN/validation.png once something was validated."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from twotower.errors import ArgumentError
from twotower.plotting import BLUE, DPI, GREEN, GREY, ORANGE, PURPLE, SKY, YELLOW, drawing
from twotower.training.log import LOG_FILE, read_log
from twotower.training.plots.sample_picture import Passage, TraceMap

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Records = Sequence[dict[str, Any]]

WIDTH = 10.0  # inches
_ENDING = re.compile(r"(\.(jsonl|json|ndjson|txt|parquet|gz))*(=[\d.eE+-]+)?$")
SMOOTHED = 50  # a smoothed curve averages over this part of the run
SOURCES = (BLUE, GREEN, PURPLE, YELLOW, SKY, GREY)


def draw(run: Path, output: Path | None = None) -> list[Path]:
    """Draws a run's log → the pictures written, into `output` (default: the run's directory).

    Raises:
        ArgumentError: no log, an empty or damaged one; matplotlib is missing.
    """
    records = load(run)
    output = run if output is None else output
    output.mkdir(parents=True, exist_ok=True)
    validated = [record for record in records if "validation" in record]
    paths = []
    with drawing():
        for name, figure in (
            ("training.png", _training(records)),
            ("validation.png", _validation(validated) if validated else None),
        ):
            if figure is not None:
                figure.savefig(output / name, dpi=DPI)
                paths.append(output / name)
    return paths


def load(run: Path) -> list[dict[str, Any]]:
    """The records of a run's log, of which there is at least one.

    Raises:
        ArgumentError: there is none, or a line of it is broken.
    """
    path = run / LOG_FILE
    if not path.is_file():
        raise ArgumentError(f"{path}: no such file; give the directory of a training run")
    try:
        records = read_log(path)
        steps = [int(record["step"]) for record in records]
    except (ValueError, KeyError, TypeError) as error:
        raise ArgumentError(f"{path}: not a training log ({type(error).__name__}: {error})") from None
    if not steps:
        raise ArgumentError(f"{path}: no step was logged yet")
    return records


def summary(records: Records) -> list[str]:
    """Three lines: how far, how well, and the last validation."""
    first, last = records[0], records[-1]
    seconds, tokens = sum(_seconds(records)), sum(record["tokens"] for record in records)
    sizes = " then ".join(str(size) for _, size in _stages(records))
    smooth = smoothed([record["loss"] for record in records])
    shown = last["step"] if "validation" in last else max((r["step"] for r in records if "validation" in r), default=0)
    found = "no validation yet"
    if shown:
        numbers = next(r["validation"] for r in records if r["step"] == shown)
        values = (f"{k.replace('_', ' ')} {v:.4g}" for k, v in numbers.items() if isinstance(v, int | float))
        found = f"validation at step {shown}: " + ", ".join(values)
    return [
        f"steps {first['step']} to {last['step']}, blocks of {sizes}: {_count(tokens)} tokens in {_time(seconds)}, "
        f"{_count(tokens / seconds)} tokens/s",
        f"loss {smooth[-1]:.4g} (at first {first['loss']:.4g}), gradient norm {last['norm']:.3g}, "
        f"learning rate {last['rate']:.2g}",
        found,
    ]


def smoothed(values: Sequence[float]) -> np.ndarray:
    """A running mean over the last 1/50 of the run (exponential, without a start-up bias)."""
    keep = 1 - 1 / max(len(values) / SMOOTHED, 1)
    out, total, weight = np.empty(len(values)), 0.0, 0.0
    for i, value in enumerate(values):
        total, weight = keep * total + value, keep * weight + 1
        out[i] = total / weight
    return out


# --- training --------------------------------------------------------------------------------------------------------


def _training(records: Records) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    steps = [record["step"] for record in records]
    speed = [r["tokens"] / max(s, 1e-9) for r, s in zip(records, _seconds(records), strict=True)]
    figure = Figure(figsize=(WIDTH, 10.0))
    axes: Sequence[Axes] = figure.subplots(4, 1, sharex=True, height_ratios=[3, 1, 1, 1])
    loss, rate, norm, pace = axes
    _raw_and_smooth(loss, steps, [record["loss"] for record in records], BLUE)
    loss.set(title="Training loss", ylabel="nats per target token")
    loss.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, borderaxespad=0.2)
    rate.plot(steps, [record["rate"] for record in records], color=GREEN)
    rate.set(ylabel="learning rate", ylim=(0, None))
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    _raw_and_smooth(norm, steps, [record["norm"] for record in records], ORANGE)
    norm.set(ylabel="gradient norm", yscale="log")
    norm.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    norm.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    norm.yaxis.set_minor_formatter(NullFormatter())
    _raw_and_smooth(pace, steps, speed, PURPLE)
    pace.set(ylabel="tokens/s", xlabel="step", ylim=(0, 1.15 * float(np.quantile(speed, 0.99))))
    pace.set_title("validation and checkpoints included", fontsize=9, color=GREY, loc="right", pad=2)
    pace.yaxis.set_major_formatter(lambda value, _: _count(value))
    for axis in axes:
        _mark_stages(axis, records, named=axis is loss)
    _span(axes, steps)
    figure.align_ylabels(axes)
    return figure


def _raw_and_smooth(axis: Axes, steps: Sequence[int], values: Sequence[float], colour: str) -> None:
    axis.plot(steps, values, color=colour, alpha=0.3, linewidth=0.8, label="each step")
    axis.plot(steps, smoothed(values), color=colour, linewidth=1.8, label="smoothed")


def _mark_stages(axis: Axes, records: Records, named: bool) -> None:
    stages = _stages(records)
    for i, (start, size) in enumerate(stages):
        if i:
            axis.axvline(start - 0.5, color=GREY, linewidth=1.0, linestyle=(0, (4, 3)))
        if named and len(stages) > 1:
            axis.annotate(
                f"blocks of {size}", (start, 1.0), xycoords=("data", "axes fraction"), xytext=(4, -4),
                textcoords="offset points", va="top", color=GREY, fontsize=9,
            )  # fmt: skip


def _span(axes: Sequence[Axes], steps: Sequence[int]) -> None:
    room = 0.02 * (steps[-1] - steps[0]) or 1.0
    axes[-1].set_xlim(steps[0] - room, steps[-1] + room)


# --- validation ------------------------------------------------------------------------------------------------------


def _validation(records: Records) -> Figure:
    from matplotlib.figure import Figure

    steps = [record["step"] for record in records]
    found = [record["validation"] for record in records]
    last = found[-1]
    sample = last.get("sample")
    small = [name for name in ("agreement", "tokens_per_pass", "bits_per_byte") if name in last]
    picture = (TraceMap.of(sample) if "trace" in sample else Passage.of(sample)) if sample else None
    height = 4.0 + (2.4 if small else 0.0)
    below = picture.height if picture else 0.0
    figure = Figure(figsize=(WIDTH, height + below))
    curves: Any = figure
    under: Any = None
    if picture:
        curves, under = figure.subfigures(2, 1, height_ratios=[height, below])  # type: ignore[misc]
    grid = curves.add_gridspec(2 if small else 1, max(len(small), 1), height_ratios=[4.0, 2.4] if small else None)
    _likelihood(curves.add_subplot(grid[0, :]), steps, found)
    for i, name in enumerate(small):
        _single(curves.add_subplot(grid[1, i]), name, steps, [values.get(name) for values in found])
    if picture:
        picture.draw(under, steps[-1])
    return figure


def _likelihood(axis: Axes, steps: Sequence[int], found: Sequence[dict[str, Any]]) -> None:
    """The denoiser by noise level, with the context tower as reference; or an autoregressive model by source."""
    import matplotlib

    denoiser = "masked_nll_by_t" in found[-1]
    group = "masked_nll_by_t" if denoiser else "nll_by_source"
    names = list(found[-1].get(group, {}))
    shades: Any = itertools.cycle(SOURCES)
    if denoiser:
        shades = matplotlib.colormaps["viridis"](np.linspace(0.85, 0.0, max(len(names), 2)))
    ends = []
    for shade, name, label in zip(shades, names, names if denoiser else _short(names), strict=False):
        values = [entry.get(group, {}).get(name, np.nan) for entry in found]
        axis.plot(steps, values, color=shade, marker="o", markersize=3, linewidth=1.6)
        ends.append((values[-1], f"t = {label}" if denoiser else label, shade))
    whole = "masked_nll" if denoiser else "nll"
    if denoiser or len(names) > 1:
        values = [entry.get(whole, np.nan) for entry in found]
        axis.plot(steps, values, color=ORANGE, linewidth=2.2, linestyle=(0, (5, 2)))
        ends.append((values[-1], "all t < 1" if denoiser else "all", ORANGE))
    if denoiser and "ar_nll" in found[-1]:
        values = [entry.get("ar_nll", np.nan) for entry in found]
        axis.plot(steps, values, color="black", linewidth=1.6, linestyle=(0, (1, 1.5)))
        ends.append((values[-1], "context tower, AR", "black"))
    title = "Held-out loss of the denoiser by noise level t" if denoiser else "Held-out loss"
    axis.set(title=title, ylabel="nats per masked token" if denoiser else "nats per token", xlabel="step")
    _span([axis], steps)
    _name_ends(axis, ends)


def _short(sources: Sequence[str]) -> list[str]:
    """Names of data sources without weights, endings and the folders that all of them share."""
    parts = [_ENDING.sub("", source).split("/") for source in sources]
    folders = [part[:-1] for part in parts]
    same = itertools.takewhile(lambda names: len(set(names)) == 1, zip(*folders, strict=False))
    shared = len(list(same))
    names = ["/".join(part[shared:]) for part in parts]
    return [name if len(name) <= 26 else "…" + name[-25:] for name in names]


def _name_ends(axis: Axes, ends: Sequence[tuple[float, str, Any]]) -> None:
    """Each curve's name at its right end; names that would touch are moved apart."""
    ends = sorted((end for end in ends if np.isfinite(end[0])), key=lambda end: end[0])
    low, high = axis.get_ylim()
    step = (high - low) * 0.058  # a line of text
    places = [end[0] for end in ends]
    for _ in range(100):
        for i, (a, b) in enumerate(pairwise(places)):
            if b - a < step:
                push = (step - (b - a)) / 2
                places[i], places[i + 1] = a - push, b + push
    axis.set_ylim(min([low, *(place - step for place in places)]), max([high, *(place + step for place in places)]))
    for place, (value, name, colour) in zip(places, ends, strict=True):
        axis.annotate(
            name, (1.0, value), xycoords=("axes fraction", "data"), xytext=(1.012, place), va="center",
            textcoords=("axes fraction", "data"), fontsize=9.5, annotation_clip=False,
            color="black", parse_math=False,
            bbox={"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none"},
        )  # fmt: skip
        axis.plot([1.0, 1.01], [value, place], color=colour, linewidth=1.4, clip_on=False,
                  transform=axis.get_yaxis_transform())  # fmt: skip


_SINGLE = {
    "agreement": ("Agreement with the context tower's greedy choice", "% of masked positions", BLUE, 100.0),
    "tokens_per_pass": ("Tokens per denoiser pass (greedy, γ 0.8)", "tokens per pass", GREEN, 1.0),
    "bits_per_byte": ("Held-out bits per byte", "bits per byte", GREEN, 1.0),
}


def _single(axis: Axes, name: str, steps: Sequence[int], values: Sequence[float | None]) -> None:
    title, unit, colour, scale = _SINGLE[name]
    shown = [np.nan if value is None else scale * value for value in values]
    axis.plot(steps, shown, color=colour, marker="o", markersize=3, linewidth=1.8)
    axis.set(title=title, ylabel=unit, xlabel="step")
    _span([axis], steps)
    axis.margins(y=0.2)
    if name != "bits_per_byte":
        axis.set_ylim(0, 1.2 * float(np.nanmax(shown)) or 1.0)
    axis.annotate(f"{shown[-1]:.3g}", (steps[-1], shown[-1]), xytext=(0, 6), textcoords="offset points",
                  ha="right", fontsize=9.5)  # fmt: skip


# --- small things ----------------------------------------------------------------------------------------------------


def _stages(records: Records) -> list[tuple[int, int]]:
    """(first step, block size) of each stretch of steps with one block size."""
    stages: list[tuple[int, int]] = []
    for record in records:
        if not stages or record["block_size"] != stages[-1][1]:
            stages.append((record["step"], record["block_size"]))
    return stages


def _seconds(records: Records) -> list[float]:
    """How long each step took; the clock starts anew when a run is continued."""
    clock = [0.0, *(record["timing"]["seconds"] for record in records)]
    return [now - before if now > before else now for before, now in pairwise(clock)]


def _count(number: float) -> str:
    for size, sign in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.3g}{sign}"
    return f"{number:.3g}"


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 6000 else f"{seconds / 3600:.3g} h"
