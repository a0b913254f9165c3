"""Files that are replaced as a whole, and the exceptions of native libraries that write files."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from twotower.errors import ArgumentError, TwoTowerError


@contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """Yields the path of a new file, NAME.partial. At the end the file is flushed to the disk and renamed to `path`.

    A killed process leaves the old file or the new one. Two processes must not write one file at a time.

    Raises:
        TwoTowerError: the file cannot be written (a full disk, for example). The old one is unchanged.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        yield partial
        sync(partial)
        partial.replace(path)
        sync(path.parent)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise TwoTowerError(
            f"{path}: cannot be written ({error.strerror or error}); what was there is unchanged. Free disk space, or "
            "choose another place"
        ) from None
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def replace_text(path: Path, text: str) -> None:
    """Replaces a file by UTF-8 text; see `replaced_file`."""
    with replaced_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def sync(path: Path) -> None:
    """Flushes a file or a folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def output_errors(directory: Path) -> Iterator[None]:
    """Converts errors of the operating system about an output directory to one line about the path that was given.

    Raises:
        ArgumentError: the directory, or a file in it, cannot be made or written.
    """
    try:
        yield
    except OSError as error:
        target, named = directory.resolve(), Path(error.filename or directory).resolve()
        written = (target, target.with_name(f"{target.name}.partial"))
        if not (target.is_relative_to(named) or any(named.is_relative_to(folder) for folder in written)):
            raise  # of another file, such as one that is copied
        file = next((part for part in (directory, *directory.parents) if part.is_file()), None)
        if file is not None:
            raise ArgumentError(f"{directory}: {file} is a file; choose another directory") from None
        remedy = "free disk space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "make it writable"
        raise ArgumentError(
            f"{directory}: cannot be written ({error.strerror or error}); {remedy}, or choose another directory"
        ) from None


@contextmanager
def os_errors() -> Iterator[None]:
    """Converts exceptions of native libraries about the operating system to OSError.

    The tokenizers library raises a bare Exception whose message ends with "(os error 28)".
    """
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        found = re.search(r"\(os error (\d+)\)", str(error))
        if found is None:
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number)) from error
