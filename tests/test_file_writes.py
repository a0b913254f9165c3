"""Files are replaced as a whole, flushed to the disk before they are renamed; a full disk is one line."""

from __future__ import annotations

import ast
import errno
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import tiny_run

import twotower
from twotower import TwoTowerForCausalLM
from twotower.checkpoint.tokenizer_files import save_tokenizer
from twotower.errors import ArgumentError, TwoTowerError
from twotower.evaluation import sweep
from twotower.file_writes import os_errors, output_errors, replace_text, replaced_file
from twotower.recipes import small as recipe
from twotower.training import trainer
from twotower.training.log import Log

SOURCE = Path(twotower.__file__).parent
# Modules that rename: files that these modules flush, folders, and compiled kernels with a checksum in their name.
RENAMING = {"file_writes.py", "checkpoint/atomic.py", "training/checkpoints.py", "ops/cpu/library.py"}


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """A write beyond `room` bytes of a file fails, with an error of the operating system."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Path]]:
    """The calls of fsync and rename, in order."""
    found: list[tuple[str, Path]] = []
    fsync, replace = os.fsync, Path.replace

    def note_fsync(descriptor: int) -> None:
        found.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}"))))
        fsync(descriptor)

    def note_replace(self: Path, target: Path) -> Path:
        found.append(("rename", Path(target)))
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "replace", note_replace)
    return found


def write_log(folder: Path) -> Path:
    (folder / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    Log(folder, 1, tensorboard=False).close()
    return folder / "log.jsonl"


def write_settings(folder: Path) -> Path:
    assert trainer._begin(folder, {"lr": 1}) is None
    return folder / trainer.SETTINGS_FILE


def write_answers(folder: Path) -> Path:
    sweep._append(folder / "answers.jsonl", {"model": "m"}, {})
    return folder / "answers.jsonl"


def write_problems(folder: Path) -> Path:
    recipe.write_text(folder)
    return folder / "suite.jsonl"


@pytest.mark.parametrize("write", [write_log, write_settings, write_answers, write_problems])
def test_a_file_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, steps: list[tuple[str, Path]], monkeypatch: pytest.MonkeyPatch, write: object
) -> None:
    """After a power failure, a file that was renamed but not flushed is empty."""
    for name in ("PROBLEMS", "HARD_PROBLEMS"):
        monkeypatch.setattr(recipe, name, 3)
    assert callable(write)
    file = write(tmp_path)
    place = steps.index(("rename", file))
    assert steps[place - 1] == ("fsync", file.with_name(f"{file.name}.partial"))
    assert steps[place + 1] == ("fsync", tmp_path)
    assert file.read_text()
    assert not list(tmp_path.glob("*.partial"))


def test_only_few_modules_rename() -> None:
    found = set()
    for file in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            called, of = node.func.attr, ast.unparse(node.func.value)
            of_path = called in ("rename", "replace") and len(node.args) == 1 and of != "dataclasses"
            if of_path or (called in ("rename", "replace", "renames", "move") and of in ("os", "shutil")):
                found.add(str(file.relative_to(SOURCE)))
    assert found == RENAMING


@pytest.mark.parametrize("failure", ["full disk", "Ctrl-C"])
def test_what_cannot_be_written_leaves_the_old_file(tmp_path: Path, failure: str) -> None:
    file = tmp_path / "answers.jsonl"
    replace_text(file, "old")
    if failure == "Ctrl-C":
        with pytest.raises(KeyboardInterrupt), replaced_file(file) as partial:
            _interrupted(partial)
    else:
        words = r"answers\.jsonl: cannot be written \(File too large\); what was there is unchanged\. Free disk space"
        with full_disk(10), pytest.raises(TwoTowerError, match=words):
            replace_text(file, "new" * 10)
    assert [path.name for path in tmp_path.iterdir()] == ["answers.jsonl"]
    assert file.read_text() == "old"


def _interrupted(file: Path) -> None:
    file.write_text("new")
    raise KeyboardInterrupt


def test_a_killed_process_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    replace_text(file, "old")
    if not (child := os.fork()):
        with replaced_file(file) as partial:
            partial.write_text("new")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert file.read_text() == "old"
    replace_text(file, "newer")
    assert [path.name for path in tmp_path.iterdir()] == ["answers.jsonl"]
    assert file.read_text() == "newer"


# --- the tokenizers library -------------------------------------------------------------------------------------------


def large_tokenizer() -> object:
    """A tokenizer whose file is larger than the other files of a tiny checkpoint."""
    made = tiny_run.tokenizer()
    made.add_tokens([f"<word-{number}>" for number in range(4000)])
    return made


def test_an_exception_of_the_library_is_an_error_of_the_system(tmp_path: Path) -> None:
    """It raises a bare Exception."""
    with full_disk(3000), pytest.raises(OSError, match="File too large"):
        save_tokenizer(tiny_run.tokenizer(), tmp_path)
    with pytest.raises(KeyError), os_errors():  # others pass
        raise KeyError("os error 28")


def test_a_disk_that_is_full_at_the_tokenizer_leaves_the_checkpoint(tmp_path: Path) -> None:
    directory = tiny_run.two_towers(tmp_path / "two")
    model = TwoTowerForCausalLM.from_pretrained(directory)
    model.save_pretrained(directory, max_shard_size="50KB")
    before = {file.name: file.read_bytes() for file in directory.iterdir()}
    model.tokenizer = large_tokenizer()
    with full_disk(100_000), pytest.raises(TwoTowerError, match=r"cannot be written \(File too large\).* unchanged"):
        model.save_pretrained(directory, max_shard_size="50KB")
    assert {file.name: file.read_bytes() for file in directory.iterdir()} == before
    model.save_pretrained(directory, max_shard_size="50KB")
    assert (directory / "tokenizer.json").stat().st_size > 100_000


def test_a_disk_that_is_full_at_the_tokenizer_of_a_run(tmp_path: Path) -> None:
    command = tiny_run.given().pretrain(tmp_path / "run", "--vocab-size", "300")
    place = command.index("--tokenizer")
    del command[place : place + 2]
    run = tiny_run.launch(command, tmp_path / "stderr", file_limits={0: 3000})
    assert run.codes() == [2]
    (line,) = [line for line in run.stderr() if not line.startswith("compiling")]
    assert line.startswith(f"Error: {tmp_path / 'run/tokenizer.json'}: cannot be written (File too large); ")
    assert not list((tmp_path / "run").glob("*.partial"))


def test_errors_of_an_output_name_it_and_errors_of_other_files_stay(tmp_path: Path) -> None:
    output = tmp_path / "made"
    for named in (None, output, tmp_path / "made.partial/config.json", tmp_path):
        said = r"made: cannot be written \(No space.*\); free disk space, or choose"
        with pytest.raises(ArgumentError, match=said), output_errors(output):
            raise OSError(errno.ENOSPC, "No space left on device", named)
    for other in (tmp_path / "made-source/tokenizer.json", tmp_path / "source"):
        with pytest.raises(PermissionError), output_errors(output):
            raise PermissionError(errno.EACCES, "Permission denied", other)
