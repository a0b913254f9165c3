"""docs/backbones.md names every family, and no other, and its table says what the tests prove."""

from __future__ import annotations

import re
from pathlib import Path

import backbone_table
import pytest
from backbone_table import DOCUMENT, collected, table, with_table
from proofs import PROPERTIES, Outcomes, Proof, proofs_of
from tiny_backbones import SHAPES

from twotower.families import FAMILIES
from twotower.ops.cpu import library


def test_the_table_has_every_model_type() -> None:
    text = DOCUMENT.read_text(encoding="utf-8").split("## Families")[1].split("## What is tested")[0]
    rows = [row.split("|")[2] for row in text.splitlines() if row.startswith("| ")][1:]
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    known = {name for family in FAMILIES for name in family.model_types}
    multimodal = {"gemma3", "qwen3_5", "qwen3_5_moe"}  # files around the text models of these families
    assert named == known | multimodal | {"nemotron_h"}


@pytest.mark.skipif(isinstance(library.library(), str), reason="the tests of compiled passes are not collected here")
def test_the_table_is_what_the_tests_prove(capsys: pytest.CaptureFixture[str]) -> None:
    document = DOCUMENT.read_text(encoding="utf-8")
    proven = collected()
    capsys.readouterr()  # the list of the collected tests
    assert document == with_table(document, table(proven)), "docs/backbones.md is out of date; run make backbone-table"


# --- the table ------------------------------------------------------------------------------------------------------


def row(proven: set[Proof], kind: str = "phi3") -> list[str]:
    """The cells of a model type behind the number of its models."""
    line = next(line for line in table(proven).splitlines() if line.startswith(f"| `{kind}` |"))
    return line.strip("| ").split(" | ")[2:]


def test_a_cell_says_yes_only_if_every_model_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    every = {Proof(shape, name) for shape in SHAPES for name in PROPERTIES}
    assert row(every) == ["yes"] * len(PROPERTIES)
    assert row(every - {Proof("phi3:window", "verified")})[2] == "2 of 3"
    assert row({proof for proof in every if proof.property != "int8"})[4] == "no"
    assert row(set()) == ["no"] * len(PROPERTIES)
    monkeypatch.setattr(backbone_table, "declined", lambda shape: "no such layer" if shape == "phi3" else None)
    assert row(every)[-1] == "2 of 3; no such layer"
    assert row(every, "llama")[-1] == "yes"


def report(outcome: str, when: str, shape: str) -> pytest.TestReport:
    noted = [("proves", [shape, "int8"]), ("code path", "avx2")]
    return pytest.TestReport(shape, ("file", 1, shape), {}, outcome, None, when, user_properties=noted)  # type: ignore[arg-type]


def test_only_tests_that_ran_and_passed_prove_something(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One failed test of a cell is enough to lose it, also one that fails while it is set up."""
    outcomes = Outcomes()
    for outcome, when, shape in (
        ("passed", "setup", "llama"), ("passed", "call", "llama"), ("passed", "call", "qwen3"),
        ("failed", "call", "qwen3"), ("passed", "setup", "mistral"), ("skipped", "call", "mistral"),
        ("failed", "setup", "glm4"), ("passed", "call", "glm4"),
    ):  # fmt: skip
        outcomes.pytest_runtest_logreport(report(outcome, when, shape))
    monkeypatch.setattr(backbone_table, "DOCUMENT", tmp_path / "document.md")
    before = DOCUMENT.read_text(encoding="utf-8")
    (tmp_path / "document.md").write_text(before, encoding="utf-8")
    outcomes.pytest_sessionfinish()
    written = (tmp_path / "document.md").read_text(encoding="utf-8")
    assert written == with_table(before, table({Proof("llama", "int8")}))
    assert row({Proof("llama", "int8")}, "llama")[4] == "1 of 4"


@pytest.mark.parametrize("mark", [pytest.mark.proves("int9"), pytest.mark.proves(), pytest.mark.proves("int8")])
def test_a_mark_names_a_property_and_a_model(mark: pytest.MarkDecorator) -> None:
    class Item:
        nodeid = "a test"

        def iter_markers(self, name: str) -> list[pytest.Mark]:
            return [mark.mark]

    with pytest.raises(ValueError, match="a test: proves"):
        list(proofs_of(Item()))  # type: ignore[arg-type]
