"""Commit policies in plain Python, one row at a time: the reference of `decoding/unmasking.py`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple


@dataclass
class NaiveRow:
    """Input of a policy for one row.

    p: the distribution at each position; c: the confidence of each candidate; open: the masked positions; before: p of
    the previous pass (None in the first pass of a block).
    """

    p: list[list[float]]
    c: list[float]
    open: list[int]
    before: list[list[float]] | None
    step: int
    steps: int


Selection = Callable[[NaiveRow, float], set[int]]
Order = Callable[[NaiveRow, int], float]  # the priority of a masked position


class NaivePolicy(NamedTuple):
    """select: the positions that the policy commits; order: priority of further positions; default: of the value."""

    select: Selection
    order: Order
    default: float


def naive_threshold(row: NaiveRow, value: float) -> set[int]:
    return {i for i in row.open if row.c[i] > value}


def naive_top_k(row: NaiveRow, value: float) -> set[int]:
    return set(sorted(row.open, key=lambda i: -row.c[i])[: math.ceil(value)])


def naive_factor(row: NaiveRow, value: float) -> set[int]:
    best: set[int] = set()
    ordered = sorted(row.open, key=lambda i: -row.c[i])
    for n in range(1, len(ordered) + 1):
        if (n + 1) * (1 - row.c[ordered[n - 1]]) < value:
            best = set(ordered[:n])
    return best


def naive_entropy(row: NaiveRow, value: float) -> set[int]:
    own = {i: entropy(row, i) for i in row.open}
    ordered, best = sorted(own, key=lambda i: own[i]), set()
    for n in range(1, len(ordered) + 1):
        taken = [own[i] for i in ordered[:n]]
        if sum(taken[:-1]) <= value:  # all but the last, which is the largest
            best = set(ordered[:n])
    return best


def entropy(row: NaiveRow, i: int) -> float:
    return -sum(p * math.log(p) for p in row.p[i] if p > 0)


def naive_margin(row: NaiveRow, value: float) -> set[int]:
    return {i for i in row.open if margin(row, i) > value}


def margin(row: NaiveRow, i: int) -> float:
    first, second = sorted(row.p[i], reverse=True)[:2]
    return first - second


def naive_klass(row: NaiveRow, value: float) -> set[int]:
    before = row.before
    if before is None:
        return set()

    def kl_divergence(i: int) -> float:
        pairs = zip(row.p[i], before[i], strict=True)
        return sum(p * math.log(p / q) for p, q in pairs if p > 0)

    return {i for i in row.open if row.c[i] > value and kl_divergence(i) < 0.01}


def naive_span(row: NaiveRow, value: float) -> set[int]:
    found: set[int] = set()
    for i in sorted(row.open):
        if row.c[i] <= value:
            break
        found.add(i)
    return found


def naive_decay(row: NaiveRow, value: float) -> set[int]:
    return {i for i in row.open if row.c[i] > value * (1 - 0.5 * row.step / max(row.steps - 1, 1))}


def confidence(row: NaiveRow, i: int) -> float:
    return row.c[i]


NAIVE = {
    "threshold": NaivePolicy(naive_threshold, confidence, 0.9),
    "top-k": NaivePolicy(naive_top_k, confidence, 2),
    "factor": NaivePolicy(naive_factor, confidence, 1.0),
    "entropy": NaivePolicy(naive_entropy, lambda row, i: -entropy(row, i), 0.1),
    "margin": NaivePolicy(naive_margin, margin, 0.8),
    "klass": NaivePolicy(naive_klass, confidence, 0.8),
    "span": NaivePolicy(naive_span, lambda row, i: -i, 0.8),
    "decay": NaivePolicy(naive_decay, confidence, 0.95),
}


def naive_commit(name: str, row: NaiveRow, value: float) -> set[int]:
    """The positions that a pass commits: those that the policy selects, at least one, and enough to end in time.

    Selected positions come first, then positions by the policy's order; equal positions from left to right.
    """
    policy = NAIVE[name]
    selected = policy.select(row, value)
    count = min(len(row.open), max(len(selected), 1, math.ceil(len(row.open) / (row.steps - row.step))))
    return set(sorted(sorted(row.open), key=lambda i: (i not in selected, -policy.order(row, i)))[:count])
