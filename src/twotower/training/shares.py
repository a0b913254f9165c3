"""Mixtures such as `kl:0.7+tokens:0.3`: names with weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from twotower.errors import ArgumentError


def parse_shares(text: str, names: Sequence[str], what: str) -> dict[str, float]:
    """`kl:7+tokens:3` → {"kl": 0.7, "tokens": 0.3}; a name alone has weight 1. The shares add up to 1.

    Raises:
        ArgumentError: an unknown or repeated name, or a weight that is not a positive number.
    """
    weights: dict[str, float] = {}
    for item in text.split("+"):
        name, colon, number = (part.strip() for part in item.partition(":"))
        try:
            weight = float(number) if colon else 1.0
        except ValueError:
            weight = math.nan
        if name not in names or name in weights or not 0 < weight < math.inf:
            raise ArgumentError(
                f"{what} is {text!r}, with the part {item.strip()!r}; join different parts NAME:WEIGHT with +, with "
                f"positive weights and names among {', '.join(names)}"
            )
        weights[name] = weight
    total = math.fsum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def shares_text(shares: Mapping[str, float]) -> str:
    """The mixture as text that `parse_shares` reads."""
    return "+".join(f"{name}:{share:g}" for name, share in shares.items())
