"""The table of `docs/backbones.md`: which properties of which family the tests prove (see `proofs.py`)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

import pytest
from proofs import MARK, PROPERTIES, Proof, proofs_of
from tiny_backbones import SHAPES, hf_config

from twotower.config import MODEL_TYPE, GenericTwoTowerConfig, TwoTowerConfig
from twotower.families import FAMILIES, tower_spec
from twotower.runners.layer_options import spec_unsupported_reason

TESTS = Path(__file__).parent
DOCUMENT = TESTS.parent / "docs" / "backbones.md"
BEGIN, END = "<!-- begin: written by make backbone-table -->", "<!-- end -->"
COMPILED = "compiled pass"
MODEL_TYPES = (*(name for family in FAMILIES for name in family.model_types), MODEL_TYPE)


class Collector:
    """Keeps what the collected tests prove."""

    def __init__(self) -> None:
        self.found: set[Proof] = set()

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        self.found |= {proof for item in items for proof in proofs_of(item)}


def collected() -> set[Proof]:
    """What the tests prove that pytest collects, slow or not. No test runs."""

    files = [str(path) for path in sorted(TESTS.rglob("test_*.py")) if f"mark.{MARK}(" in path.read_text("utf-8")]
    options = ["--collect-only", "-qq", "--noconftest", "-p", "no:cacheprovider", "-o", "addopts="]
    code = pytest.main([*options, *files], plugins=[collector := Collector()])
    assert code == pytest.ExitCode.OK, code
    return collector.found


@cache
def declined(shape: str) -> str | None:
    """Why the compiled pass does not run this backbone; None if it does."""
    config = hf_config(shape)
    if config.model_type == MODEL_TYPE:
        return spec_unsupported_reason(tower_spec(TwoTowerConfig.of(config)))
    return spec_unsupported_reason(tower_spec(GenericTwoTowerConfig(backbone=config.to_dict(), mask_token_id=3)))


def _cell(shapes: Sequence[str], column: str, proven: set[Proof]) -> str:
    reasons = {shape: declined(shape) for shape in shapes} if column == COMPILED else {}
    good = [shape for shape in shapes if Proof(shape, column) in proven and reasons.get(shape) is None]
    text = "no" if not good else "yes" if len(good) == len(shapes) else f"{len(good)} of {len(shapes)}"
    return "; ".join([text, *sorted({reason for reason in reasons.values() if reason is not None})])


def table(proven: Iterable[Proof]) -> str:
    """The table in Markdown, one row a model type."""
    proven = set(proven)
    rows = [["`model_type`", "models", *PROPERTIES], ["---"] * (2 + len(PROPERTIES))]
    for kind in MODEL_TYPES:
        shapes = [name for name in SHAPES if name.partition(":")[0] == kind]
        rows.append([f"`{kind}`", str(len(shapes)), *(_cell(shapes, column, proven) for column in PROPERTIES)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def with_table(document: str, new: str) -> str:
    """The document with this table between the two comments."""
    before, rest = document.split(BEGIN)
    return f"{before}{BEGIN}\n\n{new}\n\n{END}{rest.split(END, 1)[1]}"
