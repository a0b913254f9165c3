"""The figure of a run's validations: held-out loss, smaller curves, and the last sample."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from twotower.plotting import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, YELLOW
from twotower.training.plots.log_records import Records, number, numbers
from twotower.training.plots.sample_picture import Passage, TraceMap
from twotower.training.plots.training_figure import WIDTH, fit_steps

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure
    from matplotlib.typing import ColorType

SOURCES = (BLUE, GREEN, PURPLE, YELLOW, SKY, GREY)
_ENDING = re.compile(r"(\.(jsonl|json|ndjson|txt|parquet|gz))*(=[\d.eE+-]+)?$")


def validation_figure(records: Records) -> Figure:
    from matplotlib.figure import Figure

    steps = [record["step"] for record in records]
    found = [record["validation"] for record in records]
    last = found[-1]
    sample = last.get("sample")
    small = [name for name in _SINGLE if any(name in values for values in found)]
    picture: TraceMap | Passage | None = None
    if sample:
        picture = TraceMap.of(sample) if "trace" in sample else Passage.of(sample)
    columns = min(max(len(small), 1), 3)
    lines = -(-len(small) // 3)
    height = 4.0 + 2.4 * lines
    below = picture.height if picture else 0.0
    figure = Figure(figsize=(WIDTH, height + below))
    curves: Figure | SubFigure = figure
    under: SubFigure | None = None
    if picture:
        halves = figure.add_gridspec(2, 1, height_ratios=[height, below], left=0, right=1, bottom=0, top=1)
        curves, under = figure.add_subfigure(halves[0]), figure.add_subfigure(halves[1])
    grid = curves.add_gridspec(1 + lines, columns, height_ratios=[4.0] + [2.4] * lines)
    _likelihood(curves.add_subplot(grid[0, :]), steps, found)
    for i, name in enumerate(small):
        axis = curves.add_subplot(grid[1 + i // 3, i % 3])
        _single(axis, name, "draft_tokens" in last, steps, [number(values, name) for values in found])
    if picture and under:
        picture.draw(under, steps[-1])
    return figure


def _likelihood(axis: Axes, steps: Sequence[int], found: Sequence[Mapping[str, object]]) -> None:
    """Held-out loss: of a denoiser by noise level, with the context tower; of adapters; or of an autoregressive model
    by source."""
    import matplotlib

    denoiser, adapters = "masked_nll_by_t" in found[-1], "draft_tokens" in found[-1]
    group = "masked_nll_by_t" if denoiser else "nll_by_source"
    names = list(numbers(found[-1], group))
    shades: Iterable[ColorType] = itertools.cycle(SOURCES)
    if denoiser:
        shades = list(matplotlib.colormaps["viridis"](np.linspace(0.85, 0.0, max(len(names), 2))))
    ends: list[tuple[float, str, ColorType]] = []
    for shade, name, label in zip(shades, names, names if denoiser else short_names(names), strict=False):
        values = [numbers(entry, group).get(name, np.nan) for entry in found]
        axis.plot(steps, values, color=shade, marker="o", markersize=3, linewidth=1.6)
        ends.append((values[-1], f"t = {label}" if denoiser else label, shade))
    whole = "masked_nll" if denoiser or adapters else "nll"
    if denoiser or adapters or len(names) > 1:
        values = [number(entry, whole) for entry in found]
        axis.plot(steps, values, color=ORANGE, linewidth=2.2, linestyle=(0, (5, 2)))
        ends.append((values[-1], "all t < 1" if denoiser else "adapters" if adapters else "all", ORANGE))
    if denoiser and "ar_nll" in found[-1]:
        values = [number(entry, "ar_nll") for entry in found]
        axis.plot(steps, values, color="black", linewidth=1.6, linestyle=(0, (1, 1.5)))
        ends.append((values[-1], "context tower, AR", "black"))
    title = "Held-out loss of the denoiser by noise level t" if denoiser else "Held-out loss"
    unit = "nats per masked token" if denoiser else "nats per trained column" if adapters else "nats per token"
    axis.set(title=title, ylabel=unit, xlabel="step")
    fit_steps([axis], steps)
    _name_ends(axis, ends)


def short_names(sources: Sequence[str]) -> list[str]:
    """Names of data sources without weights, file endings and folders that all of them share."""
    parts = [_ENDING.sub("", source).split("/") for source in sources]
    folders = [part[:-1] for part in parts]
    same = itertools.takewhile(lambda names: len(set(names)) == 1, zip(*folders, strict=False))
    shared = len(list(same))
    names = ["/".join(part[shared:]) for part in parts]
    return [name if len(name) <= 26 else "…" + name[-25:] for name in names]


def _name_ends(axis: Axes, ends: Sequence[tuple[float, str, ColorType]]) -> None:
    """Writes the name of each curve at its right end; names that overlap are moved apart."""
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
            name,
            (1.0, value),
            xycoords=("axes fraction", "data"),
            xytext=(1.012, place),
            va="center",
            textcoords=("axes fraction", "data"),
            fontsize=9.5,
            annotation_clip=False,
            color="black",
            parse_math=False,
            bbox={"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none"},
        )
        axis.plot(
            [1.0, 1.01],
            [value, place],
            color=colour,
            linewidth=1.4,
            clip_on=False,
            transform=axis.get_yaxis_transform(),
        )


_SINGLE = {
    "agreement": ("Agreement with the context tower's greedy choice", "% of masked positions", BLUE, 100.0),
    "tokens_per_pass": ("Tokens per denoiser pass (greedy, threshold 0.8)", "tokens per pass", GREEN, 1.0),
    "draft_tokens": ("Tokens of a round with one draft", "tokens per round", GREEN, 1.0),
    "free_tokens": ("Free diffusion at threshold 0.95", "tokens per pass", SKY, 1.0),
    "texts_kept": ("Texts of free diffusion that are AR's", "% of prompts", PURPLE, 100.0),
    "accuracy_kept": ("Right answers kept of AR's", "% of AR's", ORANGE, 100.0),
    "bits_per_byte": ("Held-out bits per byte", "bits per byte", GREEN, 1.0),
}


def _single(axis: Axes, name: str, adapters: bool, steps: Sequence[int], values: Sequence[float]) -> None:
    title, unit, colour, scale = _SINGLE[name]
    if adapters and name == "tokens_per_pass":
        title = "Verified decoding: tokens per pass"
    shown = [scale * value for value in values]
    axis.plot(steps, shown, color=colour, marker="o", markersize=3, linewidth=1.8)
    axis.set(title=title, ylabel=unit, xlabel="step")
    fit_steps([axis], steps)
    axis.margins(y=0.2)
    if name != "bits_per_byte":
        axis.set_ylim(0, 1.2 * float(np.nanmax(shown)) or 1.0)
    axis.annotate(
        f"{shown[-1]:.3g}", (steps[-1], shown[-1]), xytext=(0, 6), textcoords="offset points", ha="right", fontsize=9.5
    )
