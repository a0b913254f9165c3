"""Cuts the product of parameters down to a part that has every pair of values; the others are marked slow.

Most faults of a kernel depend on one or two parameters (a width and a dtype, a length and a mask).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations, product
from typing import Any

import pytest
from _pytest.mark import ParameterSet


def pairwise(*axes: Sequence[Any]) -> list[ParameterSet]:
    """The product of the axes as arguments of `parametrize`. A value can be a `pytest.param`; a tuple is one value."""
    every = list(product(*(range(len(axis)) for axis in axes)))
    chosen = set(_covering(every))
    return [
        _combined([axis[i] for axis, i in zip(axes, place, strict=True)], slow=place not in chosen) for place in every
    ]


def _covering(every: list[tuple[int, ...]]) -> Iterator[tuple[int, ...]]:
    """Greedy: always the combination with most pairs that are still missing, the first of equals."""
    missing = {pair for place in every for pair in _pairs(place)}
    while missing:
        best = max(every, key=lambda place: len(missing.intersection(_pairs(place))))
        missing.difference_update(_pairs(best))
        yield best


def _pairs(place: tuple[int, ...]) -> list[tuple[tuple[int, int], ...]]:
    return list(combinations(enumerate(place), 2))


def _combined(values: Sequence[Any], slow: bool) -> ParameterSet:
    """One parameter set of values, with their marks."""
    sets = [value if isinstance(value, ParameterSet) else pytest.param(value) for value in values]
    marks = [mark for one in sets for mark in one.marks]
    name = "-".join(str(one.id or one.values[0]) for one in sets) if any(one.id for one in sets) else None
    return pytest.param(*(one.values[0] for one in sets), marks=[*marks, pytest.mark.slow] if slow else marks, id=name)
