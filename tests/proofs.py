"""What a test proves about a tiny backbone, for the table of `docs/backbones.md` (`backbone_table.py`).

A test that proves properties of a tiny backbone has the mark `proves(property, …)`. Its parameter `name`, or the
argument `shape` of the mark, is a name of `tiny_backbones.SHAPES`. With `pytest --backbone-table`, a run writes the
table from the tests that passed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import pytest

PROPERTIES = ("AR equal", "rollback", "verified", "training gradient = reference", "int8", "compiled pass")
MARK = "proves"  # also the name of a property of reports
OPTION = "--backbone-table"


class Proof(NamedTuple):
    """A property (of `PROPERTIES`) of a tiny backbone (of `SHAPES`)."""

    shape: str
    property: str


def proofs_of(item: pytest.Item) -> Iterator[Proof]:
    """What a test proves if it passes.

    Raises:
        ValueError: its mark names no property, or an unknown one, or no backbone.
    """
    for mark in item.iter_markers(MARK):
        parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        shape = mark.kwargs.get("shape", parameters.get("name"))
        if not isinstance(shape, str) or not mark.args or not set(mark.args) <= set(PROPERTIES):
            raise ValueError(f"{item.nodeid}: proves {mark.args} of {shape!r}; see PROPERTIES")
        yield from (Proof(shape, name) for name in mark.args)


def note_proofs(items: Iterable[pytest.Item]) -> None:
    """Adds to each test what it proves; its reports carry this from the processes of xdist."""
    for item in items:
        item.user_properties += [(MARK, list(proof)) for proof in proofs_of(item)]


class Outcomes:
    """Writes the table after a run, from the tests that passed."""

    def __init__(self) -> None:
        self.passed: set[Proof] = set()
        self.failed: set[Proof] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        found = {Proof(*value) for name, value in report.user_properties if name == MARK and isinstance(value, list)}
        if report.failed:
            self.failed |= found
        elif report.passed and report.when == "call":
            self.passed |= found

    def pytest_sessionfinish(self) -> None:
        from backbone_table import DOCUMENT, table, with_table  # imports `conftest`

        document = DOCUMENT.read_text(encoding="utf-8")
        DOCUMENT.write_text(with_table(document, table(self.passed - self.failed)), encoding="utf-8")


def add_option(parser: pytest.Parser) -> None:
    parser.addoption(OPTION, action="store_true", help="write the table of docs/backbones.md from this run")


def configure(config: pytest.Config) -> None:
    if config.getoption(OPTION) and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Outcomes())
