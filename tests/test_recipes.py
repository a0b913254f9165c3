"""Recipes: stages that are finished are skipped, and a command that fails ends the program."""

from __future__ import annotations

import gzip
import json
import shlex
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from types import ModuleType

import pytest
from doc_blocks import command_problem

from twotower.checkpoint.denoiser_choices import DenoiserChoices
from twotower.recipes import ablations, adapters, small, smollm2
from twotower.recipes.chat_prompts import KINDS, SUBJECTS, chat_prompts
from twotower.recipes.stages import RecipeStage, run_stages
from twotower.training.recipe import RecipeChoices


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that would have run; one with the word `fails` ends with code 3."""
    seen: list[list[str]] = []

    def run(command: list[str]) -> subprocess.CompletedProcess[bytes]:
        seen.append(command)
        return subprocess.CompletedProcess(command, 3 if "fails" in command else 0)

    monkeypatch.setattr(subprocess, "run", run)
    return seen


def test_a_finished_stage_is_skipped_unless_it_is_chosen(tmp_path: Path, commands: list[list[str]]) -> None:
    made: list[str] = []
    stages = [
        RecipeStage("text", tmp_path / "text", lambda: made.append("text")),
        RecipeStage("train", tmp_path / "model", ["train", "x"], parallel=True),
        RecipeStage("init", tmp_path / "start", ["init", "x"]),
    ]
    (tmp_path / "text").touch()
    run_stages(stages, (), processes=2)
    assert made == []
    assert [command[-2:] for command in commands] == [["train", "x"], ["init", "x"]]
    assert "torch.distributed.run" in commands[0]
    assert commands[1] == [sys.executable, "-m", "twotower", "init", "x"]
    run_stages(stages, ("text",), processes=1)
    assert made == ["text"]
    assert len(commands) == 2


def test_a_command_that_fails_ends_the_recipe(tmp_path: Path, commands: list[list[str]]) -> None:
    stages = [RecipeStage("one", tmp_path / "a", ["fails"]), RecipeStage("two", tmp_path / "b", ["info"])]
    with pytest.raises(SystemExit) as ended:
        run_stages(stages, (), processes=1)
    assert ended.value.code == 3
    assert len(commands) == 1


@pytest.mark.parametrize("recipe", [small, adapters], ids=["small", "adapters"])
def test_the_stages_of_a_bundled_model_follow_from_each_other(tmp_path: Path, recipe: ModuleType) -> None:
    """Each command reads what an earlier stage or the data has, and its options exist."""
    stages = recipe.stages(Path("data"), tmp_path, dict.fromkeys(recipe.STEPS, 1), 1)
    assert [stage.name for stage in stages] == list(recipe.STAGES)
    known = {tmp_path / name for name in ("suite.jsonl", "json.jsonl", "shape.json")}
    for stage in stages:
        words = [] if callable(stage.work) else [word.split("=")[0] for word in stage.work]
        own = stage.result.parent if stage.result.name == "model" else stage.result
        read = {Path(word) for word in words if word.startswith(str(tmp_path))} - {own}
        assert read <= known, stage.name
        assert not words or command_problem(shlex.join(["twotower", *words])) is None
        known.add(stage.result)


def test_the_variants_of_the_ablations_are_valid_commands(tmp_path: Path) -> None:
    """A choice that does not go with another would fail after minutes of training."""
    stages = list(ablations.stages(Path("data"), tmp_path, 9, 1))
    assert [stage.name for stage in stages if stage.result.name == "eval.json"] == list(ablations.VARIANTS)
    for stage in stages:
        if not callable(stage.work):
            assert command_problem(shlex.join(["twotower", *stage.work])) is None, stage.work
    folders = {ablations.folder(tmp_path, name) for name in ablations.VARIANTS}
    assert len(folders) == len(ablations.VARIANTS)
    for variant in ablations.VARIANTS.values():
        words = iter(variant.init)
        choices = {name.removeprefix("--").replace("-", "_"): value for name, value in zip(words, words, strict=True)}
        rank = choices.get("denoiser_lora")
        DenoiserChoices.of_options(defaultdict(lambda: None, choices)).config(None if rank is None else int(rank))
        words = iter(variant.train)
        options = dict(zip(words, words, strict=True))
        RecipeChoices(
            recipe=options.get("--recipe"), patterns=options.get("--patterns"), targets=options.get("--targets")
        ).resolve(gated=variant.rates is ablations.GATED_RATES)


def test_the_table_of_ablations_has_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = ablations.folder(tmp_path, "rank 8")
    own.mkdir()
    found = [
        {"setting": name, "tokens_per_pass": {"overall": passes}, "against_ar": {"overall": {"kept": [0.985, 0.9, 1]}}}
        for name, passes in zip(ablations.MEASURED, (3.456, 2.345), strict=True)
    ]
    (own / "eval.json").write_text(json.dumps({"settings": found}))
    monkeypatch.setattr(ablations, "_trained", lambda model: 123_456)
    assert list(ablations.table(tmp_path))[2:] == ["| rank 8 | 0.12 M | 3.46 | 2.35 | 98.5% |"]


@pytest.fixture
def corpora(tmp_path: Path) -> Path:
    """Data sets of a few records, in the form that `chat_prompts` reads."""
    dialogue = "\n".join(["User: I want a room.", "Assistant: Where?", "User: In Paris.", "Assistant: For when?"] * 2)
    story = "Once there was a cat. It was red. It had a hat. It ran. " * 40
    sets: dict[str, list[dict[str, str]]] = {
        "sgd_dialogues": [{"text": f"User: number {number}.\n{dialogue}"} for number in range(30)],
        "gsm8k_train": [{"question": f"What is {number} and 1?"} for number in range(30)],
        "tinystories_cased": [{"text": story}] * 9,
        "mbpp_train": [{"text": '"""\nWrite a function to add.\nassert add(1, 2) == 3\n"""\ndef add(a, b): ...'}] * 9,
        "fairytales": [{"text": story}],
        "english_novels": [{"text": story}],
    }
    for name, records in sets.items():
        (tmp_path / "data" / name).mkdir(parents=True)
        with gzip.open(tmp_path / "data" / name / "train.jsonl.gz", "wt", encoding="utf-8") as lines:
            lines.writelines(json.dumps(record) + "\n" for record in records)
    return tmp_path / "data"


def test_the_prompts_of_a_chat_model(corpora: Path) -> None:
    """Every kind has its number of prompts, in an order that depends on the seed alone, and no field is left open."""
    counts = {"suite": 24, "json": 10, "gsm8k": 40, "broad": 50}
    found = list(chat_prompts(corpora, counts, 1))
    assert found == list(chat_prompts(corpora, counts, 1)) != list(chat_prompts(corpora, counts, 2))
    texts: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for record in found:
        (turn,) = record["messages"]  # type: ignore[misc]
        texts[str(record["kind"])].append(turn["content"])
    assert {kind: len(own) for kind, own in texts.items()} == counts | {"gsm8k": 30}  # there are no more questions
    assert not any("{}" in text or "=>" in text or "assert" in text for own in texts.values() for text in own)
    assert all("JSON" in text and text.count("\n") == 5 for text in texts["json"])
    for words in ("Write a Python function to add.", "Continue this story: Once there was a cat. It was red."):
        assert words in texts["broad"]
    assert any(subject in text for subject in SUBJECTS for text in texts["broad"])


def test_the_stages_for_smollm2_follow_from_each_other(
    tmp_path: Path, corpora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No prompt for the figures is trained on, and every command has valid options."""
    monkeypatch.setattr(smollm2, "weights", lambda: tmp_path / "weights.gguf")
    monkeypatch.setattr(smollm2, "COUNTS", {"suite": 24, "json": 10, "gsm8k": 20, "broad": 50})
    monkeypatch.setattr(smollm2, "HELD_OUT", 40)
    stages = smollm2.stages(corpora, tmp_path, {"adapters": 9, "drafter": 9}, 1)
    assert [stage.name for stage in stages] == list(smollm2.STAGES)
    smollm2.write_prompts(corpora, tmp_path)
    training = set((tmp_path / "prompts.jsonl").read_text().splitlines())
    for kind in KINDS:
        own = (tmp_path / f"{kind}.jsonl").read_text().splitlines()
        assert own
        assert not training & set(own)
    seen: list[list[str]] = []
    monkeypatch.setattr(smollm2, "run_twotower", lambda command, stdout=None: seen.append(command) or "{}")
    smollm2.answer(tmp_path)
    smollm2.measure(tmp_path)
    seen += [list(stage.work) for stage in stages if not callable(stage.work)]
    assert len(seen) == len(KINDS) + 7
    for command in seen:
        assert command_problem(shlex.join(["twotower", *command])) is None, command
    assert json.loads((tmp_path / "figures.json").read_text()) == {"adapters": {}, "drafter": {}}
