"""The family `json`: facts about people in a short text, as JSON objects with the asked keys in the asked order."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import NamedTuple

from twotower.evaluation.tasks.drawing import NAMES, THINGS, below, draw, pick

Value = str | int | bool | list[str]

CITIES = str.split("Athens Berlin Cairo Delhi Dublin Lagos Lima London Madrid Milan Oslo Paris Prague Quito Rome Tokyo")
JOBS = str.split("baker barber cook dancer doctor driver farmer guard judge lawyer nurse painter pilot sailor teacher")
PETS = str.split("bear cat cow crab dog duck fish fox goat hen horse lion mouse pig rabbit rat snake toad wolf")
COLORS = str.split("black blue brown gold gray green orange pink purple red silver white yellow")
DAYS = str.split("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
HOSTS = str.split("bird cloud lake moon rain river snow star sun tree wind wood")


class Fact(NamedTuple):
    """How the value of a key is drawn, and the sentences that can tell it; `{name}` is the person, `{v}` the value."""

    draw: Callable[[random.Random], Value]
    sentences: tuple[str, ...]


def _words(items: list[str]) -> Callable[[random.Random], Value]:
    return lambda rng: pick(rng, items)


def _number(low: int, high: int) -> Callable[[random.Random], Value]:
    return lambda rng: low + below(rng, high - low + 1)


FACTS: dict[str, Fact] = {
    "city": Fact(_words(CITIES), ("{name} lives in {v}.", "{name} is from {v}.", "In {v}, everybody knows {name}.")),
    "age": Fact(
        _number(18, 89), ("{name} is {v} years old.", "{name} turned {v} today.", "At {v}, {name} still runs.")
    ),
    "job": Fact(_words(JOBS), ("{name} works as a {v}.", "{name} is a {v}.", "They need a {v}, so they call {name}.")),
    "pet": Fact(_words(PETS), ("{name} has a pet {v}.", "{name} keeps a {v}.", "The {v} belongs to {name}.")),
    "color": Fact(_words(COLORS), ("{name} likes {v}.", "The coat of {name} is {v}.", "{name} paints the door {v}.")),
    "day": Fact(_words(DAYS), ("{name} comes on {v}.", "On {v}, {name} is free.", "{v} suits {name}.")),
    "time": Fact(
        lambda rng: f"{8 + below(rng, 12):02d}:{5 * below(rng, 12):02d}",
        ("{name} arrives at {v}.", "At {v}, {name} eats.", "The train of {name} leaves at {v}."),
    ),
    "phone": Fact(
        lambda rng: f"555-{below(rng, 10000):04d}",
        ("Call {name} at {v}.", "{name} has the number {v}.", "Under {v}, {name} answers."),
    ),
    "seats": Fact(
        _number(2, 12), ("{name} needs {v} seats.", "A table for {v}, says {name}.", "{name} brings {v} chairs.")
    ),
    "email": Fact(
        lambda rng: f"{pick(rng, PETS)}{below(rng, 100)}@{pick(rng, HOSTS)}.org",
        ("Write to {name} at {v}.", "The address {v} is that of {name}.", "{name} reads mail at {v}."),
    ),
    "order": Fact(
        lambda rng: draw(rng, THINGS, 1 + below(rng, 3)),
        ("{name} orders {v}.", "Please bring {v} to {name}.", "{name} wants {v}."),
    ),
    "member": Fact(lambda rng: rng.random() < 0.5, ("{name} is{v} a member.", "{name} has{v} joined the club.")),
}


def in_words(value: Value) -> str:
    """The value as a sentence has it: lists as `a, b and c`, booleans as nothing or ` not`."""
    if isinstance(value, bool):
        return "" if value else " not"
    if isinstance(value, list):
        return " and ".join([*([", ".join(value[:-1])] if value[1:] else []), value[-1]])
    return str(value)


def json_records(rng: random.Random, difficulty: int) -> tuple[str, str]:
    """Writes what a text says about one person (level 5: about two) as JSON.

    A person has difficulty + 2 facts (level 5: three), in random order. From level 3 on, one more key is asked that the
    text does not tell: null. At levels 2 and 4, one more sentence tells a fact about somebody else.
    """
    people, facts = (2, 3) if difficulty == 5 else (1, difficulty + 2)
    names = draw(rng, NAMES, people + 1)
    keys = draw(rng, list(FACTS), facts + 1)
    told, asked = keys[:facts], keys[:facts] if difficulty < 3 else keys
    asked = draw(rng, asked, len(asked))
    known: list[dict[str, Value]] = [{key: FACTS[key].draw(rng) for key in told} for _ in range(people)]
    lines = [(name, key, value) for name, own in zip(names, known, strict=False) for key, value in own.items()]
    if difficulty in (2, 4):
        lines.append((names[-1], other := pick(rng, told), FACTS[other].draw(rng)))
    text = " ".join(
        pick(rng, FACTS[key].sentences).format(name=name, v=in_words(value))
        for name, key, value in draw(rng, lines, len(lines))
    )
    objects = [{"name": name, **{key: own.get(key) for key in asked}} for name, own in zip(names, known, strict=False)]
    answer = json.dumps(objects if people > 1 else objects[0])
    return f"Json: {', '.join(names[:people])} | {', '.join(asked)} | {text} =>", f" {answer}"
