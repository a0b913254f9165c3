"""docs/backbones.md names every family, and no other."""

from __future__ import annotations

import re
from pathlib import Path

from twotower.families import FAMILIES

DOCUMENT = Path(__file__).parents[2] / "docs" / "backbones.md"


def test_the_table_has_every_model_type() -> None:
    table = DOCUMENT.read_text(encoding="utf-8").split("## Families")[1].split("## What is tested")[0]
    rows = [row.split("|")[2] for row in table.splitlines() if row.startswith("| ")][1:]
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    known = {name for family in FAMILIES for name in family.model_types}
    assert named == known | {"nemotron_h", "gemma3"}  # gemma3: a multimodal file around gemma3_text
