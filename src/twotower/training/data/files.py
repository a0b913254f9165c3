"""Local files as records: lines with random access, read on demand. One broken line is one bad record."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import tempfile
import weakref
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

import numpy as np

from twotower.errors import ArgumentError, TwoTowerError

JSON_LINES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".ndjson", ".ndjson.gz")
TEXT_LINES = (".txt", ".txt.gz")
PARQUET = (".parquet",)
KINDS = ".jsonl, .json, .ndjson, .txt (these also as .gz) or .parquet"

# A word in a file's name assigns it to a split, as in `datasets`.
SPLITS = {"train": "train", "training": "train", "valid": "valid", "validation": "valid", "val": "valid"}
SPLITS |= {"dev": "valid", "test": "test", "eval": "test"}


@dataclass(frozen=True)
class RawRecord:
    """A record before parsing. content: a line of JSON, a line of text (if `plain`), or fields."""

    place: str
    content: bytes | Mapping[str, object]
    plain: bool = False


class RecordIterator(Protocol):
    """Iterates over the records of a stream once."""

    def next(self) -> RawRecord | None:
        """The next record; None at the end.

        Raises:
            TwoTowerError: the record cannot be read.
        """
        ...

    def state(self) -> str:
        """The position in the stream, after at least one record."""
        ...


class LineFiles:
    """The lines of one or more files, with blank lines, so that record i of a single file is its line i + 1.

    Opening reads every file once to find where lines begin (about 1 GB/s, 8 bytes of memory a line). Compressed files
    are unpacked into an unnamed temporary file. For larger data use streaming.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)
        self._unpacked: IO[bytes] | None = None
        edges: list[np.ndarray] = []
        for path in self.paths:
            try:
                edges.append(self._index(path))
            except (OSError, EOFError, zlib.error) as error:
                raise ArgumentError(f"{path}: cannot be read ({error}); check that the file is complete") from None
        self._edges = edges  # per file: offset of each line, then of the end of the last line
        self._first = np.cumsum([0, *(len(edge) - 1 for edge in edges)])

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, number: int) -> RawRecord:
        file = int(np.searchsorted(self._first, number, side="right")) - 1
        line = number - int(self._first[file])
        start, end = map(int, self._edges[file][line : line + 2])
        path = self.paths[file]
        if self._unpacked is not None and path.suffix == ".gz":
            return line_record(path, line, _read(self._unpacked, start, end))
        with path.open("rb", buffering=0) as source:  # a folder may have too many files to keep all open
            return line_record(path, line, _read(source, start, end))

    def _index(self, path: Path) -> np.ndarray:
        if path.suffix != ".gz":
            with path.open("rb") as source:
                return _line_edges(source, 0)
        if self._unpacked is None:
            self._unpacked = tempfile.TemporaryFile()  # noqa: SIM115  (lives as long as this object)
            weakref.finalize(self, self._unpacked.close)
        out = self._unpacked
        start = out.seek(0, os.SEEK_END)
        with gzip.open(path) as source:
            shutil.copyfileobj(source, out, 1 << 20)
        out.flush()
        out.seek(start)
        return _line_edges(out, start)


def _read(source: IO[bytes], start: int, end: int) -> bytes:
    source.seek(start)
    return source.read(end - start)


def _line_edges(source: IO[bytes], start: int) -> np.ndarray:
    """Offsets of the lines after `start`, and of the end, int64."""
    edges, at = [np.array([start])], start
    while chunk := source.read(1 << 24):
        edges.append(np.flatnonzero(np.frombuffer(chunk, dtype=np.uint8) == 10) + (at + 1))
        at += len(chunk)
    found = np.concatenate(edges)
    return found if found[-1] == at else np.append(found, at)


class LineStream:
    """The lines of files in order, without reading the files first."""

    def __init__(self, paths: Sequence[Path], name: str) -> None:
        self.paths, self.name = list(paths), name

    def read(self, state: str = "") -> RecordIterator:
        """Iterates from the beginning, or from the state of an earlier iterator."""
        return _LineIterator(self, state)


class _LineIterator:
    def __init__(self, stream: LineStream, state: str) -> None:
        self.name, self.paths = stream.name, stream.paths
        at: list[int] = json.loads(state) if state else [0, 0, 0]
        self.file, self.line, self.offset = at
        self._lines = self._read()

    def next(self) -> RawRecord | None:
        try:
            return next(self._lines, None)
        except (OSError, EOFError, zlib.error) as error:
            raise TwoTowerError(f"{self.name}: reading failed ({error}); check that the file is complete") from None

    def state(self) -> str:
        return json.dumps([self.file, self.line, self.offset])

    def _read(self) -> Iterator[RawRecord]:
        while self.file < len(self.paths):
            path = self.paths[self.file]
            with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as source:
                source.seek(self.offset)
                for content in source:
                    self.line, self.offset = self.line + 1, self.offset + len(content)
                    yield line_record(path, self.line - 1, content)
            self.file, self.line, self.offset = self.file + 1, 0, 0


def line_record(path: Path, number: int, line: bytes) -> RawRecord:
    """The record of line `number` (from 0) of a file."""
    return RawRecord(f"{path} line {number + 1}", line, path.name.endswith(TEXT_LINES))


def find_files(path: Path, split: str | None) -> list[Path]:
    """A file, or the files of a folder sorted by name: all with lines, or all parquet.

    Raises:
        ArgumentError: an unknown file type, an empty folder, several splits, or parquet mixed with other types.
    """
    if path.is_file():
        if split is not None:
            raise ArgumentError(f"{path}:{split}: a file has no splits; leave out :{split}")
        if not path.name.endswith((*JSON_LINES, *TEXT_LINES, *PARQUET)):
            raise ArgumentError(f"{path}: unknown file type; give {KINDS}")
        return [path]
    found = [p for p in sorted(path.rglob("*")) if p.name.endswith((*JSON_LINES, *TEXT_LINES, *PARQUET))]
    found = [p for p in found if p.is_file() and not any(part.startswith(".") for part in p.relative_to(path).parts)]
    by_split: dict[str, list[Path]] = {}
    for file in found:
        by_split.setdefault(_split_of(str(file.relative_to(path))), []).append(file)
    if "" in by_split and "train" not in by_split and len(by_split) > 1:  # "": no word of a split in the name
        by_split["train"] = by_split.pop("")
    if split is not None:
        found = by_split.get(SPLITS.get(split, split), [])
    elif by_split.keys() & {"valid", "test"} and len(by_split) > 1:
        names = ", ".join(f"{path}:{name} ({_some_names(by_split[name])})" for name in sorted(by_split) if name)
        raise ArgumentError(f"{path}: contains several splits; name one: {names}")
    if not found:
        which = f"no {split} files" if split is not None else "no data files"
        raise ArgumentError(f"{path}: contains {which}; give a folder with {KINDS} files")
    if len({file.suffix in PARQUET for file in found}) > 1:
        raise ArgumentError(f"{path}: contains parquet files and other files; give them as two sources")
    return found


def _some_names(files: Sequence[Path]) -> str:
    return files[0].name + (f" and {len(files) - 1} more" if len(files) > 1 else "")


def _split_of(name: str) -> str:
    words = re.split(r"[^a-z0-9]+", name.lower())
    return next((SPLITS[word] for word in words if word in SPLITS), "")


def reject_json_array(path: Path) -> None:
    """Raises ArgumentError for a .json file that is one array, which is not JSON lines."""
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as source:
        if source.read(4096).lstrip()[:1] == b"[":
            raise ArgumentError(f"{path}: is one JSON array; give a .jsonl file with one object a line")
