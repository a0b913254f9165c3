"""Settings of a whole process (malloc's thresholds, number of CPU threads), and which programs change them."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command import Result, assert_one_line_error

import twotower
from twotower import allocator, options, process
from twotower.process import ONE_THREAD_BELOW, configure_process, fit_threads_to_model

SOURCE = Path(twotower.__file__).parent
# Programs, which call `configure_process`. All other modules are a library, and leave these settings to the caller.
PROGRAMS = {
    "cli/lm_eval.py", "cli/model_options.py", "cli/quantize.py", "cli/train.py",
    "evaluation/held_out.py", "recipes/small.py", "recipes/ablations.py", "recipes/stages.py", "recipes/page_trace.py",
    "cli/batch_run.py", "ray/predictor.py", "ray/replica.py",  # the programs of a cluster
}  # fmt: skip


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Records the numbers of threads that are set, without setting them."""
    counts: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", counts.append)
    monkeypatch.setattr(process, "_fit_threads", False)
    return counts


def callers(name: str) -> set[str]:
    """The source files that mention a function."""
    found = set()
    for file in SOURCE.rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        nodes = list(ast.walk(tree))
        names = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
        names |= {node.id for node in nodes if isinstance(node, ast.Name)}
        if name in names:
            found.add(str(file.relative_to(SOURCE)))
    return found


def test_only_programs_configure_the_process() -> None:
    assert callers("mallopt") == {"allocator.py"}
    assert callers("keep_large_blocks") == {"process.py"}
    assert callers("set_num_threads") == {"process.py"}
    assert callers("configure_process") == PROGRAMS


def test_threads_fit_a_small_model_unless_a_number_is_given(threads: list[int]) -> None:
    fit_threads_to_model(1)
    assert threads == []  # a library: this process is not configured
    configure_process()
    fit_threads_to_model(ONE_THREAD_BELOW)
    assert threads == []
    fit_threads_to_model(ONE_THREAD_BELOW - 1)
    assert threads == [1]
    configure_process(threads=3)
    fit_threads_to_model(1)
    assert threads == [1, 3]


LIBRARY = """
import torch
from twotower import allocator, bundled_model, model_loading, process
calls = []
allocator.keep_large_blocks = lambda: calls.append("malloc")
torch.set_num_threads(2)
def load():
    model_loading.load_model(bundled_model("small"), context_device="cpu")
    return torch.get_num_threads(), list(calls)
print(load())
process.configure_process()
print(load())
process.configure_process(2)
print(load())
"""


def test_loading_a_model_does_not_change_the_process() -> None:
    done = subprocess.run([sys.executable, "-c", LIBRARY], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["(2, [])", "(1, ['malloc'])", "(2, ['malloc', 'malloc'])"]


@pytest.mark.parametrize(("given", "expected"), [((), [1]), (("--threads", "2"), [2])])
@pytest.mark.parametrize("verb", ["generate", "serve", "bench"])
def test_verbs_that_compute_configure_it(
    verb: str, given: tuple[str, ...], expected: list[int], threads: list[int], cli: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The bundled model is small, so it gets one thread."""
    calls: list[str] = []
    monkeypatch.setattr(allocator, "keep_large_blocks", lambda: calls.append("malloc"))
    monkeypatch.setattr("twotower.server.uvicorn_server.serve_until_signal", lambda service, *_: service.close())
    arguments = {
        "generate": ("User: Hi", "-n", "1", "--mode", "ar"),
        "serve": ("--port", "0", "--rows", "1", "--length", "64"),
        "bench": ("-s", "ar", "-c", "8", "-n", "2", "--batches", "1", "--rounds", "1"),
    }
    result = cli(verb, *arguments[verb], *given)
    assert result.code == 0, result.err
    assert threads == expected
    assert calls == ["malloc"]


@pytest.mark.parametrize(("given", "expected"), [((), []), (("--threads", "2"), [2])])
def test_training_keeps_torchs_threads_unless_a_number_is_given(
    given: tuple[str, ...], expected: list[int], threads: list[int], cli: Callable[..., Result], tmp_path: Path
) -> None:
    missing = str(tmp_path / "missing.jsonl")
    result = cli("train", "bundled", "--data", missing, "-o", tmp_path / "run", "--no-tensorboard", *given)
    assert_one_line_error(result, "missing.jsonl")
    assert threads == expected


def test_a_bad_variable_is_reported_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> options.Options:
        return options.from_environment({"TWOTOWER_PACK": "2"})

    monkeypatch.setattr(options, "current", refuse)
    monkeypatch.setattr(allocator, "keep_large_blocks", lambda: pytest.fail("too late"))
    with pytest.raises(ValueError, match="TWOTOWER_PACK is '2'"):
        configure_process()
