"""Recipes: stages that are finished are skipped, and a command that fails ends the program."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from doc_blocks import command_problem

from twotower.recipes import ablations, adapters, small
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
