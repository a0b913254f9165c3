"""Commit policies in plain Python, one row at a time: the references of `decoding/unmasking.py`.

A row: p, the distribution at each position; c, the candidates' confidences; open, the masked positions; before, p of
the pass before (None in a block's first); step and steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple


@dataclass
class NaiveRow:
    """What one row sees of a pass."""

    p: list[list[float]]
    c: list[float]
    open: list[int]
    before: list[list[float]] | None
    step: int
    steps: int


Sure = Callable[[NaiveRow, float], set[int]]
Order = Callable[[NaiveRow, int], float]  # of an open position; the largest goes first


class NaivePolicy(NamedTuple):
    """sure: what a pass commits for the policy's own reasons; order: of what else is due; default: the value's."""

    sure: Sure
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
        if sum(taken[:-1]) <= value:  # all but the largest, which is the last
            best = set(ordered[:n])
    return best


def entropy(row: NaiveRow, i: int) -> float:
    return -sum(p * math.log(p) for p in row.p[i] if p > 0)


def naive_margin(row: NaiveRow, value: float) -> set[int]:
    return {i for i in row.open if lead(row, i) > value}


def lead(row: NaiveRow, i: int) -> float:
    first, second = sorted(row.p[i], reverse=True)[:2]
    return first - second


def naive_klass(row: NaiveRow, value: float) -> set[int]:
    before = row.before
    if before is None:
        return set()

    def moved(i: int) -> float:
        pairs = zip(row.p[i], before[i], strict=True)
        return sum(p * math.log(p / q) for p, q in pairs if p > 0)

    return {i for i in row.open if row.c[i] > value and moved(i) < 0.01}


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
    "margin": NaivePolicy(naive_margin, lead, 0.8),
    "klass": NaivePolicy(naive_klass, confidence, 0.8),
    "span": NaivePolicy(naive_span, lambda row, i: -i, 0.8),
    "decay": NaivePolicy(naive_decay, confidence, 0.95),
}


def naive_commit(name: str, row: NaiveRow, value: float) -> set[int]:
    """What a pass commits: what is sure, at least one, and enough to be done in the steps that are left; sure ones
    first, then by the policy's order, equal ones from the left."""
    policy = NAIVE[name]
    sure = policy.sure(row, value)
    count = min(len(row.open), max(len(sure), 1, math.ceil(len(row.open) / (row.steps - row.step))))
    return set(sorted(sorted(row.open), key=lambda i: (i not in sure, -policy.order(row, i)))[:count])
