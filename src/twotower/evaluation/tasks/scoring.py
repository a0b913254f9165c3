"""Exact-match scores, with 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from twotower.errors import ArgumentError
from twotower.evaluation.tasks.problem_sets import Problem

OVERALL = "overall"
Z95 = 1.959963984540054  # 97.5 % quantile of the standard normal distribution


def wilson(right: int, count: int) -> tuple[float, float]:
    """The 95 % score interval of the share right / count, both ends in 0 to 1 (Wilson 1927, JASA 22:209–212)."""
    if not 0 <= right <= count or count < 1:
        raise ArgumentError(f"right is {right} of count {count}; it must be from 0 to count, and count at least 1.")
    share, z2 = right / count, Z95 * Z95
    centre = share + z2 / (2 * count)
    half = Z95 * math.sqrt(share * (1 - share) / count + z2 / (4 * count * count))
    scale = 1 + z2 / count
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


@dataclass(frozen=True)
class Score:
    """Number of right answers of `count`; shares are 0 to 1."""

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
    """Whether the answer is an exact match, without leading and trailing white space."""
    return answer.strip() == problem.answer.strip()


def score(problems: Sequence[Problem], answers: Sequence[str]) -> dict[str, Score]:
    """Exact matches (`is_right`) for each family, in order of appearance, and then "overall"."""
    if not problems or len(problems) != len(answers):
        raise ArgumentError(
            f"{len(answers)} answers to {len(problems)} problems; give one answer for each of at least 1 problem."
        )
    right: dict[str, list[bool]] = {}
    for problem, answer in zip(problems, answers, strict=True):
        right.setdefault(problem.family, []).append(is_right(problem, answer))
    table = {family: Score(sum(hits), len(hits)) for family, hits in right.items()}
    return {**table, OVERALL: Score(sum(s.right for s in table.values()), len(problems))}


def accuracy(complete: Callable[[list[str]], Sequence[str]], problems: Sequence[Problem]) -> dict[str, Score]:
    """`score` of the answers of `complete`, which maps prompts to the text after each prompt, without EOS."""
    return score(problems, complete([problem.prompt for problem in problems]))
