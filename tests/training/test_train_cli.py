"""`twotower pretrain` and `twotower train` as commands: every mistake is a one-line error."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import tiny_run
import torch
from safetensors.torch import save_file
from tiny_run import (
    VOCABULARY,
    checkpoints,
    launch,
    log_text,
    model_bytes,
    run_cli,
    texts,
    uninterrupted,
    weights,
    write_data,
)

from twotower.checkpoint.one_tower import read
from twotower.training.data import train_tokenizer

Spoil = Callable[[Path], Sequence[str]]  # a folder for input files → options that take precedence


def complaint(args: Sequence[str], capfd: pytest.CaptureFixture) -> str:
    """The error of a failing command: one line, without a traceback, and nothing on stdout."""
    capfd.readouterr()
    assert run_cli(list(args)) == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("Error: ")
    return lines[0].removeprefix("Error: ")


# --- data, for both verbs ------------------------------------------------------------------------------------------


def with_data(content: str | list[dict[str, str]], *more: str) -> Spoil:
    def spoil(folder: Path) -> Sequence[str]:
        file = folder / "bad.jsonl"
        file.write_text(content if isinstance(content, str) else "".join(json.dumps(r) + "\n" for r in content))
        return "--data", str(file), *more

    return spoil


def options(*more: str) -> Spoil:
    return lambda folder: more


# A mistake → options, and the text of the error.
DATA: dict[str, tuple[Spoil, str]] = {
    "no such file": (options("--data", "/nowhere/data.jsonl"), r"/nowhere/data.jsonl: no such file or folder"),
    "empty": (with_data(""), r"bad.jsonl: contains no records; give a file that is not empty"),
    "blank texts": (with_data([{"text": " "}] * 9, "--held-out", "0"), r"bad.jsonl: contains no usable document"),
    "shorter than a block": (
        with_data([{"text": "a"}] * 4, "--held-out", "0", "--row-length", "256", *("--stages", "256:4")),
        r"bad.jsonl: \d+ tokens in all, less than a block of 256; give more data or smaller blocks",
    ),
    "fewer documents than rows": (
        with_data(texts(3), "--held-out", "0"),
        r"bad.jsonl: 3 documents for the 4 rows of a batch \(at least one a rank\); give more data or a smaller batch",
    ),
    "another field": (with_data([{"body": "a"}] * 200, "--max-bad-records", "9"), r"bad.jsonl.*no field 'text'"),
    "not JSON": (
        with_data("{\n" * 200, "--max-bad-records", "9"),
        r"bad.jsonl: 10 bad records, 9 are .* line 10: broken JSON",
    ),
    "not JSON, within the limit": (
        with_data("{\n" * 9),
        r"bad.jsonl: contains no usable document; .*; 9 bad records, the first is .*bad.jsonl line 1: broken JSON \(",
    ),
    "one record, and it is broken": (
        with_data("{", "--held-out", "0"),
        r"contains no usable document; .*; 1 bad record, the first is .*bad.jsonl line 1: broken JSON \(",
    ),
    "the mask token": (
        with_data([*texts(20), {"text": "so <mask> it"}] * 9, "--held-out", "0"),
        r"bad.jsonl line \d+: its text contains the mask token \(id 3\)",
    ),
    "no validation file": (options("--validation", "/nowhere/v.jsonl"), r"/nowhere/v.jsonl: no such file or folder"),
    "too few to hold any out": (
        with_data(texts(8), "--held-out", "0.0001"),
        r"no held-out documents; .*train without validation \(--held-out 0\)",
    ),
}
NUMBERS: dict[str, tuple[Spoil, str]] = {
    "rows of no whole blocks": (
        options("--row-length", "100"),
        r"row_length is 100, not a multiple of the block size (16|32); give (112|128)",
    ),
    "a rate beyond reason": (options("--lr", "3"), r"learning rate is 3.0; give a number between 0 and 1"),
    "no rate": (options("--lr", "0"), r"learning rate is 0.0"),
    "a share above one": (options("--decay", "2"), r"decay is 2.0; give a fraction from 0 to 1"),
    "all held out": (options("--held-out", "1"), r"held_out is 1.0; give a share from 0 up to 1"),
    "negative clipping": (options("--clip", "-1"), r"clip is -1.0; give 0 or more"),
    "no rows": (options("--batch-size", "0"), r"Invalid value for '--batch-size': 0 is not in the range x>=1"),
    "no number": (options("--batch-size", "x"), r"Invalid value for '--batch-size'"),
    "unknown option": (options("--rosw", "4"), r"No such option '?--rosw'?"),
    "unknown dtype": (options("--dtype", "int8"), r"Invalid value for '--dtype'"),
}
if not torch.cuda.is_available():
    NUMBERS["no GPU"] = options("--device", "cuda"), r"device is cuda, but torch finds no GPU; use --device cpu"


# --- the model, for `train` ----------------------------------------------------------------------------------------


def with_model(change: Callable[[Path], object]) -> Spoil:
    """The good checkpoint with a change."""

    def spoil(folder: Path) -> Sequence[str]:
        copy = folder / "changed"
        shutil.copytree(tiny_run.given().model, copy)
        change(copy)
        return "MODEL", str(copy)

    return spoil


def set_config(**values: object) -> Callable[[Path], object]:
    def change(copy: Path) -> None:
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(config | values))

    return change


ORDINARY = tiny_run.tokenizer()("Ada and Bo went home.")["input_ids"][-2]  # occurs in most texts


def larger_tokenizer(copy: Path) -> None:
    many = [" ".join(record["text"] for record in texts(300))]
    train_tokenizer(many, VOCABULARY + 9).save(str(copy / "tokenizer.json"))


def without(name: str) -> Callable[[Path], object]:
    return lambda copy: (copy / name).unlink()


def drop_tensor(copy: Path) -> None:
    kept = weights(copy)
    del kept["denoiser_tower.norm_f.weight"]
    save_file(kept, copy / "model.safetensors")


def cut_weights(copy: Path) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


MODEL: dict[str, tuple[Spoil, str]] = {
    "no such model": (options("MODEL", "/nowhere/model"), r"/nowhere/model: no such directory"),
    "a file": (lambda folder: ("MODEL", str(tiny_run.given().data)), r"data.jsonl is a file; give the directory"),
    "no config": (with_model(without("config.json")), r"config.json: no such file"),
    "no weights": (with_model(without("model.safetensors")), r"changed: has neither model.safetensors nor"),
    "cut weights": (with_model(cut_weights), r"model.safetensors: not a complete safetensors file"),
    "a tensor less": (with_model(drop_tensor), r"denoiser_tower.norm_f.weight is missing"),
    "another shape": (with_model(set_config(intermediate_size=40)), r"has shape .*; the config expects"),
    "an unknown type": (with_model(set_config(model_type="llama")), r"model_type is 'llama'"),
    "no tokenizer": (
        with_model(lambda copy: [without(name)(copy) for name in ("tokenizer.json", "tokenizer_config.json")]),
        r"changed: contains no tokenizer; put the backbone's tokenizer.json beside the weights",
    ),
    "a damaged tokenizer": (
        with_model(lambda copy: (copy / "tokenizer.json").write_text('{"version": 1')),
        r"changed/tokenizer.json: not readable as JSON",
    ),
    "another tokenizer": (
        with_model(larger_tokenizer),
        rf"the tokenizer has ids up to {VOCABULARY + 8}, but the model's vocabulary is 0 to {VOCABULARY - 1}",
    ),
    "a mask that texts contain": (
        with_model(set_config(mask_token_id=ORDINARY)),
        r"line \d+: its text contains the mask",
    ),
    "a mask beyond the vocabulary": (
        with_model(set_config(mask_token_id=VOCABULARY)),
        r"mask_token_id is 301; it must be a token",
    ),
    "a mask that ends texts": (with_model(set_config(mask_token_id=2)), r"eos_token_id and mask_token_id are both 2"),
    "a backbone": (
        lambda folder: ("MODEL", str(uninterrupted("pretrain") / "model")),
        r"has no context_tower.\* tensors, so it is a one-tower model",
    ),
}
COURSE: dict[str, tuple[Spoil, str]] = {
    f"stages {text}": (options("--stages", text), rf"stages are '{text}'; give BLOCK:STEPS,…, like 32:1000,16:2000")
    for text in ("32", "32:0", "0:5", "a:b", "32:8,,16:4", "32:8:1", "-32:8", "32:8;16:4")
} | {
    "a loss of a frozen tower": (options("--ar-weight", "0.5"), r"ar_weight has no effect on a frozen context tower"),
    "a negative weight": (options("--ar-weight", "-1", "--tie"), r"ar_weight is -1.0; give 0 or more"),
    "unknown noise": (options("--noise", "pink"), r"Invalid value for '--noise'"),
}
FOR_TRAIN = DATA | NUMBERS | MODEL | COURSE


def train_args(output: Path, more: Sequence[str]) -> list[str]:
    """The arguments of `train`. In more, `MODEL PATH` sets the model; `--data` and `--validation` replace the data."""
    args, rest = tiny_run.given().train(output), list(more)
    while rest:
        name, value = rest[:2] if len(rest) > 1 and not rest[1].startswith("--") else (rest[0], None)
        del rest[: 1 if value is None else 2]
        if name == "MODEL":
            args[1] = str(value)
        elif name in args and value is not None:
            args[args.index(name) + 1] = value
        else:
            args += [name] if value is None else [name, value]
    return args


@pytest.mark.parametrize(("spoil", "expected"), FOR_TRAIN.values(), ids=FOR_TRAIN)
def test_a_wrong_train_command_is_told_in_one_line(
    spoil: Spoil, expected: str, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    said = complaint(train_args(tmp_path / "run", spoil(tmp_path)), capfd)
    assert re.search(expected, said), said
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert not (tmp_path / "run" / "model").exists()


def test_an_output_that_cannot_be_made(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    (tmp_path / "afile").touch()
    said = complaint(train_args(tmp_path / "afile/run", []), capfd)
    assert said == f"{tmp_path / 'afile/run'}: {tmp_path / 'afile'} is a file; choose another directory"


def test_a_corrected_command_works_in_the_same_directory(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """After errors that are found early and late, the result is that of a fresh directory."""
    output = tmp_path / "run"
    mistakes = (
        "a rate beyond reason", "no such file", "fewer documents than rows", "the mask token",
        "too few to hold any out", "another tokenizer", "a tensor less", "another shape", "stages 32",
    )  # fmt: skip
    for mistake in mistakes:
        folder = tmp_path / mistake
        folder.mkdir()
        complaint(train_args(output, FOR_TRAIN[mistake][0](folder)), capfd)
    assert run_cli(tiny_run.given().train(output)) == 0
    captured = capfd.readouterr()
    assert captured.out == f"{output / 'model'}\n"
    assert captured.err.splitlines()[-1].startswith(f"next: twotower generate --model {output / 'model'}")
    assert log_text(output) == log_text(uninterrupted("train"))
    assert model_bytes(output) == model_bytes(uninterrupted("train"))


# --- the backbone, for `pretrain` ----------------------------------------------------------------------------------


def with_config(content: str | dict[str, object]) -> Spoil:
    def spoil(folder: Path) -> Sequence[str]:
        file = folder / "bad-config.json"
        file.write_text(content if isinstance(content, str) else json.dumps(content))
        return "--config", str(file)

    return spoil


def with_tokenizer(content: str) -> Spoil:
    def spoil(folder: Path) -> Sequence[str]:
        file = folder / "bad-tokenizer.json"
        file.write_text(content)
        return "--tokenizer", str(file)

    return spoil


def with_larger_tokenizer(folder: Path) -> Sequence[str]:
    larger_tokenizer(folder)
    return "--tokenizer", str(folder / "tokenizer.json")


GOOD = tiny_run.BACKBONE
BACKBONES: dict[str, tuple[Spoil, str]] = {
    "no such config": (options("--config", "/nowhere/config.json"), r"/nowhere/config.json: no such file"),
    "a config that is not JSON": (with_config("{"), r"bad-config.json: not readable as JSON"),
    "an unknown type": (with_config(GOOD | {"model_type": "llama"}), r"bad-config.json: model_type is 'llama'"),
    "no pattern": (
        with_config({k: v for k, v in GOOD.items() if "pattern" not in k}),
        r"bad-config.json: has no hybrid_override_pattern",
    ),
    "an impossible size": (
        with_config(GOOD | {"num_experts_per_tok": 9}),
        r"bad-config.json: config: num_experts_per_tok is 9 but",
    ),
    "an unknown layer": (with_config(GOOD | {"hybrid_override_pattern": "MX"}), r"bad-config.json: .*'X'"),
    "no such tokenizer": (options("--tokenizer", "/nowhere/tokenizer.json"), r"/nowhere/tokenizer.json: not a token"),
    "a damaged tokenizer": (with_tokenizer('{"version"'), r"bad-tokenizer.json: not a tokenizer.json"),
    "a larger tokenizer": (with_larger_tokenizer, rf"the tokenizer has ids up to {VOCABULARY + 8}, but the model's"),
    "a folder without one": (lambda folder: ("--tokenizer", str(folder)), r"contains no tokenizer"),
    "a small vocabulary": (options("--vocab-size", "20"), r"Invalid value for '--vocab-size'"),
}
FOR_PRETRAIN = DATA | BACKBONES | {name: NUMBERS[name] for name in ("rows of no whole blocks", "a rate beyond reason")}


def pretrain_args(output: Path, more: Sequence[str], own_tokenizer: bool = False) -> list[str]:
    args = [*tiny_run.given().pretrain(output), "--align", "16"]
    if own_tokenizer:
        del args[args.index("--tokenizer") : args.index("--tokenizer") + 2]
    if "--data" in more:
        del args[args.index("--data") : args.index("--data") + 2]
    more = ["--align" if part == "--stages" else part.partition(":")[0] if ":4" in part else part for part in more]
    return [*args, *more]


@pytest.mark.parametrize(("spoil", "expected"), FOR_PRETRAIN.values(), ids=FOR_PRETRAIN)
def test_a_wrong_pretrain_command_is_told_in_one_line(
    spoil: Spoil, expected: str, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    said = complaint(pretrain_args(tmp_path / "run", spoil(tmp_path)), capfd)
    assert re.search(expected, said), said
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_tokenizer_of_a_wrong_command_is_not_kept(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """Commands train a tokenizer and then fail; the corrected command trains a new one, and a backbone."""
    output = tmp_path / "run"
    few = write_data(tmp_path / "few.jsonl", [{"text": "xyzzy plugh"}] * 3)
    complaint(pretrain_args(output, ["--data", str(few), "--held-out", "0"], own_tokenizer=True), capfd)
    too_large = ["--vocab-size", str(VOCABULARY + 1), "--held-out", "0"]
    said = complaint(pretrain_args(output, too_large, own_tokenizer=True), capfd)
    assert said == f"vocab_size is {VOCABULARY + 1}, above the backbone's {VOCABULARY}; give at most that"
    short = ["--steps", "2", "--held-out", "0"]
    assert run_cli(pretrain_args(output, short, own_tokenizer=True)) == 0
    assert run_cli(pretrain_args(tmp_path / "fresh", short, own_tokenizer=True)) == 0
    assert model_bytes(output) == model_bytes(tmp_path / "fresh")
    assert "xyzzy" not in (output / "tokenizer.json").read_text()
    assert read(output / "model").model.config.vocab_size == VOCABULARY


def test_another_config_under_the_same_name_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(GOOD))
    args = pretrain_args(tmp_path / "run", ["--config", str(config), "--steps", "2", "--held-out", "0"])
    assert run_cli(args) == 0
    config.write_text(json.dumps(GOOD | {"hidden_size": 35}))
    assert "contains a run with config.hidden_size 33, and this command has 35" in complaint(args, capfd)


def test_a_run_of_another_model_is_named(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    run, other = uninterrupted("train"), tiny_run.two_towers(tmp_path / "other", "M*-")
    said = complaint(tiny_run.given().train(run, model=other), capfd)
    assert said == (
        f"{run} contains a run of {tiny_run.given().model}, and this command trains {other}; give another directory "
        "with -o, or resume the run with its own model"
    )


@pytest.mark.parametrize("verb", ["train", "pretrain"])
def test_skipped_records_are_named_at_the_end(verb: str, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    data = tmp_path / "some.jsonl"
    lines = [json.dumps(record) for record in texts(12)]
    data.write_text("\n".join(["{", *lines[:4], '{"body": "x"}', "[", *lines[4:]]) + "\n")
    length = ("--steps", "4") if verb == "pretrain" else ("--stages", "16:4")
    args = getattr(tiny_run.given(), verb)(tmp_path / "run", "--held-out", "0", *length)
    args[args.index("--data") + 1] = str(data)
    assert run_cli(args) == 0
    (said,) = [line for line in capfd.readouterr().err.splitlines() if ": skipped " in line]
    assert said.startswith(f"{data}: skipped 3 records: ")
    parts = said.removeprefix(f"{data}: skipped 3 records: ").split("; ")
    assert sorted(part.partition(" (")[0] for part in parts) == sorted(
        [f"2 like {data} line {broken}: broken JSON" for broken in (1, 7) if f"line {broken}: broken" in said]
        + [f"1 like {data} line 6: no field 'text'"]
    )


# --- several processes ---------------------------------------------------------------------------------------------


def test_rows_that_two_processes_cannot_share(tmp_path: Path) -> None:
    launched = launch(train_args(tmp_path / "run", ["--batch-size", "3"]), tmp_path / "said", 2)
    assert launched.codes() == [2, 2]
    for rank in range(2):
        assert launched.stderr(rank) == ["Error: a batch of 3 rows cannot be shared by 2 ranks; give a multiple of 2"]


@pytest.mark.parametrize("verb", ["train", "pretrain"])
def test_help_is_quick_to_read(verb: str, capfd: pytest.CaptureFixture) -> None:
    assert run_cli([verb, "--help"]) == 0
    shown = capfd.readouterr().out
    for option in (
        "--data",
        "--batch-size",
        "--row-length",
        "--checkpoint-every",
        "--activation-checkpointing",
        "-o, --output RUN",
    ):
        assert option in shown
    assert checkpoints(uninterrupted("train"))  # every example here has such a directory as `-o`
