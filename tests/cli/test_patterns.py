"""The letters of layers in `twotower init`, `info` and `demo`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from command import Result
from tiny_backbones import BASE, hf_model, save_tokenizer

from twotower.cli.info_page import format_pattern
from twotower.config import TwoTowerConfig

PATTERNS = {
    "*-" * 30: '30 × "*-"',
    "M" * 24: '24 × "M"',
    ("D-" * 3 + "*-") * 12: '12 × "D-D-D-*-"',
    "*-" + "*E" * 47: '"*-" + 47 × "*E"',
    "ME" * 5 + "*E" + "ME" * 9: '5 × "ME" + "*" + 9 × "EM" + "E"',
    "ME*EMEMEME": "ME*EMEMEME",
    "M*E-M": "M*E-M",
    "": "",
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_repeated_parts_are_written_once(pattern: str) -> None:
    assert format_pattern(pattern) == PATTERNS[pattern]


def test_the_released_pattern_can_be_read_back(golden_dir: Path) -> None:
    pattern = TwoTowerConfig.read(golden_dir / "released").hybrid_override_pattern
    written, back = format_pattern(pattern), ""
    assert len(written) < len(pattern)
    for part in written.split(" + "):
        count, _, letters = part.rpartition(" × ")
        back += letters.strip('"') * int(count or 1)
    assert back == pattern


def test_init_and_info_print_it(tmp_path: Path, cli: Callable[..., Result]) -> None:
    options = {"num_hidden_layers": 30, "hidden_size": 8, "intermediate_size": 8, "head_dim": 4}
    hf_model("llama", options=BASE | options).save_pretrained(tmp_path / "ar")
    save_tokenizer(tmp_path / "ar", "<mask>", mask_token="<mask>")
    made = cli("init", "--from", tmp_path / "ar", "-o", tmp_path / "two", "--denoiser", "tower")
    assert '(60 layers: 30 × "*-"), time' in made.out
    shown = cli("info", tmp_path / "two")
    assert '30 × "*-"' in shown.out
    assert "*-*-*-*-*-*-" not in made.out + shown.out
    assert json.loads(cli("info", tmp_path / "two", "--json").out)["pattern"] == "*-" * 30
