"""Recipes: stages that are finished are skipped, and a command that fails ends the program."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from twotower.recipes import small
from twotower.recipes.stages import RecipeStage, run_stages


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


def test_the_stages_of_the_small_model_follow_from_each_other(tmp_path: Path) -> None:
    """Each command reads what an earlier stage or the data has."""
    stages = small.stages(Path("data"), tmp_path, dict.fromkeys(("backbone", "denoiser", "longer"), 1), 1)
    assert [stage.name for stage in stages] == list(small.STAGES)
    known = {tmp_path / name for name in ("suite.jsonl", "shape.json")}
    for stage in stages:
        words = [] if callable(stage.work) else [word.split("=")[0] for word in stage.work]
        own = stage.result.parent if stage.result.name == "model" else stage.result
        read = {Path(word) for word in words if word.startswith(str(tmp_path))} - {own}
        assert read <= known, stage.name
        known.add(stage.result)
