"""Commands that cannot work end with one line that says what is wrong and what to do."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_chat
from command import Result, assert_one_line_error
from tiny_backbones import save

Cli = Callable[..., Result]


@pytest.mark.parametrize(
    "command",
    [
        ("train", "bundled", "--data", "d.jsonl", "-o", ""),
        ("pretrain", "--config", "c.json", "--data", "d.jsonl", "-o", ""),
        ("init", "--from", "x", "-o", ""),
        ("quantize", "-o", "", "--scheme", "int8"),
        ("join", "a=x", "b=y", "-o", ""),
        ("export", "x", "--to", "gguf", "-o", ""),
        ("report", "-o", ""),
        ("curves", "run", "-o", ""),
        ("batch", "PROMPTS", "-o", ""),
        ("generate-data", "x", "--prompts", "PROMPTS", "-o", ""),
        ("generate", "a", "--trace", ""),
    ],
    ids=lambda command: command[0],
)
def test_an_empty_output_is_refused(command: tuple[str, ...], cli: Cli, tmp_path: Path) -> None:
    """As a path, an empty text is the current directory."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("")
    given = [str(prompts) if word == "PROMPTS" else word for word in command]
    assert_one_line_error(cli(*given), f"'{command[-2]}'" if command[-2] == "--trace" else "'-o'", "it is empty; give")


@pytest.mark.parametrize("command", [("init", "--from", "x"), ("quantize", "--scheme", "int4")])
def test_a_number_of_tokens_needs_a_text(command: tuple[str, ...], cli: Cli, tmp_path: Path) -> None:
    result = cli(*command, "-o", tmp_path / "out", "--calibration-tokens", "64")
    assert_one_line_error(result, "--calibration-tokens has no effect without --calibrate")


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("init",), "already the config of a two-tower checkpoint; use it with twotower train"),
        (("pretrain", "--data", "d.jsonl"), "is a two-tower checkpoint, and --from takes an autoregressive model"),
    ],
)
def test_a_bundled_model_is_no_source(command: tuple[str, ...], said: str, cli: Cli, tmp_path: Path) -> None:
    assert_one_line_error(cli(*command, "--from", "bundled/small", "-o", tmp_path / "out"), said)
    assert_one_line_error(cli(*command, "--from", "bundled/none", "-o", tmp_path / "out"), "no such bundled model")


@pytest.mark.parametrize("name", ["llama", "nemotron_h"])
def test_an_autoregressive_model_is_told_from_one_of_two_towers(name: str, cli: Cli, tmp_path: Path) -> None:
    """The error has the command that makes two towers of it."""
    folder = tmp_path / "my model"
    save(name, folder)
    for verb in (("generate", "a"), ("bench",)):
        result = cli(*verb, "-m", folder)
        assert_one_line_error(result, "ake one of an autoregressive model: twotower init --from ")
        words = shlex.split(result.err.partition("model: twotower ")[2])
        assert words == ["init", "--from", str(folder), "-o", "DIR"]


def test_an_unknown_pre_tokenizer(cli: Cli, tmp_path: Path) -> None:
    command = ("export", tiny_chat.backbone(), "--to", "gguf", "-o", tmp_path / "out", "--pre-tokenizer")
    result = cli(*command, "nonsense")
    assert_one_line_error(result, "is 'nonsense', which is none of the", "such as llama-bpe, qwen2")
    assert len(result.err) < 250
    assert_one_line_error(cli(*command, "lama-bpe"), "such as llama-bpe")


def test_lines_that_cannot_be_answered(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"question": "a"}) + "\n")
    command = ("bench", "--prompts", file, "--dtype", "float32")
    assert_one_line_error(cli(*command), "no line can be answered; line 1: no 'prompt' that is a string")
    assert_one_line_error(cli(*command, "-c", "64"), "--context is the length of the suite's prompts")
    file.write_text("")
    assert_one_line_error(cli(*command), f"{file}: has no lines; give JSON objects")
