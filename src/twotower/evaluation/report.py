"""Picture and Markdown tables of a sweep, for a model card."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from twotower.evaluation.sweep import Point, pareto_front
from twotower.evaluation.tasks.scoring import OVERALL
from twotower.plotting import BLUE, DPI, GREEN, GREY, ORANGE, PURPLE, SKY, YELLOW, drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PUBLISHED = (2.42, 0.987)  # of the released 30B model (arXiv 2606.26493): throughput × AR, quality kept
SERIES_STYLES = {  # series: colour, marker
    "threshold": (BLUE, "o"),
    "top-k": (GREY, "s"),
    "factor": (GREEN, "^"),
    "entropy": (YELLOW, "v"),
    "margin": (SKY, "D"),
    "klass": (PURPLE, "P"),
    "span": (GREY, "X"),
    "decay": (SKY, "*"),
    "block size": (BLUE, "s"),
    "verified": (ORANGE, "o"),
    "verified, relaxed": (ORANGE, "^"),
}
MIN_QUALITY_DRAWN = 0.5  # of AR's accuracy; worse settings are in the table only


def draw_report(
    points: Sequence[Point], path: Path, title: str, beside: tuple[str, Sequence[Point]] | None = None
) -> None:
    """Draws quality kept against tokens per pass and against measured speed, with the Pareto front.

    beside: name and points of an earlier report, whose Pareto front is drawn too.

    Raises:
        ArgumentError: matplotlib is missing.
    """
    with drawing():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(11.0, 5.6))
        left, right = figure.subplots(1, 2, sharey=True)
        _panel(left, points, lambda p: p.tokens_per_pass, "tokens per pass (passes of both towers)", beside)
        _panel(right, points, lambda p: p.times_ar, "measured speed, × AR (single requests)", beside)
        left.set_ylabel("accuracy kept, % of AR's")
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=7, fontsize=8.5)
        figure.savefig(path, dpi=DPI)


def _panel(
    axes: Axes,
    points: Sequence[Point],
    speed: Callable[[Point], float],
    label: str,
    beside: tuple[str, Sequence[Point]] | None,
) -> None:
    series: dict[str, list[Point]] = {}
    for point in points:
        series.setdefault(point.series, []).append(point)
    best = pareto_front(points, speed)
    fronts = [("black", "Pareto front", best)]
    if beside is not None:
        fronts.append(("red", f"Pareto front of {beside[0]}", pareto_front(beside[1], speed)))
    for colour, name, front in fronts:
        axes.plot(
            [speed(p) for p in front],
            [100 * p.kept[0] for p in front],
            color=colour,
            lw=5,
            alpha=0.12,
            solid_capstyle="round",
            label=name,
            zorder=1,
        )
    for name, own in series.items():
        x, y = [speed(p) for p in own], [100 * p.kept[0] for p in own]
        if name == "ar":
            axes.plot(x, y, "k+", ms=12, mew=2, label="AR", zorder=4)
            continue
        colour, marker = SERIES_STYLES.get(name, (GREY, "o"))
        line = "-" if name not in ("verified", "block size") else "none"
        axes.plot(x, y, color=colour, marker=marker, ms=5, lw=1, ls=line, alpha=0.85, label=name, zorder=3)
    for point in best:
        low, high = (100 * end for end in point.kept[1:])
        axes.plot([speed(point)] * 2, [low, high], color="black", lw=0.8, alpha=0.5, zorder=2)
    axes.plot(PUBLISHED[0], 100 * PUBLISHED[1], "r*", ms=13, label="published, 30B on 2 H100", zorder=5)
    axes.axhline(100, color=GREY, lw=0.7, ls=":")
    lowest = min((100 * p.kept[0] for p in points if p.kept[0] >= MIN_QUALITY_DRAWN), default=50.0)
    axes.set(xlabel=label, ylim=(max(100 * MIN_QUALITY_DRAWN, lowest - 3), 103), xlim=(0, None))


def report_markdown(
    points: Sequence[Point], facts: Sequence[str], name: str, beside: tuple[str, Sequence[Point]] | None = None
) -> str:
    """The facts, and two tables: accuracy on each task on the Pareto front, and one line for every setting.

    name: of the model. beside: the name and the points of another report, whose settings are a third table.
    """
    ar = next(point for point in points if point.setting == "ar")
    best = [p for p in pareto_front(points, lambda p: p.times_ar) if p is not ar]
    names = [*(name for name in ar.accuracy if name != OVERALL), OVERALL]
    rows = [["setting", *names, "quality kept", "tokens per pass", "× AR"], ["---", *["---:"] * (len(names) + 3)]]
    for p in (ar, *best):
        accuracy = [f"{100 * p.accuracy[name]:.1f}" for name in names]
        rows.append([f"`{p.setting}`", *accuracy, f"{p.kept[0]:.1%}", f"{p.tokens_per_pass:.2f}", f"{p.times_ar:.2f}"])
    notes = [textwrap.fill(fact, 120) for fact in facts]
    parts = [f"# Quality and speed of settings: {name}", *notes]
    parts += ["## On the Pareto front", _table(rows), "## Every setting", _table(_every_setting(points))]
    if beside is not None:
        parts += [f"## {beside[0]}, from its own report", _table(_every_setting(beside[1]))]
    return "\n\n".join(parts) + "\n"


def _every_setting(points: Sequence[Point]) -> list[list[str]]:
    rows = [["setting", "quality kept", "95 %", "tokens per pass", "× AR"], ["---", *["---:"] * 4]]
    for p in points:
        interval = "" if p.setting == "ar" else f"{p.kept[1]:.1%} to {p.kept[2]:.1%}"
        rows.append([f"`{p.setting}`", f"{p.kept[0]:.1%}", interval, f"{p.tokens_per_pass:.2f}", f"{p.times_ar:.2f}"])
    return rows


def _table(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)
