"""The figure of a training run: loss, learning rate, gradient norm and speed by step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from twotower.plotting import BLUE, GREEN, GREY, ORANGE, PURPLE
from twotower.training.plots.log_records import Records, smoothed, stages, step_seconds, with_prefix

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 10.0  # inches


def training_figure(records: Records) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    steps = [record["step"] for record in records]
    speed = [r["tokens"] / max(s, 1e-9) for r, s in zip(records, step_seconds(records), strict=True)]
    figure = Figure(figsize=(WIDTH, 10.0))
    axes: list[Axes] = list(figure.subplots(4, 1, sharex=True, height_ratios=[3, 1, 1, 1]))
    loss, lr, norm, pace = axes
    _raw_and_smooth(loss, steps, [record["loss"] for record in records], BLUE)
    loss.set(title="Training loss", ylabel="nats per target token")
    loss.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, borderaxespad=0.2)
    lr.plot(steps, [record["lr"] for record in records], color=GREEN)
    lr.set(ylabel="learning rate", ylim=(0, None))
    lr.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    _raw_and_smooth(norm, steps, [record["grad_norm"] for record in records], ORANGE)
    norm.set(ylabel="gradient norm", yscale="log")
    norm.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    norm.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    norm.yaxis.set_minor_formatter(NullFormatter())
    _raw_and_smooth(pace, steps, speed, PURPLE)
    pace.set(ylabel="tokens/s", xlabel="step", ylim=(0, 1.15 * float(np.quantile(speed, 0.99))))
    pace.set_title("validation and checkpoints included", fontsize=9, color=GREY, loc="right", pad=2)
    pace.yaxis.set_major_formatter(lambda value, _: with_prefix(value))
    for axis in axes:
        _mark_stages(axis, records, named=axis is loss)
    fit_steps(axes, steps)
    figure.align_ylabels(axes)
    return figure


def _raw_and_smooth(axis: Axes, steps: Sequence[int], values: Sequence[float], colour: str) -> None:
    axis.plot(steps, values, color=colour, alpha=0.3, linewidth=0.8, label="each step")
    axis.plot(steps, smoothed(values), color=colour, linewidth=1.8, label="smoothed")


def _mark_stages(axis: Axes, records: Records, named: bool) -> None:
    own = stages(records)
    for i, (start, size) in enumerate(own):
        if i:
            axis.axvline(start - 0.5, color=GREY, linewidth=1.0, linestyle=(0, (4, 3)))
        if named and len(own) > 1:
            axis.annotate(
                f"blocks of {size}",
                (start, 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(4, -4),
                textcoords="offset points",
                va="top",
                color=GREY,
                fontsize=9,
            )


def fit_steps(axes: Sequence[Axes], steps: Sequence[int]) -> None:
    room = 0.02 * (steps[-1] - steps[0]) or 1.0
    axes[-1].set_xlim(steps[0] - room, steps[-1] + room)
