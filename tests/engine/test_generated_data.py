"""`twotower generate-data`: answers of the context tower as training data, and jobs that were killed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_chat
import torch
from command import Result, assert_one_line_error
from tiny_run import launch
from transformers import AutoModelForCausalLM, AutoTokenizer

from twotower.file_lock import exclusive_lock
from twotower.training.data import Source
from twotower.training.data.readers import one_epoch

Cli = Callable[..., Result]
OPTIONS = ("--dtype", "float32", "-n", "12", "--threads", "1")


def prompts(folder: Path, *lines: dict[str, Any] | str) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def conversations(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"{i}. Ada and"} if i % 2 else tiny_chat.chats(count)[i] for i in range(count)]


def test_the_answers_are_those_of_transformers(cli: Cli, tmp_path: Path) -> None:
    """Greedy, from an autoregressive checkpoint and from its two-tower checkpoint: for prompts and conversations."""
    source = tiny_chat.backbone()
    path, out = prompts(tmp_path, *conversations(6)), tmp_path / "out.jsonl"
    result = cli("generate-data", source, "--prompts", path, "-o", out, *OPTIONS)
    assert (result.code, result.out) == (0, "")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    for given, record in zip(conversations(6), records(out), strict=True):
        if "prompt" in given:
            assert record["prompt"] == given["prompt"]
            ids = tokenizer(given["prompt"])["input_ids"]
        else:
            asked = given["messages"][:-1]
            assert record["messages"][:-1] == asked
            ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True)["input_ids"]
        new = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=12)[0, len(ids) :]
        text = tokenizer.decode(new, skip_special_tokens=True)
        assert record.get("text", record.get("messages", [{}])[-1].get("content")) == text
        assert record["finish_reason"] == ("eos" if int(new[-1]) == tokenizer.eos_token_id else "length")
        assert record["new_tokens"] == len(new)
    again = tmp_path / "again.jsonl"
    assert cli("generate-data", tiny_chat.two_towers(), "--prompts", path, "-o", again, *OPTIONS).code == 0
    strip = [{name: value for name, value in record.items() if name != "digest"} for record in records(out)]
    assert [{n: v for n, v in record.items() if n != "digest"} for record in records(again)] == strip


def test_several_samples_differ_and_depend_on_the_seed_alone(cli: Cli, tmp_path: Path) -> None:
    path = prompts(tmp_path, *conversations(4))
    texts = {}
    for name, rows, seed in (("a", "1", "5"), ("b", "7", "5"), ("c", "7", "6")):
        out = tmp_path / f"{name}.jsonl"
        sampling = ("--temperature", "1", "--samples", "3", "--seed", seed, "--rows", rows)
        command = ("generate-data", tiny_chat.backbone(), "--prompts", path, "-o", out, *sampling, *OPTIONS)
        assert cli(*command).code == 0
        texts[name] = out.read_bytes()
    assert texts["a"] == texts["b"] != texts["c"]
    found = records(tmp_path / "a.jsonl")
    assert [record["line"] for record in found] == [1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]
    assert len({json.dumps(record.get("text", record.get("messages"))) for record in found}) == 12


def test_a_killed_job_continues_to_the_same_bytes(cli: Cli, tmp_path: Path) -> None:
    path, out, whole = prompts(tmp_path, *conversations(120)), tmp_path / "out.jsonl", tmp_path / "whole.jsonl"

    def command(target: Path) -> list[str]:
        sampling = ["--temperature", "0.8", "--samples", "2", "--rows", "3"]
        source = str(tiny_chat.backbone())
        return ["generate-data", source, "--prompts", str(path), "-o", str(target), *sampling, *OPTIONS]

    def lines(count: int) -> Callable[[], bool]:
        return lambda: out.exists() and out.read_bytes().count(b"\n") >= count

    assert launch(command(out), tmp_path / "said").kill_when(lines(3))
    assert launch(command(out), tmp_path / "said").kill_when(lines(40))
    before = out.read_bytes().count(b"\n")
    assert 40 <= before <= 240  # all, if the machine is too busy to kill it in time
    with out.open("a") as file:
        file.write('{"line": 99, "di')  # a line that was cut off
    result = cli(*command(out))
    assert result.code == 0
    assert f"{240 - before} lines written, {before} more by an earlier run" in result.err
    assert cli(*command(whole)).code == 0
    assert out.read_bytes() == whole.read_bytes()


def test_the_records_are_training_data(cli: Cli, tmp_path: Path) -> None:
    path, out = prompts(tmp_path, *conversations(6)), tmp_path / "out.jsonl"
    assert cli("generate-data", tiny_chat.backbone(), "--prompts", path, "-o", out, *OPTIONS).code == 0
    found = list(one_epoch(Source(out)))
    assert len(found) == 6
    assert [record.messages is None for record in found] == [False, True] * 3
    assert [record.ends for record in found] == [record["finish_reason"] == "eos" for record in records(out)]


def test_lines_without_a_prompt_are_skipped_and_named(cli: Cli, tmp_path: Path) -> None:
    alone = {"messages": [{"role": "assistant", "content": "x"}]}
    bad = [
        *("nonsense", "[1]", {"text": "x"}, {"prompt": 5}, {"messages": []}, {"messages": [{"content": "x"}]}),
        *(alone, {"prompt": "a" * 900}, {"prompt": "\ud800"}),
    ]
    path, out = prompts(tmp_path, *bad, {"prompt": "Ada", "text": "is left out", "id": 3}), tmp_path / "out.jsonl"
    command = ("generate-data", tiny_chat.backbone(), "--prompts", path, "-o", out, *OPTIONS)
    result = cli(*command)
    assert result.code == 0
    assert "9 lines without a usable prompt; the first is line 1: not JSON" in result.err
    (record,) = records(out)
    assert (record["line"], record["id"], record["prompt"]) == (10, 3, "Ada")
    out.unlink()
    assert_one_line_error(
        cli(*command, "--max-bad-records", "8"), "9 lines without a usable prompt", "line 1: not JSON"
    )
    assert not out.exists()


@pytest.mark.parametrize(
    ("lines", "options", "said"),
    [
        ([{"prompt": "x"}], ("--samples", "2"), "samples is 2, and at temperature 0 all answers"),
        (["", "nonsense"], (), "no line can be answered; line 2: not JSON"),
    ],
)
def test_bad_input(cli: Cli, tmp_path: Path, lines: list[Any], options: tuple[str, ...], said: str) -> None:
    path = prompts(tmp_path, *lines)
    command = ("generate-data", tiny_chat.backbone(), "--prompts", path, "-o", tmp_path / "out", *OPTIONS, *options)
    assert_one_line_error(cli(*command), said)


def test_messages_without_a_template(cli: Cli, tmp_path: Path) -> None:
    path = prompts(tmp_path, *tiny_chat.chats(1))
    command = ("generate-data", tiny_chat.backbone("llama", None), "--prompts", path, "-o", tmp_path / "out", *OPTIONS)
    assert_one_line_error(cli(*command), "the tokenizer has no chat template")


def test_two_jobs_on_one_output(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twotower.file_lock.EXIT_SECONDS", 0.1)
    path, out = prompts(tmp_path, {"prompt": "x"}), tmp_path / "out.jsonl"
    command = ("generate-data", tiny_chat.backbone(), "--prompts", path, "-o", out, *OPTIONS)
    with exclusive_lock(out, out):
        assert_one_line_error(cli(*command), "is being written by another process")
    assert cli(*command).code == 0
