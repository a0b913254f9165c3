"""Exact match, with its uncertainty."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from twotower.errors import ArgumentError
from twotower.evaluation.tasks.problem_sets import Problem

OVERALL = "overall"
Z95 = 1.959963984540054  # the standard normal's 97.5 % quantile


def wilson(right: int, count: int) -> tuple[float, float]:
    """The 95 % score interval of a share right / count (Wilson 1927, JASA 22:209–212), both ends in 0..1."""
    if not 0 <= right <= count or count < 1:
        raise ArgumentError(f"right is {right} of count {count}; it must be from 0 to count, and count at least 1.")
    share, z2 = right / count, Z95 * Z95
    centre = share + z2 / (2 * count)
    half = Z95 * math.sqrt(share * (1 - share) / count + z2 / (4 * count * count))
    scale = 1 + z2 / count
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


@dataclass(frozen=True)
class Score:
    """How many of `count` answers were right; shares are in 0..1."""

    right: int
    count: int

    @property
    def share(self) -> float:
        return self.right / self.count

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.right, self.count)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.share:6.1%} [{low:.1%}, {high:.1%}] of {self.count}"


def is_right(problem: Problem, answer: str) -> bool:
    """Exact match, outer white space aside."""
    return answer.strip() == problem.answer.strip()


def score(problems: Sequence[Problem], answers: Sequence[str]) -> dict[str, Score]:
    """Exact matches of answers (outer white space aside) for each family, in order of appearance, then "overall"."""
    if not problems or len(problems) != len(answers):
        raise ArgumentError(f"{len(answers)} answers to {len(problems)} problems; give one for each, and at least one.")
    right: dict[str, list[bool]] = {}
    for problem, answer in zip(problems, answers, strict=True):
        right.setdefault(problem.family, []).append(is_right(problem, answer))
    table = {family: Score(sum(hits), len(hits)) for family, hits in right.items()}
    return {**table, OVERALL: Score(sum(s.right for s in table.values()), len(problems))}


def accuracy(complete: Callable[[list[str]], Sequence[str]], problems: Sequence[Problem]) -> dict[str, Score]:
    """The `score` of the answers of `complete`: a list of prompts → the text that follows each prompt, without EOS."""
    return score(problems, complete([problem.prompt for problem in problems]))
