"""Paired comparison of two decoding settings on the same problems, with a confidence interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from twotower.errors import ArgumentError
from twotower.evaluation.tasks.scoring import Z95


@dataclass(frozen=True)
class PairedComparison:
    """Counts over `count` problems: right in both settings, only in the first (lost), only in the second (gained)."""

    count: int
    both: int
    lost: int
    gained: int

    @property
    def difference(self) -> float:
        """Accuracy of the second setting minus accuracy of the first."""
        return (self.gained - self.lost) / self.count

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the difference: the Wald interval after 0.5 is added to each of the four counts.

        Source: Agresti and Min 2005, Statistics in Medicine 24:729–740.
        """
        count, gained, lost = self.count + 2, self.gained + 0.5, self.lost + 0.5
        difference = (gained - lost) / count
        half = Z95 * math.sqrt(max(gained + lost - count * difference**2, 0.0)) / count
        return difference - half, difference + half

    @property
    def kept(self) -> tuple[float, float, float]:
        """Accuracy of the second setting as a share of the first's, and that share at both ends of `interval`."""
        base = (self.both + self.lost) / self.count or math.nan
        low, high = self.interval
        return 1 + self.difference / base, 1 + low / base, 1 + high / base


def compare(first: Sequence[bool], second: Sequence[bool]) -> PairedComparison:
    """Compares two settings; first, second: whether each problem was answered right."""
    if not first or len(first) != len(second):
        raise ArgumentError(f"{len(first)} and {len(second)} answers; both settings need the same number, at least 1")
    pairs = list(zip(first, second, strict=True))
    return PairedComparison(
        len(pairs), pairs.count((True, True)), pairs.count((True, False)), pairs.count((False, True))
    )
