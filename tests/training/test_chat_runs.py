"""Runs on conversations: `twotower train`, and `twotower pretrain --from` on models of other families."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import tiny_chat
import tiny_run
import torch
from safetensors.torch import load_file
from test_resume import assert_same_end, steps_logged
from test_train_cli import complaint
from test_two_processes import deviation, difference, run_two
from tiny_backbones import slow_but
from tiny_run import column, launch, log, run_cli
from transformers import AutoModelForCausalLM, AutoTokenizer

from twotower import TwoTowerForCausalLM

SHORT = ("--row-length", "128", "--checkpoint-every", "2", "--validate-every", "5")


@cache
def data() -> Path:
    mixed = [*tiny_chat.chats(120), *tiny_run.texts(20)]
    return tiny_run.write_data(tiny_run.folder() / "chats.jsonl", mixed)


def fine_tuning(output: Path, *more: str, source: Path | None = None) -> list[str]:
    given = tiny_run.given()._replace(data=data())
    args = given.pretrain(output, "--steps", "10", *SHORT, *more)
    place = args.index("--config")
    del args[place : place + 4]  # and the tokenizer
    return [args[0], "--from", str(source or tiny_chat.backbone()), *args[1:]]


def training(output: Path, *more: str, model: Path | None = None) -> list[str]:
    given = tiny_run.given()._replace(data=data())
    return given.train(output, "--stages", "8:5,4:5", *SHORT, *more, model=model or tiny_chat.two_towers())


@cache
def tuned() -> Path:
    """An uninterrupted run of `pretrain --from`; do not change it."""
    output = tiny_run.folder() / "chat-tuned"
    assert run_cli(fine_tuning(output)) == 0
    return output


@cache
def trained(*more: str) -> Path:
    """An uninterrupted run of `train`; do not change it."""
    output = tiny_run.folder() / f"chat-trained{len(more)}"
    assert run_cli(training(output, *more)) == 0
    return output


# --- pretrain --from -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", slow_but(("llama",), ("llama", "nemotron_h", "qwen3_moe")))
def test_the_result_has_the_layout_of_its_source(name: str, tmp_path: Path) -> None:
    """transformers loads it with the same class, and init makes two towers of it that compute the same logits."""
    source = tiny_chat.backbone(name)
    run = tuned() if name == "llama" else tmp_path / "run"
    if name != "llama":
        assert run_cli(fine_tuning(run, source=source)) == 0
    before, after = load_file(source / "model.safetensors"), load_file(run / "model" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(before[key].dtype == after[key].dtype for key in before)
    assert not any(before[key].equal(after[key]) for key in before if key.endswith("proj.weight"))
    losses = column(run, "loss")
    assert losses[-3:].mean() < losses[:3].mean()
    model = AutoModelForCausalLM.from_pretrained(run / "model").eval()
    assert type(model) is type(AutoModelForCausalLM.from_pretrained(source))
    options = ["--mask-token", "<mask>", "--denoiser", "tower"]
    assert run_cli(["init", "--from", str(run / "model"), "-o", str(tmp_path / "two"), *options]) == 0
    two = TwoTowerForCausalLM.from_pretrained(tmp_path / "two", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    ids = tokenizer.apply_chat_template(tiny_chat.chats(3)[2]["messages"], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(two(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


def test_fine_tuning_continues_after_a_kill(tmp_path: Path) -> None:
    args, output = fine_tuning(tmp_path / "run"), tmp_path / "run"
    assert launch(args, tmp_path / "said").kill_when(lambda: steps_logged(output) >= 3)
    last = launch(args, tmp_path / "said")
    assert last.codes() == [0]
    assert any(line.startswith("resuming after step") for line in last.stderr())
    assert_same_end(output, tuned(), 10)


def test_fine_tuning_in_two_processes(tmp_path: Path) -> None:
    run_two(fine_tuning(tmp_path / "two"), tmp_path / "said")
    assert deviation(tuned(), tmp_path / "two", 10) < 1e-5
    assert difference(tuned(), tmp_path / "two") < 2e-5


def test_a_chat_template_of_the_command_line_is_kept(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    source, file = tiny_chat.backbone("llama", None), tmp_path / "chat.jinja"
    assert "the tokenizer has no chat template" in complaint(fine_tuning(tmp_path / "none", source=source), capfd)
    file.write_text(tiny_chat.MARKED)
    args = fine_tuning(tmp_path / "run", "--chat-template", str(file), "--steps", "1", "--held-out", "0", source=source)
    assert run_cli(args) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    assert tokenizer.chat_template == tiny_chat.MARKED


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--config", "x.json"), "give either --config FILE, to train from scratch, or --from MODEL"),
        (("--vocab-size", "300"), "--vocab-size has no effect with --from"),
        (("--split-digits",), "--split-digits has no effect with --from"),
    ],
)
def test_options_that_do_not_go_with_from(
    options: tuple[str, ...], said: str, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    assert said in complaint(fine_tuning(tmp_path / "run", *options), capfd)


def test_a_two_tower_checkpoint_is_no_source(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    args = fine_tuning(tmp_path / "run", source=tiny_chat.two_towers())
    assert "is a two-tower checkpoint, and --from takes an autoregressive model" in complaint(args, capfd)
    (tmp_path / "model.gguf").write_bytes(b"")
    assert complaint(fine_tuning(tmp_path / "run", source=tmp_path / "model.gguf"), capfd)


# --- train ---------------------------------------------------------------------------------------------------------


def test_a_denoiser_is_trained_on_conversations(tmp_path: Path) -> None:
    """The loss falls, validation has figures, and the log counts the tokens of the texts."""
    run = trained()
    losses = column(run, "loss")
    assert losses[-2:].mean() < losses[:2].mean()
    assert all(record["validation"]["masked_nll"] > 0 for record in log(run) if "validation" in record)
    assert json.loads((run / "settings.json").read_text()).keys().isdisjoint({"messages_field", "chat_template"})


@pytest.mark.parametrize("rank", ["3", pytest.param(None, marks=pytest.mark.slow)])
def test_a_killed_run_ends_as_one_that_was_not(rank: str | None, tmp_path: Path) -> None:
    """With a denoiser tower and with adapters; conversations wait for a row while the run is killed."""
    model = tiny_chat.two_towers("llama", *(() if rank is None else ("--denoiser-lora", rank)))
    args, output, whole = training(tmp_path / "run", model=model), tmp_path / "run", tmp_path / "whole"
    assert run_cli(training(whole, model=model)) == 0
    assert launch(args, tmp_path / "said").kill_when(lambda: steps_logged(output) >= 5)
    last = launch(args, tmp_path / "said")
    assert last.codes() == [0]
    assert any(line.startswith("resuming after step") for line in last.stderr())
    assert_same_end(output, whole, 10)
