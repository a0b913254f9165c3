"""The directory that `twotower init` and `export` write: it appears as a whole, and replaces its own kind only."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from twotower.byte_units import format_bytes
from twotower.checkpoint import atomic, pretrained, tokenizer_files, writer
from twotower.errors import ArgumentError
from twotower.file_writes import output_errors

UNFINISHED = ".unfinished"  # marks an unfinished directory, which may be removed
SPARE_BYTES = 64 * 2**20  # headers, index, tokenizer
_FILES = ("config.json", "model*.safetensors", writer.INDEX_FILE, pretrained.CODE_FILE, *tokenizer_files.PATTERNS)


@dataclass(frozen=True)
class FolderKind:
    """What a directory is called, the file that shows its kind, and patterns of all its files."""

    words: str
    marker: str
    files: tuple[str, ...]


CHECKPOINT = FolderKind("a checkpoint", "config.json", _FILES)


def check_target(directory: Path, overwrite: bool, kind: FolderKind = CHECKPOINT) -> Path:
    """The absolute path of a directory to which a checkpoint, or files of another kind, may be written.

    Raises:
        ArgumentError: it is a file, or is not empty; with `overwrite`, if it contains more than files of the kind.
    """
    with output_errors(directory):
        target = directory.resolve()
        if target.exists() and not target.is_dir():
            raise ArgumentError(f"{directory} is a file; choose a directory")
        atomic.restore_folder(target)
        inside = sorted(target.iterdir()) if target.exists() else []
    if inside and not overwrite:
        raise ArgumentError(f"{directory} is not empty; choose another directory, or replace it with --overwrite")
    folders = [path for path in inside if path.is_dir() and path.name != tokenizer_files.TEMPLATE_FOLDER]
    if inside and (target / kind.marker not in inside or folders):
        raise ArgumentError(
            f"{directory} is not just {kind.words} (it has folders, or no {kind.marker}); remove it or choose another"
        )
    known = {path for pattern in kind.files for path in target.glob(pattern)}
    others = [path for path in sorted(target.rglob("*")) if path not in known and path.is_file()]
    if others:
        raise ArgumentError(
            f"{directory} has {others[0].relative_to(target)}, which is not a file of {kind.words}, and --overwrite "
            "would delete it; move the file elsewhere, or choose another directory"
        )
    return target


def check_apart(directory: Path, target: Path, origin: Path) -> None:
    """Raises ArgumentError if the directory of the output contains the source. target: as `check_target` returns it."""
    if origin.resolve() == target or target in origin.resolve().parents:
        raise ArgumentError(f"{directory}: the directory contains the source checkpoint; choose another directory")


@contextmanager
def unfinished_folder(directory: Path, overwrite: bool, size: int, kind: FolderKind = CHECKPOINT) -> Iterator[Path]:
    """A temporary directory; it is renamed to `directory` on success and removed on failure.

    size: of the files in bytes.

    Raises:
        ArgumentError: the disk is full, or the directory cannot be written or has changed.
    """
    target = directory.resolve()
    folder = target.with_name(target.name + ".partial")
    if folder.exists() and not (folder / UNFINISHED).exists():
        raise ArgumentError(f"{folder} exists and is not an unfinished conversion; remove it")
    shutil.rmtree(folder, ignore_errors=True)
    try:
        with output_errors(directory):
            folder.mkdir(parents=True)
            (folder / UNFINISHED).touch()
            free = shutil.disk_usage(folder).free
            if free < size + SPARE_BYTES:
                raise ArgumentError(
                    f"{directory}: {format_bytes(free)} are free on its disk, but the checkpoint needs "
                    f"{format_bytes(size + SPARE_BYTES)}; free some space, or choose another directory"
                )
            yield folder
            (folder / UNFINISHED).unlink()
            check_target(directory, overwrite, kind)  # again: the conversion may have taken hours
            atomic.replace_folder(folder, target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
