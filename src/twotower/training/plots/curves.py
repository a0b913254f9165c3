"""Draws a run's log: RUN/training.png, and RUN/validation.png after the first validation."""

from __future__ import annotations

from pathlib import Path

from twotower.plotting import DPI, drawing
from twotower.training.plots.log_records import load
from twotower.training.plots.training_figure import training_figure
from twotower.training.plots.validation_figure import validation_figure


def draw(run: Path, output: Path | None = None) -> list[Path]:
    """Draws a run's log into `output` (default: the run directory). Returns the paths of the pictures.

    Raises:
        ArgumentError: the log is missing, empty or damaged; or matplotlib is missing.
    """
    records = load(run)
    output = run if output is None else output
    output.mkdir(parents=True, exist_ok=True)
    validated = [record for record in records if "validation" in record]
    paths = []
    with drawing():
        for name, figure in (
            ("training.png", training_figure(records)),
            ("validation.png", validation_figure(validated) if validated else None),
        ):
            if figure is not None:
                figure.savefig(output / name, dpi=DPI)
                paths.append(output / name)
    return paths
