"""Sizes that no machine holds: one line with the size that fits, before any pass."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from command import Result, assert_one_line_error

from twotower import TwoTowerForCausalLM, bundled_model
from twotower.engine import budget

pytestmark = pytest.mark.skipif(
    not bundled_model("small").is_dir(), reason="there is no bundled model in this checkout"
)

Cli = Callable[..., Result]
FP32 = ("--dtype", "float32")


@pytest.fixture(autouse=True)
def no_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    for verb in ("extend", "denoise"):
        monkeypatch.setattr(TwoTowerForCausalLM, verb, lambda *_, **__: pytest.fail("a pass ran"))


@pytest.mark.parametrize("mode", ["diffusion", "verified", "auto"])
def test_block_size_beyond_the_window(cli: Cli, mode: str) -> None:
    result = cli("generate", "User: hello", "--mode", mode, "--block-size", "100000", *FP32)
    assert_one_line_error(result, "block_size is 100000; give at most 4096, the context window")


def test_block_size_beyond_the_free_memory(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """The named size is accepted."""
    monkeypatch.setattr(budget, "available_memory", lambda: 30_000_000)
    monkeypatch.setattr(budget, "ALWAYS_FREE", 0)
    result = cli("generate", "User: hello", "--block-size", "4000", *FP32)
    assert_one_line_error(result, "block_size 4000 takes about 0.0 GiB for logits, and 0.0 GiB are free; give at most ")
    most = result.err.split("at most ")[1].strip()
    assert most == "2441"
    with pytest.raises(pytest.fail.Exception, match="a pass ran"):
        cli("generate", "User: hello", "--block-size", str(int(most) // 2), *FP32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--rows", "100000000"), r"100000000 rows of 4096 tokens, .* GiB are free on cpu; give at most \d+ rows"),
        (("--memory", "1000000"), r"memory is 1000000\.0 GiB, and .* GiB are free on cpu; give at most \d+\.\d"),
    ],
)
def test_a_server_whose_states_do_not_fit(cli: Cli, options: tuple[str, ...], message: str) -> None:
    result = cli("serve", "--port", "0", *options, *FP32)
    assert_one_line_error(result, "Error: ")
    assert re.search(message, result.err), result.err


def test_a_line_of_a_batch(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(json.dumps({"prompt": "x", "block_size": 100_000}) + "\n")
    result = cli("batch", tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl", *FP32)
    assert result.code == 1
    assert json.loads((tmp_path / "out.jsonl").read_text())["error"] == (
        "block_size is 100000; give at most 4096, the context window"
    )
