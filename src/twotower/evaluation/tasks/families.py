"""Families of problems: pure functions of (rng, difficulty 1 to 5) that return (prompt, answer).

A prompt ends in " =>". An answer starts with a space and ends its document. Each prompt has exactly one right answer.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from twotower.evaluation.tasks.drawing import NAMES, THINGS, below, draw, pick
from twotower.evaluation.tasks.json_records import json_records

Family = Callable[[random.Random, int], tuple[str, str]]

LEVELS = range(1, 6)

LETTERS = "abcdefghijklmnopqrstuvwxyz"
KEYS = str.split(
    "ant ape bat bear bee cat cow crab crow deer dog dove duck elk emu fish fly fox frog goat gnu hare hawk hen "
    "ibis jay kite lark lion lynx mole moth mule newt owl pig pony pug ram rat seal slug swan toad tuna wasp wolf yak"
)
HOLDERS = str.split("bags boxes cups jars trays")
GAINS = ("{a} buys {n} more.", "{a} finds {n}.", "{a} wins {n}.", "{b} gives {a} {n}.", "{a} gets {n} from {b}.")
LOSSES = ("{a} sells {n}.", "{a} loses {n}.", "{a} drops {n}.", "{a} gives {b} {n}.", "{b} takes {n} from {a}.")
ASIDES = ("{b} has {n} {other}.", "{b} buys {n} {other}.", "{b} sells {n} {other}.", "{b} wants {n} {things}.")


def addition(rng: random.Random, difficulty: int) -> tuple[str, str]:
    """Addition of two numbers of 2 · difficulty + 2 digits, by columns from the right: digit + digit + carry = sum."""
    digits = 2 * difficulty + 2
    a, b = (10 ** (digits - 1) + below(rng, 9 * 10 ** (digits - 1)) for _ in range(2))
    columns, carry = [], 0
    for x, y in zip(reversed(str(a)), reversed(str(b)), strict=True):
        total = int(x) + int(y) + carry
        columns.append(f"{x}+{y}+{carry}={total}")
        carry = total // 10
    return f"Add: {a} + {b} =>", f" {', '.join(columns)}; {a + b}"


def step(rng: random.Random, value: int, limit: int) -> tuple[str, int, int]:
    """One operation on `value`: its sign, its operand, and the result, which is below `limit`."""
    largest = (limit - 1) // max(value, 1)
    if value >= 2 and largest >= 2 and rng.random() < 0.3:
        factor = 2 + below(rng, min(largest, 9) - 1)
        return "*", factor, value * factor
    result = below(rng, limit - 1)  # drawing the result, not the operand, keeps values spread over the whole range
    result += result >= value  # the result differs from value
    return ("+" if result > value else "-"), abs(result - value), result


def arithmetic(rng: random.Random, difficulty: int) -> tuple[str, str]:
    """A chain of difficulty + 2 operations, left to right; values below 100 (levels 1–3) or 200 (levels 4–5)."""
    limit = 100 if difficulty <= 3 else 200
    value = below(rng, limit)
    asked, written = [str(value)], []
    for _ in range(difficulty + 2):
        sign, operand, result = step(rng, value, limit)
        asked.append(f"{sign}{operand}")
        written.append(f"{value}{sign}{operand}={result}")
        value = result
    return f"Calc: {', '.join(asked)} =>", f" {', '.join(written)}"


def sorting(rng: random.Random, difficulty: int) -> tuple[str, str]:
    """Sorts 3 + 2 · difficulty different two-digit numbers, ascending."""
    numbers = draw(rng, range(10, 100), 3 + 2 * difficulty)
    return f"Sort: {' '.join(map(str, numbers))} =>", f" {' '.join(map(str, sorted(numbers)))}"


def recall(rng: random.Random, difficulty: int) -> tuple[str, str]:
    """Looks up difficulty + 2 keys, in the given order, in 2 + 4 · difficulty pairs of key and two-digit value."""
    keys = draw(rng, KEYS, 2 + 4 * difficulty)
    pairs = {key: f"{key} {10 + below(rng, 90)}" for key in keys}
    asked = draw(rng, keys, difficulty + 2)
    return (
        f"Recall: {', '.join(pairs.values())} | {', '.join(asked)} =>",
        f" {', '.join(pairs[key] for key in asked)}",
    )


def edit(rng: random.Random, kind: str, text: str) -> tuple[str, str]:
    """One edit of `text`, which has at least two different letters: the instruction and the edited text."""
    present = sorted(set(text))
    a, b = draw(rng, present, 2)
    if kind == "reverse":
        return kind, text[::-1]
    if kind == "rotate":
        return kind, text[1:] + text[0]
    if kind == "drop":
        return f"drop {a}", text.replace(a, "")
    if kind == "double":
        return f"double {a}", text.replace(a, a + a)
    if kind == "swap":
        return f"swap {a} {b}", text.translate(str.maketrans(a + b, b + a))
    new = pick(rng, [letter for letter in LETTERS if letter not in present])
    return f"change {a} {new}", text.replace(a, new)


EDITS = ("reverse", "rotate", "drop", "double", "swap", "change")


def edits(rng: random.Random, difficulty: int) -> tuple[str, str]:
    """Edits a string of 5 + 2 · difficulty spaced letters; the answer has the string after each edit.

    Levels 1 and 2 have one edit, levels 3 and 4 two, level 5 three. From level 4 two letters are repeated; below level
    4 all letters differ. `rotate` moves the first letter to the end; the other edits apply to all occurrences.
    """
    length, repeats = 5 + 2 * difficulty, 0 if difficulty <= 3 else 2
    letters = draw(rng, LETTERS, length - repeats)
    text = "".join(draw(rng, letters + draw(rng, letters, repeats), length))
    start, asked, written = text, [], []
    for kind in draw(rng, EDITS, (1 + difficulty) // 2):
        instruction, text = edit(rng, kind, text)
        asked.append(instruction)
        written.append(" ".join(text))
    return f"Edit: {' '.join(start)} | {', '.join(asked)} =>", f" {', '.join(written)}"


def word(rng: random.Random, difficulty: int) -> tuple[str, str]:
    """A story of difficulty + 1 calculations below 100, with one irrelevant sentence at levels 3 and 4, two at 5."""
    a, b = draw(rng, NAMES, 2)
    things, other = draw(rng, THINGS, 2)
    value, told, written, steps = 2 + below(rng, 98), "", [], difficulty + 1
    if rng.random() < 0.4:  # the first calculation is a product
        each, count = 2 + below(rng, 8), 2 + below(rng, 8)
        value, steps = each * count, steps - 1
        told = f"{a} has {count} {pick(rng, HOLDERS)} of {each} {things}."
        written.append(f"{count}*{each}={value}")
    story = []
    for _ in range(steps):
        result = below(rng, 99)
        result += result >= value
        change = abs(result - value)
        story.append(pick(rng, GAINS if result > value else LOSSES).format(a=a, b=b, n=change))
        written.append(f"{value}{'+' if result > value else '-'}{change}={result}")
        if not told:
            told = f"{a} has {value} {things}."
        value = result
    for _ in range((difficulty - 1) // 2):
        aside = pick(rng, ASIDES).format(b=b, n=2 + below(rng, 98), other=other, things=things)
        story.insert(below(rng, len(story) + 1), aside)
    question = f"Story: {told} {' '.join(story)} How many {things} does {a} have? =>"
    return question, f" {'. '.join(written)}. Answer: {value}."


FAMILIES: dict[str, Family] = {
    "addition": addition,
    "arithmetic": arithmetic,
    "sorting": sorting,
    "recall": recall,
    "edits": edits,
    "word": word,
    "json": json_records,
}
SUITE = ("addition", "arithmetic", "sorting", "recall", "edits", "word")  # where nobody names families
