"""Seeded training and test problems; the two splits are disjoint."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from twotower.errors import ArgumentError
from twotower.evaluation.tasks.families import FAMILIES, LEVELS, SUITE

Split = Literal["train", "test"]
DEFAULT_DIFFICULTIES = (1, 2, 3)
TEST_SHARE = 10  # one prompt in ten belongs to the test split
TRIES = 2000  # draws for one problem; a test problem needs about ten


@dataclass(frozen=True)
class Problem:
    """A prompt and its only right continuation. A training document is `text` followed by EOS."""

    family: str
    difficulty: int
    prompt: str
    answer: str

    @property
    def text(self) -> str:
        return self.prompt + self.answer

    def line(self) -> str:
        """The problem as one line of JSON, without a newline."""
        fields = {"prompt": self.prompt, "text": self.answer, "family": self.family, "difficulty": self.difficulty}
        return json.dumps(fields)


def canonical(prompt: str) -> str:
    """The prompt with each run of white space as one space. Prompts with equal results count as equal."""
    return " ".join(prompt.split())


def split_of(prompt: str) -> Split:
    """The split of a prompt, for every seed: "test" if BLAKE2b of its canonical form is 0 mod 10."""
    digest = hashlib.blake2b(canonical(prompt).encode(), digest_size=8).digest()
    return "test" if int.from_bytes(digest, "big") % TEST_SHARE == 0 else "train"


def stream_problems(
    split: Split,
    seed: int,
    families: Sequence[str] | None = None,
    difficulties: Sequence[int] = DEFAULT_DIFFICULTIES,
    start: int = 0,
) -> Iterator[Problem]:
    """Endless problems start, start + 1, …; families alternate, and difficulties change after each round of families.

    Problem i depends only on split, seed, families and difficulties. Training problems may repeat. Test problems are
    unique, so the problems before `start` are drawn too. A family or difficulty named twice gets twice the share.

    Raises:
        ArgumentError: a wrong argument (at once), or no unique test problem left (during iteration).
    """
    names = tuple(SUITE if families is None else families)
    _check(split, names, difficulties)
    if start < 0:
        raise ArgumentError(f"start is {start}; it must be at least 0.")
    slots = list(itertools.product(difficulties, names))
    if split == "train":
        return (_draw(split, seed, i, *slots[i % len(slots)], set()) for i in itertools.count(start))
    return itertools.islice(_unique(split, seed, slots), start, None)


def make_problems(
    split: Split,
    count: int,
    seed: int,
    families: Sequence[str] | None = None,
    difficulties: Sequence[int] = DEFAULT_DIFFICULTIES,
) -> list[Problem]:
    """The first `count` problems of `stream_problems`. families None: SUITE."""
    endless = stream_problems(split, seed, families, difficulties)
    if count < 1:
        raise ArgumentError(f"count is {count}; it must be at least 1.")
    return list(itertools.islice(endless, count))


def write_jsonl(path: str | Path, items: Iterable[Problem]) -> None:
    """Writes one JSON line for each problem: "prompt", "text" (the answer), "family", "difficulty"."""
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(problem.line() + "\n" for problem in items)


def _check(split: str, families: Sequence[str], difficulties: Sequence[int]) -> None:
    if split not in get_args(Split):
        raise ArgumentError(f"split is {split!r}; it must be one of {', '.join(get_args(Split))}.")
    for family in families:
        if family not in FAMILIES:
            raise ArgumentError(f"family is {family!r}; it must be one of {', '.join(FAMILIES)}.")
    for difficulty in difficulties:
        if difficulty not in LEVELS:
            raise ArgumentError(f"difficulty is {difficulty!r}; it must be from {LEVELS[0]} to {LEVELS[-1]}.")
    if not families or not difficulties:
        raise ArgumentError("families or difficulties is empty; give at least one of each, or leave it out.")


def _unique(split: Split, seed: int, slots: Sequence[tuple[int, str]]) -> Iterator[Problem]:
    seen: set[str] = set()
    for i in itertools.count():
        problem = _draw(split, seed, i, *slots[i % len(slots)], seen)
        seen.add(canonical(problem.prompt))
        yield problem


def _draw(split: Split, seed: int, i: int, difficulty: int, family: str, seen: set[str]) -> Problem:
    # Python seeds from a string by SHA-512, which is the same on every platform; hash() is not.
    rng = random.Random(f"{split}/{seed}/{i}/{family}/{difficulty}")
    for _ in range(TRIES):
        prompt, answer = FAMILIES[family](rng, difficulty)
        if split_of(prompt) == split and canonical(prompt) not in seen:
            return Problem(family, difficulty, prompt, answer)
    raise ArgumentError(
        f"{family} at difficulty {difficulty} has no unused {split} problem left after {len(seen)} problems "
        f"({TRIES} draws); ask for fewer, or for more families or difficulties."
    )
