"""A run is resumed after a kill, a damaged checkpoint or a full disk, and ends like an uninterrupted run."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from tiny_run import checkpoints, column, launch, log_text, model_bytes, run_cli, uninterrupted

from twotower.training import checkpoints as saving
from twotower.training import fsdp, trainer
from twotower.training.fsdp import World
from twotower.training.log import LOG_FILE, read_log

STEPS = 22  # steps of every run here; with a checkpoint every 4 steps, the last two are those of 20 and 22


def assert_same_end(interrupted: Path, whole: Path, steps: int = STEPS) -> None:
    """Compares two runs: the same log, byte for byte without timing, and the same model files."""
    assert column(interrupted, "step").tolist() == list(range(1, steps + 1))
    assert log_text(interrupted) == log_text(whole)
    assert model_bytes(interrupted) == model_bytes(whole)


def partial(output: Path) -> list[Path]:
    """Checkpoints that are not finished."""
    return list((output / "checkpoints").glob("*.partial"))


def steps_logged(output: Path) -> int:
    file = output / LOG_FILE
    return file.read_bytes().count(b"\n") if file.exists() else 0


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A run that was killed after its last checkpoint, before its model was written."""
    output = tmp_path / "copy"
    shutil.copytree(uninterrupted("train"), output)
    shutil.rmtree(output / "model")
    return output


@pytest.fixture
def world() -> Iterator[World]:
    yield fsdp.start("cpu")
    fsdp.stop()


# --- kills ---------------------------------------------------------------------------------------------------------


def test_a_run_killed_three_times_ends_as_one_that_was_not(tmp_path: Path) -> None:
    """Killed at a random step, while a checkpoint is written, and at a later random step."""
    args, output = tiny_run.given().train(tmp_path / "run"), tmp_path / "run"
    rng = random.Random(0)
    first, second = rng.randint(2, 6), rng.randint(13, 18)
    assert launch(args, tmp_path / "said").kill_when(lambda: steps_logged(output) >= first)
    assert launch(args, tmp_path / "said").kill_when(lambda: steps_logged(output) >= 8 and bool(partial(output)))
    assert partial(output), "the checkpoint was finished before the kill"
    assert launch(args, tmp_path / "said").kill_when(lambda: steps_logged(output) >= second)
    last = launch(args, tmp_path / "said")
    assert last.codes() == [0]
    assert last.stderr()[0] in ("resuming after step 12", "resuming after step 16")
    assert_same_end(output, uninterrupted("train"))
    assert checkpoints(output) == ["step-00000020", "step-00000022"]  # no unfinished checkpoint


@pytest.fixture
def usual_signals() -> Iterator[None]:
    """The handlers of a program in a terminal; a shell in the background switches SIGINT off."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("usual_signals")
def test_signals_end_a_run_with_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """SIGTERM in step 3 and Ctrl-C in step 10, where no checkpoint is due."""
    output, whole, real = tmp_path / "run", uninterrupted("train"), trainer._step
    signals = {3: signal.SIGTERM, 10: signal.SIGINT}

    def step(*args: Any) -> object:
        record = real(*args)
        if number := signals.get(record["step"]):
            signal.raise_signal(number)
        return record

    monkeypatch.setattr(trainer, "_step", step)
    args = tiny_run.given().train(output)
    with pytest.raises(SystemExit) as ended:
        run_cli(args)
    assert ended.value.code == 143
    assert run_cli(args) == 130
    assert run_cli(args) == 0
    said = capfd.readouterr().err
    for number in signals:
        assert f"stopped after step {number}; the same command resumes the run" in said
        assert f"resuming after step {number}" in said
    assert_same_end(output, whole)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_the_command_of_a_finished_run_does_nothing_new(copy: Path, capfd: pytest.CaptureFixture) -> None:
    """A run killed just before its end writes the model; the same command again writes it again."""
    for _ in range(2):
        assert run_cli(tiny_run.given().train(copy)) == 0
        assert f"resuming after step {STEPS}" in capfd.readouterr().err
        assert_same_end(copy, uninterrupted("train"))


# --- damage --------------------------------------------------------------------------------------------------------


def truncate(folder: Path) -> str:
    file = folder / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-100])
    return "__0_0.distcp is damaged"


def flip(folder: Path) -> str:
    file = folder / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return "__0_0.distcp is damaged"


def lose(name: str, said: str) -> Callable[[Path], str]:
    def losing(folder: Path) -> str:
        (folder / name).unlink()
        return said

    return losing


def cut_manifest(folder: Path) -> str:
    file = folder / "manifest.json"
    file.write_text(file.read_text()[:-9])
    return "manifest.json cannot be read (JSONDecodeError)"


DAMAGES = {
    "truncated weights": truncate,
    "one bit": flip,
    "no manifest": lose("manifest.json", "manifest.json cannot be read (FileNotFoundError)"),
    "no place in the data": lose("rows-0.pt", "rows-0.pt is missing"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_costs_one_interval(
    damage: Callable[[Path], str], copy: Path, capfd: pytest.CaptureFixture
) -> None:
    folder = copy / "checkpoints" / "step-00000022"
    why = damage(folder)
    assert run_cli(tiny_run.given().train(copy)) == 0
    said = capfd.readouterr().err.splitlines()
    assert said[:2] == [f"{folder}: skipped, {why}", "resuming after step 20"]
    assert_same_end(copy, uninterrupted("train"))


@pytest.mark.parametrize("damage", [cut_manifest, lose(".metadata", ".metadata is missing")])
def test_other_damage_is_found(damage: Callable[[Path], str], copy: Path, world: World) -> None:
    folder = copy / "checkpoints"
    why = damage(folder / "step-00000022")
    found, notes = saving.find_intact(folder, world)
    assert found == folder / "step-00000020"
    assert notes == [f"{folder / 'step-00000022'}: skipped, {why}"]


def test_without_a_whole_checkpoint_a_run_starts_over(copy: Path, capfd: pytest.CaptureFixture) -> None:
    for name in checkpoints(copy):
        flip(copy / "checkpoints" / name)
    assert run_cli(tiny_run.given().train(copy)) == 0
    said = capfd.readouterr().err.splitlines()
    assert [line.partition(": ")[2] for line in said[:3]] == [
        "skipped, __0_0.distcp is damaged",
        "skipped, __0_0.distcp is damaged",
        "no intact checkpoint is left; the run starts over",
    ]
    assert_same_end(copy, uninterrupted("train"))


def test_new_checkpoints_are_not_pruned_in_favour_of_later_damaged_ones(copy: Path, world: World) -> None:
    folder = copy / "checkpoints"
    for name in checkpoints(copy):
        flip(folder / name)
    tensors = {"a": torch.arange(3.0)}
    assert saving.latest(folder, 4) is None
    first = saving.save(folder, 4, tensors, {"at": 4}, world)
    assert checkpoints(copy) == [first.name]
    saving.save(folder, 8, tensors, {"at": 8}, world)
    third = saving.save(folder, 12, tensors, {"at": 12}, world)
    assert checkpoints(copy) == ["step-00000008", "step-00000012"]
    assert saving.find_intact(folder, world) == (third, [])
    found = {"a": torch.zeros(3)}
    assert saving.load(third, found, world) == (12, {"at": 12})
    assert found["a"].equal(tensors["a"])


@pytest.mark.parametrize("cut", [1, 2, 30])
def test_a_log_line_cut_short_is_left_out(cut: int, tmp_path: Path) -> None:
    """A line is cut anywhere, also after a brace."""
    lines = [json.dumps({"step": step, "loss": 0.5, "timing": {"seconds": 1.0}}) for step in (1, 2)]
    (tmp_path / LOG_FILE).write_text(lines[0] + "\n" + lines[1][:-cut])
    assert [record["step"] for record in read_log(tmp_path / LOG_FILE)] == [1]


# --- a full disk ---------------------------------------------------------------------------------------------------


def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    """No file may exceed 100 kB: a checkpoint is larger, the log is not."""
    args, output = tiny_run.given().train(tmp_path / "run"), tmp_path / "run"
    kept = output / "checkpoints" / "step-00000004"
    assert launch(args, tmp_path / "said").kill_when(kept.exists)
    full = launch(args, tmp_path / "said", file_limits={0: 100_000})
    assert full.codes() == [2]
    failed = output / "checkpoints" / "step-00000008"
    errors = [line for line in full.stderr() if "step" not in line.partition(":")[0]]
    assert errors == full.stderr()[-1:]
    assert errors[0].startswith(f"Error: {failed}: the checkpoint could not be written (")
    assert f"); the last good one is {kept}; free disk space and give the same command again" in errors[0]
    assert checkpoints(output) == [kept.name]
    assert run_cli(args) == 0
    assert_same_end(output, uninterrupted("train"))


@pytest.mark.parametrize("processes", [1, 2])
def test_a_disk_too_full_for_the_log(processes: int, tmp_path: Path) -> None:
    """Writing the log and TensorBoard's thread fail; the run ends at once with an error."""
    args = tiny_run.given().train(tmp_path / "run", "--tensorboard")
    full = launch(args, tmp_path / "said", processes, file_limits={0: 1500})
    codes = full.codes(60)
    assert codes[0] == 2, full.stderr()
    errors = [line for line in full.stderr() if line.startswith("Error: ")]
    assert len(errors) == 1
    assert "File too large" in errors[0]


def test_a_full_disk_of_one_process_stops_all(tmp_path: Path) -> None:
    """No process waits for a process that failed; all print the same error."""
    args, output = tiny_run.given().train(tmp_path / "run"), tmp_path / "run"
    full = launch(args, tmp_path / "said", 2, file_limits={1: 20_000})
    assert full.codes() == [2, 2]
    for rank in range(2):
        error = full.stderr(rank)[-1]
        assert "step-00000004: the checkpoint could not be written" in error
        assert "there is no earlier one" in error
    assert checkpoints(output) == []


# --- another command in the same directory -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "name", "was", "now"),
    [
        (["--lr", "2e-3"], "lr", "0.001", "0.002"),
        (["--batch-size", "8"], "batch_size", "4", "8"),
        (["--noise", "row"], "noise", "'document'", "'row'"),
        (["--seed", "1"], "seed", "0", "1"),
    ],
)
def test_other_settings_are_refused(
    change: list[str], name: str, was: str, now: str, capfd: pytest.CaptureFixture
) -> None:
    output = uninterrupted("train")
    before = log_text(output), model_bytes(output)
    assert run_cli(tiny_run.given().train(output, *change)) == 2
    assert capfd.readouterr().err == (
        f"Error: {output} contains a run with {name} {was}, and this command has {now}; resume it with the same "
        "command, or give another directory\n"
    )
    assert (log_text(output), model_bytes(output)) == before


def test_settings_that_compute_nothing_may_change(copy: Path) -> None:
    (copy / "checkpoints" / "step-00000022" / "manifest.json").unlink()
    more = ["--checkpoint-every", "1", "--threads", "1", "--tensorboard"]
    assert run_cli(tiny_run.given().train(copy, *more)) == 0
    assert_same_end(copy, uninterrupted("train"))


def test_another_number_of_processes_is_refused(copy: Path, tmp_path: Path) -> None:
    launched = launch(tiny_run.given().train(copy), tmp_path / "said", 2)
    assert launched.codes() == [2, 2]
    for rank in range(2):
        assert launched.stderr(rank) == [
            f"Error: {copy}/checkpoints/step-00000022 was written by 1 processes, and this run has 2; start it with 1"
        ]


def test_a_run_without_a_checkpoint_may_begin_anew(tmp_path: Path) -> None:
    """With another learning rate, after a run that failed at once. Nothing of the failed run is left."""
    output, short = tmp_path / "run", ("--stages", "32:3", "--held-out", "0", "--checkpoint-every", "3")
    stop = launch(tiny_run.given().train(output, "--lr", "0.5"), tmp_path / "said")
    assert stop.kill_when(lambda: steps_logged(output) >= 2)
    assert run_cli(tiny_run.given().train(output, *short)) == 0
    assert column(output, "step").tolist() == [1, 2, 3]
    assert column(output, "lr").max() == 1e-3
    assert json.loads((output / "settings.json").read_text())["lr"] == 1e-3


def test_a_second_run_in_a_directory_is_refused(tmp_path: Path) -> None:
    """The second run said "make room", and the first lost its log. A killed run releases its directory at once."""
    output = tmp_path / "run"
    args = tiny_run.given().train(output)
    first = launch(args, tmp_path / "said")
    while first.running() and steps_logged(output) < 2:
        time.sleep(0.0005)
    os.kill(first.processes[0].pid, signal.SIGSTOP)
    log = (output / "log.jsonl").read_bytes()
    second = launch(args, tmp_path / "second")
    assert second.codes() == [2]
    assert second.stderr() == [
        f"Error: {output} is being written by another process; wait until it ends, or name another output"
    ]
    assert (output / "log.jsonl").read_bytes() == log
    first.kill()
    assert run_cli(args) == 0


# --- in full -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["train", "pretrain"])
@pytest.mark.parametrize("processes", [1, 2])
def test_kills_at_any_moment(verb: str, processes: int, tmp_path: Path) -> None:
    """Twenty kills, at random moments of a run or while a file is written.

    Of two processes, one is killed first and the other shortly after, as torchrun does.
    """
    output, whole = tmp_path / "run", tmp_path / "whole"
    more = ["--generate"] if verb == "train" else []
    args = getattr(tiny_run.given(), verb)(output, *more)
    if verb == "pretrain":  # it also trains its tokenizer
        del args[args.index("--tokenizer") : args.index("--tokenizer") + 2]
    began = time.monotonic()
    reference = launch([str(whole) if arg == str(output) else arg for arg in args], tmp_path / "said", processes)
    assert reference.codes() == [0] * processes
    length = time.monotonic() - began
    rng = random.Random(f"{verb}{processes}")
    kills = 0
    for _ in range(20):
        launched = launch(args, tmp_path / "said", processes)
        if rng.random() < 0.4:
            wait = rng.randint(1, 3)  # kills while a new file is written
            seen: set[Path] = set()

            def writing(seen: set[Path] = seen, wait: int = wait) -> bool:
                seen |= {*output.glob("*.partial"), *partial(output)}
                return len(seen) >= wait

            kills += launched.kill_when(writing)
            continue
        time.sleep(rng.random() * length)
        kills += launched.running()
        launched.kill(rng.randrange(processes))
        launched.codes(timeout=rng.random())
    print(f"\n{verb}, {processes} processes: {kills} kills, {steps_logged(output)} steps logged")
    assert kills >= 3
    last = launch(args, tmp_path / "said", processes)
    assert last.codes() == [0] * processes
    assert_same_end(output, whole)
