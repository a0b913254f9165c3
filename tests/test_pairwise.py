"""The short part of a product of parameters."""

from __future__ import annotations

from itertools import combinations, product

import pytest
from pairwise import pairwise


@pytest.mark.parametrize("sizes", [(2, 3), (5, 5, 2, 2, 2), (7, 2, 2), (1, 4, 3)])
def test_every_pair_of_values_is_in_the_short_part(sizes: tuple[int, ...]) -> None:
    axes = [range(10 * i, 10 * i + size) for i, size in enumerate(sizes)]
    every = pairwise(*axes)
    assert [one.values for one in every] == list(product(*axes))
    short = [set(one.values) for one in every if not one.marks]
    assert all(any(set(pair) <= one for one in short) for ab in combinations(axes, 2) for pair in product(*ab))
    assert len(short) <= 1.5 * sorted(sizes)[-1] * sorted(sizes)[-2]


def test_values_keep_their_marks() -> None:
    marked = pytest.param("b", marks=pytest.mark.skip)
    short = [one for one in pairwise(["a", marked], [(1, 2)]) if one.values == ("b", (1, 2))]
    assert [[mark.name for mark in one.marks] for one in short] == [["skip"]]
