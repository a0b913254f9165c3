"""Every script of `examples/` runs, in a folder of its own, and prints what it promises."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from bundled_server import bundled_server
from doc_blocks import command_lines, command_problem

from twotower.decoding.unmasking import POLICIES

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
RAY = ("ray_batch",)  # tests/ray_cluster runs it
TESTED = ("generate", "stream", "batch", "serve_client", "train_on_your_text", "commit_policy")
Run = Callable[..., str]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with bundled_server() as address:
        yield address


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Runs one example with its arguments, and returns what it printed."""
    monkeypatch.chdir(tmp_path)

    def call(name: str, *arguments: str) -> str:
        path = EXAMPLES / f"{name}.py"
        monkeypatch.setattr(sys, "argv", [str(path), *arguments])
        runpy.run_path(str(path), run_name="__main__")
        return capsys.readouterr().out

    threads, policies = torch.get_num_threads(), set(POLICIES)
    yield call
    torch.set_num_threads(threads)
    for name in POLICIES.keys() - policies:
        del POLICIES[name]


def test_every_example_is_tested_and_short() -> None:
    paths = sorted(EXAMPLES.glob("*.py"))
    assert sorted(path.stem for path in paths) == sorted(TESTED + RAY)
    assert [path.name for path in paths if path.read_text().count("\n") > 40] == []


def test_the_commands_of_your_own_model_are_valid() -> None:
    """They take minutes, so they are parsed, not run. No prompt of the measurement is trained on."""
    lines = list(command_lines((EXAMPLES / "own_model.sh").read_text("utf-8")))
    own = [line for line in lines if line.startswith("twotower ")]
    assert [line.split()[1] for line in own] == ["init", "generate-data", "train", "curves", "bench"]
    assert [command_problem(line) for line in own] == [None] * 5
    prompts, tests = (
        (EXAMPLES / f"own_model_{name}.jsonl").read_text("utf-8").splitlines() for name in ("prompts", "tests")
    )
    assert not set(prompts) & set(tests)
    assert len(tests) >= 20 == int(own[-1].split("--batches ")[1].split()[0])


def test_generate(run: Run) -> None:
    header, *modes = run("generate", "User: I need a taxi.\nAssistant:").split("--- ")
    assert header == ""
    ar, verified, _ = (mode.split("\n", 1)[1].rsplit("\n    ", 1)[0] for mode in modes)
    assert ar == verified  # exact in fp32


def test_stream(run: Run) -> None:
    out = run("stream", "User: Hello.\nAssistant:")
    assert out.startswith("User: Hello.\nAssistant:")
    assert "denoising passes]" in out


def test_batch(run: Run) -> None:
    *outputs, last = run("batch").splitlines()
    assert [line.split()[:2] for line in outputs[:3]] == [["0", "ar"], ["1", "verified"], ["2", "diffusion"]]
    assert outputs[0].split(maxsplit=3)[3] == outputs[1].split(maxsplit=3)[3]  # exact in fp32
    assert last.startswith("8 requests")


def test_serve_client(run: Run, server: str) -> None:
    pytest.importorskip("openai")
    reply, *completion = run("serve_client", f"http://{server}/v1").splitlines()
    assert reply
    assert completion


def test_train_on_your_text(run: Run) -> None:
    out = run("train_on_your_text")
    assert "The context tower reads the prompt" in out
    assert Path("runs/your-text/log.jsonl").exists()


def test_commit_policy(run: Run) -> None:
    lines = run("commit_policy").splitlines()
    assert [line.split(":")[0] for line in lines] == ["threshold 0.8", "pairs 0.7", "pairs 0.5"]
    assert all("128 tokens in" in line for line in lines)
