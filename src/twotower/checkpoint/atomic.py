"""Replaces all files of a checkpoint directory: a killed process leaves the old files or the new files.

New files are written into a folder inside the directory and flushed to the disk. Then a list of them is renamed to
`COMMIT`: from this moment the save is complete. The files are moved to their places; `finish_save` does the rest of
the moves if the process was killed before.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from twotower.errors import CheckpointError, TwoTowerError
from twotower.file_writes import sync

FOLDER = ".unfinished-save"
COMMIT = "commit.json"


@contextmanager
def replaced_files(directory: Path, stale: Callable[[set[str]], list[Path]]) -> Iterator[Path]:
    """Yields a folder for the new files of `directory`; at the end they replace files of the same names.

    stale: names of the new files → files of `directory` that they make obsolete, which are removed.

    Raises:
        TwoTowerError: a file cannot be written (a full disk, for example). The directory is then as before.
    """
    folder = directory / FOLDER
    finish_save(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder, ignore_errors=True)  # of a save that was killed
        folder.mkdir()
        yield folder
        files = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
        for name in files:
            sync(folder / name)
        old = [str(file.relative_to(directory)) for file in stale(set(files))]
        partial = folder / f"{COMMIT}.partial"
        partial.write_text(json.dumps({"files": files, "stale": old}), encoding="utf-8")
        sync(partial)
        partial.rename(folder / COMMIT)
        sync(folder)
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise TwoTowerError(
            f"{directory}: the checkpoint cannot be written ({error.strerror or error}); what was there is unchanged. "
            "Free disk space, or choose another directory"
        ) from None
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    finish_save(directory)


def finish_save(directory: Path) -> None:
    """Moves the files of a complete save to their places, if a process was killed while it did so.

    Raises:
        CheckpointError: a file cannot be moved.
    """
    folder = directory / FOLDER
    if not (folder / COMMIT).exists():
        return
    try:
        listed = json.loads((folder / COMMIT).read_text(encoding="utf-8"))
        for name in listed["files"]:
            if (folder / name).exists():
                (directory / name).parent.mkdir(exist_ok=True)
                (folder / name).replace(directory / name)
        for name in listed["stale"]:
            (directory / name).unlink(missing_ok=True)
        sync(directory)
        (folder / COMMIT).unlink()
        shutil.rmtree(folder)
    except FileNotFoundError:  # another process does the same
        return
    except OSError as error:
        raise CheckpointError(
            f"{directory}: a save was interrupted, and its last step failed ({error.strerror or error}); "
            "make the directory writable and load it again"
        ) from None


def replace_folder(new: Path, final: Path) -> None:
    """Gives a complete folder its final name. The folder that had the name is removed last.

    If a process was killed between the two renames, `restore_folder` gives the old folder its name back.
    """
    for file in sorted(new.rglob("*")):
        sync(file)
    sync(new)
    old = _set_aside(final)
    restore_folder(final)
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    new.rename(final)
    sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def restore_folder(final: Path) -> None:
    """Gives a folder its name back that an interrupted `replace_folder` has set aside."""
    if not final.exists() and _set_aside(final).exists():
        _set_aside(final).rename(final)


def _set_aside(final: Path) -> Path:
    return final.with_name(f".{final.name}.replaced")
