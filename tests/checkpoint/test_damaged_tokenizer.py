"""A damaged tokenizer, one that needs code, and values of config.json that transformers rejects: one line each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_run
from command import Result, assert_one_line_error

from twotower import TwoTowerConfig, TwoTowerForCausalLM
from twotower.errors import ConfigError

Cli = Callable[..., Result]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return tiny_run.two_towers(tmp_path / "two", "M*")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["", "{", "[]", "null", "version https://git-lfs.github.com/spec/v1", "\udcff"])
def test_a_damaged_tokenizer_file(checkpoint: Path, cli: Cli, name: str, content: str) -> None:
    (checkpoint / name).write_bytes(content.encode(errors="surrogateescape"))
    assert_one_line_error(cli("generate", "a", "-m", checkpoint), str(checkpoint / name), "download it again")
    described = cli("info", checkpoint)
    assert described.code == 2
    assert "cannot be read" in described.out
    assert f"Error: {checkpoint / name}" in described.err
    assert json.loads(cli("info", checkpoint, "--json").out)["tokenizer_problem"]


def test_a_tokenizer_that_the_library_rejects(checkpoint: Path, cli: Cli) -> None:
    (checkpoint / "tokenizer.json").write_text('{"model": {"type": "Unheard"}}')
    assert_one_line_error(cli("generate", "a", "-m", checkpoint), str(checkpoint), "the tokenizer cannot be read")
    assert cli("info", checkpoint).code == 2


CODE = """
from transformers import PreTrainedTokenizerFast
class MyTokenizer(PreTrainedTokenizerFast):
    pass
"""


def test_a_tokenizer_that_needs_code(checkpoint: Path, cli: Cli) -> None:
    """The code runs only if the caller trusts it; nobody is asked on stdin."""
    file = checkpoint / "tokenizer_config.json"
    values = json.loads(file.read_text()) | {"auto_map": {"AutoTokenizer": [None, "tok.MyTokenizer"]}}
    file.write_text(json.dumps(values | {"tokenizer_class": "MyTokenizer"}))
    (checkpoint / "tok.py").write_text(CODE)
    said = ("needs Python code of the checkpoint", "trust_remote_code=True")
    assert_one_line_error(cli("generate", "a", "-m", checkpoint, stdin=b"y\n"), *said)
    assert said[0] in cli("info", checkpoint).err
    model = TwoTowerForCausalLM.from_pretrained(checkpoint, trust_remote_code=True)
    assert type(model.tokenizer).__name__ == "MyTokenizer"


WRONG: list[dict[str, Any]] = [
    {"rope_scaling": {"rope_type": "yarn"}},
    {"rope_scaling": {"type": "linear", "factor": 2.0}},
    {"rope_scaling": 3},
    {"rope_parameters": {"rope_type": "yarn"}},
    {"architectures": 3},
    {"id2label": 3},
]


@pytest.mark.parametrize("values", WRONG)
def test_values_of_the_config_that_cannot_be_used(checkpoint: Path, cli: Cli, values: dict[str, Any]) -> None:
    file = checkpoint / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    for command in (("info", checkpoint), ("generate", "a", "-m", checkpoint)):
        assert_one_line_error(cli(*command), str(file))
    with pytest.raises(ConfigError):
        TwoTowerConfig.read(checkpoint)
