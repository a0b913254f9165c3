"""The procedural suite: answers recomputed from the prompts, disjoint seeded splits, scores and errors."""

from __future__ import annotations

import hashlib
import importlib
import itertools
import json
import random
import re
import sys
from collections.abc import Callable
from typing import Any

import pytest

from twotower.errors import ArgumentError
from twotower.evaluation.tasks import (
    FAMILIES,
    LEVELS,
    SUITE,
    Problem,
    accuracy,
    make_problems,
    score,
    stream_problems,
    wilson,
    write_jsonl,
)
from twotower.evaluation.tasks.__main__ import run_suite
from twotower.evaluation.tasks.problem_sets import TEST_SHARE, split_of

GOLDEN = "ddbed5e55c4a7cc3eb59ad934c21a41daf15d5ccbc58c10ae3288e414bd59d7d"


def body(prompt: str) -> str:
    found = re.fullmatch(r"\w+: (.*) =>", prompt)
    assert found
    return found[1]


# One solver per family, which reads the prompt and shares no code with the generator.


def solve_addition(prompt: str) -> str:
    a, b = (list(map(int, reversed(n))) for n in body(prompt).split(" + "))
    out, carry = "", 0
    for k in range(len(a)):
        total = a[k] + b[k] + carry
        out += f"{', ' if k else ''}{a[k]}+{b[k]}+{carry}={total}"
        carry = int(total >= 10)
    return f"{out}; {sum((x + y) * 10**k for k, (x, y) in enumerate(zip(a, b, strict=True)))}"


def solve_arithmetic(prompt: str) -> str:
    first, *rest = body(prompt).split(", ")
    chain, out = int(first), []
    for operation in rest:
        result = eval(f"{chain}{operation}")
        out.append(f"{chain}{operation}={result}")
        assert 0 <= result < 200
        chain = result
    return ", ".join(out)


def solve_sorting(prompt: str) -> str:
    numbers = body(prompt).split()
    assert len(set(numbers)) == len(numbers)
    return " ".join(sorted(numbers))  # two digits each, so that strings and numbers have the same order


def solve_recall(prompt: str) -> str:
    pairs, asked = body(prompt).split(" | ")
    return ", ".join(re.findall(rf"\b{key} \d\d", pairs)[0] for key in asked.split(", "))


def solve_edits(prompt: str) -> str:
    start, asked = body(prompt).split(" | ")
    letters, out = start.split(), []
    for instruction in asked.split(", "):
        match instruction.split():
            case ["reverse"]:
                letters = [*reversed(letters)]
            case ["rotate"]:
                letters = [*letters[1:], letters[0]]
            case ["drop", a]:
                assert a in letters
                letters = [x for x in letters if x != a]
            case ["double", a]:
                letters = [y for x in letters for y in ([x, x] if x == a else [x])]
            case ["swap", a, b]:
                letters = [{a: b, b: a}.get(x, x) for x in letters]
            case ["change", a, new]:
                assert a in letters
                assert new not in letters
                letters = [new if x == a else x for x in letters]
            case other:
                raise AssertionError(other)
        out.append(" ".join(letters))
    return ", ".join(out)


def solve_word(prompt: str) -> str:
    *sentences, question, _ = re.split(r"(?<=[.?]) ", prompt.removeprefix("Story: "))
    asked = re.fullmatch(r"How many (\w+) does (\w+) have\?", question)
    assert asked
    things, hero = asked.groups()
    value, out = 0, []
    for k, sentence in enumerate(sentences):
        found = re.fullmatch(rf"{hero} has (\d+) (\w+)(?: of (\d+) {things})?\.", sentence)
        if k == 0:
            assert found
            value = int(found[1]) * int(found[3] or 1)
            if found[3]:
                out.append(f"{found[1]}*{found[3]}={value}")
            continue
        change = int(re.findall(r"\d+", sentence)[0])
        if hero not in sentence:
            assert re.search(r" \d+ \w+\.$", sentence)  # an irrelevant sentence
            continue
        gains = rf"{hero} (buys|finds|wins|gets) |\w+ gives {hero} "
        sign = 1 if re.match(gains, sentence) else -1
        out.append(f"{value}{'+' if sign > 0 else '-'}{change}={value + sign * change}")
        value += sign * change
        assert 0 <= value < 100
    return ". ".join([*out, f"Answer: {value}."])


# How a sentence tells a fact about the person {P}; the value is {V}.
TOLD = {
    "city": ("{P} lives in {V}", "{P} is from {V}", "In {V}, everybody knows {P}"),
    "age": ("{P} is {V} years old", "{P} turned {V} today", "At {V}, {P} still runs"),
    "job": ("{P} works as a {V}", "{P} is a {V}", "They need a {V}, so they call {P}"),
    "pet": ("{P} has a pet {V}", "{P} keeps a {V}", "The {V} belongs to {P}"),
    "color": ("{P} likes {V}", "The coat of {P} is {V}", "{P} paints the door {V}"),
    "day": ("{P} comes on {V}", "On {V}, {P} is free", "{V} suits {P}"),
    "time": ("{P} arrives at {V}", "At {V}, {P} eats", "The train of {P} leaves at {V}"),
    "phone": ("Call {P} at {V}", "{P} has the number {V}", "Under {V}, {P} answers"),
    "seats": ("{P} needs {V} seats", "A table for {V}, says {P}", "{P} brings {V} chairs"),
    "email": ("Write to {P} at {V}", "The address {V} is that of {P}", "{P} reads mail at {V}"),
    "order": ("{P} orders {V}", "Please bring {V} to {P}", "{P} wants {V}"),
    "member": ("{P} is{V} a member", "{P} has{V} joined the club"),
}
VALUES = {"age": r"\d+", "seats": r"\d+", "phone": r"555-\d{4}", "email": r"\w+@\w+\.org", "time": r"\d\d:\d\d"}
VALUES |= {"order": r"[a-z, ]+", "member": "| not"}


def solve_json(prompt: str) -> str:
    names, asked, text = body(prompt).split(" | ")
    found: list[dict[str, Any]] = []
    for name in names.split(", "):
        found.append({"name": name})
        for key in asked.split(", "):
            forms = (form.format(P=name, V=f"({VALUES.get(key, '[A-Za-z]+')})") for form in TOLD[key])
            told = [m[1] for form in forms for m in re.finditer(rf"(?:^|(?<=\. )){form}(?=\.(?: |$))", text)]
            told = [value for value in told if (key, value) != ("job", "member")]
            assert len(told) <= 1, (key, told)
            read: dict[str, Callable[[str], Any]] = {
                "age": int,
                "seats": int,
                "member": lambda v: not v,
                "order": lambda v: re.split(", | and ", v),
            }
            found[-1][key] = read.get(key, str)(told[0]) if told else None
    return json.dumps(found if found[1:] else found[0])


SOLVERS: dict[str, Callable[[str], str]] = {
    "addition": solve_addition,
    "arithmetic": solve_arithmetic,
    "sorting": solve_sorting,
    "recall": solve_recall,
    "edits": solve_edits,
    "word": solve_word,
    "json": solve_json,
}


def approximate_tokens(text: str) -> int:
    """Each digit is a token; a word or a run of other characters, with the space before it, is about one token."""
    return len(re.findall(r" ?[A-Za-z]+|\d|\s+(?=\d)|[^\sA-Za-z\d]+", text))


@pytest.mark.parametrize("difficulty", LEVELS)
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_right_and_of_bounded_length(family: str, difficulty: int) -> None:
    for problem in make_problems("train", 150, 5, [family], [difficulty]):
        assert (problem.family, problem.difficulty) == (family, difficulty)
        assert problem.answer == " " + SOLVERS[family](problem.prompt), problem
        assert problem.text.isascii()
        assert "\n" not in problem.text
        assert 6 <= approximate_tokens(problem.answer) <= 140, problem
        assert approximate_tokens(problem.text) <= 200, problem


def test_every_family_has_a_solver() -> None:
    assert list(SOLVERS) == list(FAMILIES)


def test_the_same_problems_on_every_machine() -> None:
    lines = [problem.line() for split in ("train", "test") for problem in make_problems(split, 50, 1)]  # type: ignore[arg-type]
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == GOLDEN


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_slice_equals_that_of_the_whole(split: Any) -> None:
    whole = make_problems(split, 60, 3)
    assert make_problems(split, 25, 3) == whole[:25]
    assert list(itertools.islice(stream_problems(split, 3, start=40), 20)) == whole[40:]
    assert make_problems(split, 60, 4) != whole
    assert {(p.family, p.difficulty) for p in whole[:18]} == set(itertools.product(SUITE, (1, 2, 3)))


def test_train_and_test_are_disjoint() -> None:
    train = {" ".join(p.prompt.split()) for p in make_problems("train", 20_000, 1)}
    test = [" ".join(p.prompt.split()) for p in make_problems("test", 2_000, 1)]
    assert len(set(test)) == len(test)
    assert train.isdisjoint(test)
    assert all(split_of(f"  {prompt.replace(' ', '   ')}\n") == "test" for prompt in test[:100])


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_has_at_least_100_000_problems_at_its_easiest(family: str) -> None:
    draws = 5_000
    rng = random.Random(0)
    unique = len({FAMILIES[family](rng, 1)[0] for _ in range(draws)})
    # With N prompts, about draws² / 2N pairs are equal (more if some are likelier): 125 for N = 100,000; 70 is 5 σ less
    assert draws - unique <= 70


def test_more_problems_than_exist_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "toy", lambda rng, difficulty: (f"{int(rng.random() * 100)} =>", " x"))
    count = sum(split_of(f"{n} =>") == "test" for n in range(100))
    assert 0 < count < 100 // TEST_SHARE * 3
    assert len(make_problems("test", count, 1, ["toy"], [1])) == count
    with pytest.raises(ArgumentError, match=f"toy at difficulty 1 has no unused test problem left after {count}"):
        make_problems("test", count + 1, 1, ["toy"], [1])
    assert len(make_problems("train", 300, 1, ["toy"], [1])) == 300  # training problems may repeat


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"families": ["chess"]}, r"family is 'chess'; it must be one of addition, .*word"),
        ({"difficulties": [6]}, "difficulty is 6; it must be from 1 to 5"),
        ({"difficulties": [0]}, "difficulty is 0"),
        ({"difficulties": []}, "empty"),
        ({"count": 0}, "count is 0"),
        ({"split": "dev"}, "split is 'dev'; it must be one of train, test"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        make_problems(**{"split": "train", "count": 1, "seed": 1, **arguments})
    with pytest.raises(ArgumentError, match="start is -1"):
        stream_problems("train", 1, start=-1)


def test_wilson_interval() -> None:
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)  # Newcombe 1998, table I
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson(29, 29) == pytest.approx((0.8830, 1.0), abs=5e-5)
    with pytest.raises(ArgumentError, match="right is 3 of count 2"):
        wilson(3, 2)


def test_scores_are_exact_matches_by_family() -> None:
    asked = make_problems("test", 40, 2, ["sorting", "recall"])
    answers = [f"{p.answer}\n" if p.family == "recall" else f"{p.answer} 0" for p in asked]
    answers[0] = asked[0].answer.strip()
    table = score(asked, answers)
    assert [(name, s.right, s.count) for name, s in table.items()] == [
        ("sorting", 1, 20),
        ("recall", 20, 20),
        ("overall", 21, 40),
    ]
    assert table["overall"].share == 21 / 40
    assert str(table["overall"]) == " 52.5% [37.5%, 67.1%] of 40"
    known = {p.prompt: answer for p, answer in zip(asked, answers, strict=True)}
    assert accuracy(lambda prompts: [known[prompt] for prompt in prompts], asked) == table
    for bad in (asked, []), ([], []), (asked, answers[1:]):
        with pytest.raises(ArgumentError, match="give one answer for each"):
            score(*bad)  # type: ignore[arg-type]


def test_files_and_command_line(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    made = make_problems("test", 5, 9, ["edits"], [2, 4])
    write_jsonl(tmp_path / "a", made)
    options = ["--split=test", "--count=5", "--seed=9", "--family=edits", "--difficulty=2", "--difficulty=4"]
    assert run_suite([*options, "-o", str(tmp_path / "b")]) == 0
    assert capsys.readouterr().out == ""
    assert run_suite(options) == 0
    assert capsys.readouterr().out.encode() == (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    rows = [json.loads(line) for line in (tmp_path / "a").read_text().splitlines()]
    assert [Problem(r["family"], r["difficulty"], r["prompt"], r["text"]) for r in rows] == made


@pytest.mark.parametrize(
    "options",
    ["--split dev", "--split test --family chess", "--split test --difficulty 9", "--split test --count 0", "",
     "--split test -o /nowhere/at/all"],
)  # fmt: skip
def test_an_error_of_the_user_is_one_line_and_exit_code_2(options: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_suite(options.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"Error: [^\n]+\n", err)


def test_the_deprecated_module_keeps_the_old_names_of_functions() -> None:
    sys.modules.pop("twotower.evaluation.suite", None)
    with pytest.warns(DeprecationWarning, match=r"twotower\.evaluation\.tasks"):
        suite = importlib.import_module("twotower.evaluation.suite")
    assert (suite.problems, suite.side, suite.stream) == (make_problems, split_of, stream_problems)
