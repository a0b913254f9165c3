"""Colours of confidences, for the views and pictures of passes."""

from __future__ import annotations

from itertools import pairwise

from rich.style import Style

# Confidence 0 to 1 from warm to cool: safe for red-green colour blindness, and dark text is readable on all colours.
_RAMP = ((0.0, (224, 142, 121)), (0.5, (232, 197, 122)), (0.9, (143, 193, 169)), (1.0, (111, 179, 201)))
DARK_TEXT = "#1b202b"


def colour(confidence: float) -> tuple[int, int, int]:
    """The colour of a confidence."""
    for (low, a), (high, b) in pairwise(_RAMP):
        if confidence <= high:
            return blend(a, b, (confidence - low) / (high - low))
    return _RAMP[-1][1]


def blend(a: tuple[int, int, int], b: tuple[int, int, int], share: float) -> tuple[int, int, int]:
    share = min(max(share, 0.0), 1.0)
    r, g, b_ = (round(x + (y - x) * share) for x, y in zip(a, b, strict=True))
    return r, g, b_


def hex_colour(rgb: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*rgb)


def on(rgb: tuple[int, int, int]) -> Style:
    return Style(color=DARK_TEXT, bgcolor=hex_colour(rgb))
