"""Seeded draws, the same in every Python version, and words that several families use."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

NAMES = str.split("Ada Ben Cleo Dan Eva Finn Gus Ida Leo Mia Noa Otto Pia Sam Tom Zoe")
THINGS = str.split("apples beads books cards coins eggs figs keys nuts pears pens plums shells stamps")

# Only `random()` gives the same values for a seed in every Python version; `choice`, `sample` and `shuffle` do not.


def below(rng: random.Random, n: int) -> int:
    """A uniform integer in 0..n-1."""
    return int(rng.random() * n)


def pick(rng: random.Random, items: Sequence[T]) -> T:
    """One item, uniformly."""
    return items[below(rng, len(items))]


def draw(rng: random.Random, items: Sequence[T], count: int) -> list[T]:
    """`count` items of different indices, in random order."""
    left = list(items)
    return [left.pop(below(rng, len(left))) for _ in range(count)]
