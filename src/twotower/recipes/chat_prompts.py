"""Prompts for a chat model, of two kinds: narrow tasks, whose answers repeat their prompt, and broad questions.

    narrow   the problems of the suite in words, objects in JSON about dialogues, the questions of GSM8K
    broad    stories, passages, programs, first lines of dialogues, and short requests about a list of subjects

Every record is `{"messages": [one user turn], "kind": KIND}`, as `twotower generate-data` reads it.
"""

from __future__ import annotations

import gzip
import itertools
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, TypeVar

from twotower.evaluation.tasks import SUITE, make_problems

Item = TypeVar("Item")

KINDS: Final = ("suite", "json", "gsm8k", "broad")
DIFFICULTIES: Final = (1, 2)
PASSAGE: Final = 600  # characters
TURNS: Final = 4  # of a dialogue that becomes an object
INTRODUCTIONS: Final = {
    "addition": ("What is {}?", "Add {} digit by digit, then give the sum.", "Calculate {}. Show your work."),
    "arithmetic": ("Start with the first number and apply each operation in order: {}.", "Work out step by step: {}."),
    "sorting": ("Sort these numbers in ascending order: {}", "Write these numbers from smallest to largest: {}"),
    "recall": ("Here is a list, then some names: {}. Write each of the names with its number.",),
    "edits": ("Here are some letters and a change to make: {}. Write the letters after the change.",),
    "word": ("{}", "{} Think step by step."),
}
OBJECTS: Final = (
    'Read this dialogue. Answer with a JSON object with the keys "intent", "place", "date" and "summary".',
    'Extract the facts of this dialogue as JSON with the keys "user_wants", "assistant_offers" and "open_questions".',
    'Turn this dialogue into a JSON list of objects, each with the keys "speaker" and "text".',
)
REQUESTS: Final = (
    "Explain {} to a child.",
    "Give three tips about {}.",
    "Write a short poem about {}.",
    "What is {}?",
    "List five facts about {}.",
    "Write a two-sentence story about {}.",
    "Why do people like {}?",
    "What are the advantages and the disadvantages of {}?",
    "Describe {} in one paragraph.",
    "Write an email to a friend about {}.",
    "How did {} change over time?",
    "Give two questions and answers about {}.",
)
SUBJECTS: Final = (
    "the moon",
    "rain",
    "bicycles",
    "bread",
    "chess",
    "the heart",
    "trees",
    "rivers",
    "trains",
    "coffee",
    "gravity",
    "computers",
    "birds",
    "winter",
    "the sea",
    "music",
    "gardens",
    "sleep",
    "maps",
    "volcanoes",
    "bees",
    "glass",
    "the internet",
    "money",
    "football",
    "painting",
    "mathematics",
    "cats",
    "tea",
    "photography",
    "robots",
    "salt",
    "markets",
    "libraries",
    "deserts",
    "clouds",
    "languages",
    "bridges",
    "paper",
    "dancing",
    "dreams",
    "whales",
    "electric cars",
    "vaccines",
    "democracy",
    "the Roman Empire",
    "cheese",
    "earthquakes",
    "friendship",
    "clocks",
    "the stars",
    "running",
    "potatoes",
    "satellites",
    "newspapers",
    "iron",
    "honey",
    "castles",
    "cooking",
    "snow",
)


def records(path: Path) -> list[dict[str, str]]:
    """The records of a file of JSON lines, compressed by gzip."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def passages(path: Path, rng: random.Random) -> Iterator[str]:
    """Without end: about PASSAGE characters of a text, from the start of a sentence to the end of one."""
    texts = [record["text"] for record in records(path)]
    while True:
        text = rng.choice(texts)
        at = rng.randrange(max(1, len(text) - PASSAGE))
        sentences = text[at : at + PASSAGE].replace("\n", " ").split(". ")[1:-1]
        if len(sentences) >= 2:
            yield ". ".join(sentences) + "."


def suite(family: str, seed: int) -> Iterator[str]:
    """Problems of one family of the suite in words."""
    rng = random.Random(f"{family} {seed}")
    for problem in make_problems("train", 4096, seed, (family,), DIFFICULTIES):
        question = problem.prompt.split(": ", 1)[1].removesuffix("=>").strip()
        yield rng.choice(INTRODUCTIONS[family]).format(question)


def objects(corpora: Path, rng: random.Random) -> Iterator[str]:
    """Dialogues, with a request for an object in JSON."""
    for record in shuffled(records(corpora / "sgd_dialogues/train.jsonl.gz"), rng):
        dialogue = "\n".join(record["text"].split("\n")[:TURNS])
        yield f"{rng.choice(OBJECTS)}\n\n{dialogue}"


def requests(rng: random.Random) -> Iterator[str]:
    """Every short request about every subject, in a random order."""
    pairs = list(itertools.product(REQUESTS, SUBJECTS))
    for form, subject in shuffled(pairs, rng):
        yield form.format(subject)


def first_lines(corpora: Path, rng: random.Random) -> Iterator[str]:
    """What people say first in the dialogues."""
    for record in shuffled(records(corpora / "sgd_dialogues/train.jsonl.gz"), rng):
        yield record["text"].split("\n")[0].removeprefix("User: ")


def stories(corpora: Path, rng: random.Random) -> Iterator[str]:
    """Two sentences of a story, to be continued."""
    for record in shuffled(records(corpora / "tinystories_cased/train.jsonl.gz"), rng):
        yield "Continue this story: " + ". ".join(record["text"].replace("\n", " ").split(". ")[:2]) + "."


def programs(corpora: Path, rng: random.Random) -> Iterator[str]:
    """The tasks of MBPP's training items, without their tests."""
    for record in shuffled(records(corpora / "mbpp_train/train.jsonl.gz"), rng):
        yield record["text"].strip('"\n').split("\n")[0].replace("Write a function", "Write a Python function")


def changed_passages(corpora: Path, rng: random.Random) -> Iterator[str]:
    """Passages of tales and novels, with a request to change them."""
    texts = [passages(corpora / folder / "train.jsonl.gz", rng) for folder in ("fairytales", "english_novels")]
    for source in itertools.cycle(texts):
        form = rng.choice(("Summarize this text in two sentences:", "Rewrite this text in simple English:"))
        yield f"{form}\n\n{next(source)}"


def shuffled(items: list[Item], rng: random.Random) -> list[Item]:
    """A copy of the list in a random order."""
    return rng.sample(items, len(items))


def sources(corpora: Path, seed: int) -> dict[str, list[Iterator[str]]]:
    """Kind → its sources of prompts, which take turns. corpora: the folder of the data sets."""

    def of(make: Callable[[Path, random.Random], Iterator[str]]) -> Iterator[str]:
        return make(corpora, random.Random(f"{make.__name__} {seed}"))

    questions = shuffled(records(corpora / "gsm8k_train/train.jsonl.gz"), random.Random(f"gsm8k {seed}"))
    broad = [of(make) for make in (first_lines, stories, programs, changed_passages)]
    return {
        "suite": [suite(family, seed) for family in SUITE],
        "json": [of(objects)],
        "gsm8k": [(record["question"] for record in questions)],
        "broad": [requests(random.Random(seed)), *broad],
    }


def chat_prompts(corpora: Path, counts: dict[str, int], seed: int) -> Iterator[dict[str, object]]:
    """Records in a random order. counts: prompts of each kind; a source that ends leaves its share to the others."""
    found: list[dict[str, object]] = []
    for kind, turns in sources(corpora, seed).items():
        texts = itertools.islice(in_turn(turns), counts.get(kind, 0))
        found += [{"messages": [{"role": "user", "content": text}], "kind": kind} for text in texts]
    yield from shuffled(found, random.Random(seed))


def in_turn(turns: list[Iterator[str]]) -> Iterator[str]:
    """One text of each iterator in turn, until all have ended."""
    waiting = list(turns)
    while waiting:
        for source in list(waiting):
            if (text := next(source, None)) is None:
                waiting.remove(source)
            else:
                yield text
