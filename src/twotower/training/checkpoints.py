"""Checkpoints of a run: torch's distributed checkpoints, written atomically and verified before use.

    RUN/checkpoints/step-00000200/   __<rank>_<n>.distcp, .metadata   parameters and optimizer state, sharded
                                     rows-<rank>.pt                   the position in the data
                                     manifest.json                    size and CRC-32 of every file

A directory whose files do not match its manifest is not a checkpoint. The last two checkpoints are kept: if one is
damaged, the run resumes from the one before.
"""

from __future__ import annotations

import io
import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar, cast

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException  # not an Exception but a BaseException

from twotower.errors import TwoTowerError
from twotower.file_writes import sync
from twotower.process import without_messages
from twotower.training.data.state import LoaderState
from twotower.training.fsdp import World
from twotower.training.old_names import LOADER_STATE, with_present_names

Result = TypeVar("Result")

MANIFEST = "manifest.json"
KEPT = 2


def save(directory: Path, step: int, tensors: dict[str, Tensor], rows: LoaderState, world: World) -> Path:
    """Writes the state after `step` steps. Every process calls it. A killed process leaves a whole checkpoint or none.

    Raises:
        TwoTowerError: the checkpoint cannot be written (a full disk, for example). Earlier checkpoints are unchanged.
    """
    final = directory / f"step-{step:08d}"
    partial = directory / f"{final.name}.partial"

    def begin() -> None:
        if world.is_main:
            directory.mkdir(parents=True, exist_ok=True)
            for unfinished in directory.glob("step-????????.partial"):
                shutil.rmtree(unfinished)
            partial.mkdir()

    def write_tensors() -> None:
        with without_messages("torch.distributed.checkpoint"):
            dcp.save(tensors, checkpoint_id=str(partial))

    def write_rows() -> dict[str, tuple[int, int]]:
        _write(partial / f"rows-{world.rank}.pt", rows)
        return _own_sums(partial, world)

    def finish() -> None:
        if world.is_main:
            sums = {name: entry for part in parts for name, entry in part.items()}
            (partial / MANIFEST).write_text(
                json.dumps({"step": step, "processes": world.size, "files": sums}), encoding="utf-8"
            )
            for file in partial.iterdir():
                sync(file)
            shutil.rmtree(final, ignore_errors=True)  # a damaged checkpoint of the same step
            partial.rename(final)
            sync(directory)

    try:
        _on_all_ranks(begin, world)
        _on_all_ranks(write_tensors, world)
        parts = _on_all_ranks(write_rows, world)
        _on_all_ranks(finish, world)
    except _Failed as failure:
        if world.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        kept = latest(directory, step)
        raise TwoTowerError(
            f"{final}: the checkpoint could not be written ({failure}); "
            + (f"the last good one is {kept}" if kept else "there is no earlier one")
            + "; free disk space and give the same command again"
        ) from None
    if world.is_main:
        for old in set(_all(directory)) - set(_all(directory, step)[-KEPT:]):  # later checkpoints are damaged
            shutil.rmtree(old, ignore_errors=True)
    return final


def latest(directory: Path, step: int) -> Path | None:
    """The last checkpoint of at most `step` steps that has a manifest; its files are not verified."""
    found = [path for path in _all(directory, step) if (path / MANIFEST).exists()]
    return found[-1] if found else None


def find_intact(directory: Path, world: World) -> tuple[Path | None, list[str]]:
    """The last checkpoint whose files all match its manifest, and one line for each damaged checkpoint after it.

    Rank 0 verifies; every process gets the same result.

    Raises:
        TwoTowerError: the checkpoint was written by another number of processes.
    """
    found, notes, problem = None, [], None
    if world.is_main:
        for path in reversed(_all(directory)):
            damage, problem = _damage(path, world.size)
            if damage is None:
                found = path
                break
            notes.append(f"{path}: skipped, {damage}")
        else:
            if notes:
                notes.append(f"{directory}: no intact checkpoint is left; the run starts over")
    found, notes, problem = world.broadcast((found, notes, problem))
    if problem:
        raise TwoTowerError(problem)
    return found, notes


def load(path: Path, tensors: dict[str, Tensor], world: World) -> tuple[int, LoaderState]:
    """Loads a checkpoint into `tensors`. Returns the number of steps done and this process's position in the data.

    Raises:
        TwoTowerError: the checkpoint belongs to another model.
    """
    try:
        with without_messages("torch.distributed.checkpoint"):
            dcp.load(tensors, checkpoint_id=str(path))
    except CheckpointException as error:
        raise TwoTowerError(
            f"{path}: not a checkpoint of this run ({_reason(error)}); give another run directory"
        ) from None
    rows = with_present_names(torch.load(path / f"rows-{world.rank}.pt", weights_only=True), LOADER_STATE)
    return int(json.loads((path / MANIFEST).read_text(encoding="utf-8"))["step"]), cast("LoaderState", rows)


def has_any(directory: Path) -> bool:
    """Whether there is a checkpoint, intact or damaged."""
    return bool(_all(directory))


def _all(directory: Path, step: int = 10**8) -> list[Path]:
    """The checkpoints of at most `step` steps, in order."""
    found = sorted(path for path in directory.glob("step-????????") if path.is_dir())
    return [path for path in found if path.name <= f"step-{step:08d}"]


def _damage(path: Path, processes: int) -> tuple[str | None, str | None]:
    """What is damaged in a checkpoint, or None; and why an intact checkpoint cannot be used here, or None."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        for name, (size, crc) in manifest["files"].items():
            file = path / name
            if not file.is_file():
                return f"{name} is missing", None
            if file.stat().st_size != size or _crc(file) != crc:
                return f"{name} is damaged", None
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__})", None
    if manifest["processes"] != processes:
        return None, (
            f"{path} was written by {manifest['processes']} processes, and this run has {processes}; "
            f"start it with {manifest['processes']}"
        )
    return None, None


def _own_sums(directory: Path, world: World) -> dict[str, tuple[int, int]]:
    """Size and checksum of each file that this process wrote; rank 0 also wrote the metadata."""
    own = (f"__{world.rank}_", f"rows-{world.rank}.") + ((".metadata",) if world.is_main else ())
    files = [file for file in sorted(directory.iterdir()) if file.name.startswith(own)]
    return {file.name: (file.stat().st_size, _crc(file)) for file in files}


class _Failed(Exception):
    """A step of writing failed on some process. The text is the reason."""


def _on_all_ranks(action: Callable[[], Result], world: World) -> list[Result]:
    """Runs an action on every process and gathers the results. If one process fails, all raise, so that none waits.

    Raises:
        _Failed: with the reason of the first failure.
    """
    own: tuple[str | None, list[Result]]
    try:
        own = None, [action()]
    except (Exception, CheckpointException) as error:  # torch wraps an OSError in errors of its own
        own = _reason(error), []
    answers = world.gather(own)
    for reason, _ in answers:
        if reason:
            raise _Failed(reason)
    return [result for _, results in answers for result in results]


def _write(file: Path, state: LoaderState) -> None:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    file.write_bytes(buffer.getbuffer())


def _crc(file: Path) -> int:
    crc = 0
    with file.open("rb") as handle:
        while part := handle.read(1 << 22):
            crc = zlib.crc32(part, crc)
    return crc


def _reason(error: BaseException) -> str:
    """One line: the OSError behind an error, if there is one. torch wraps the errors of a rank."""
    failures = getattr(error, "failures", None)
    if failures:
        inner = next(iter(failures.values()))
        error = inner[0] if isinstance(inner, tuple) else inner
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    error = cause or error
    return (str(error).strip() or type(error).__name__).splitlines()[0]
