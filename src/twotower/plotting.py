"""The style of all pictures."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from twotower.errors import ArgumentError

DPI = 120
# Okabe and Ito's palette, distinguishable with colour blindness.
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#666666"
YELLOW, SKY = "#E69F00", "#56B4E9"
STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "savefig.facecolor": "white",
}


@contextmanager
def drawing() -> Iterator[None]:
    """Figures that are made in this `with` block have the project's style, not the user's.

    Raises:
        ArgumentError: matplotlib is missing.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ArgumentError("drawing needs matplotlib; pip install 'twotower[plots]'")
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a missing glyph is drawn as a box
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield
