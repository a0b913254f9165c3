"""Opens the records of a source: with random access (`Records`) or as a stream (`Stream`)."""

from __future__ import annotations

import copy
import json
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Protocol

from twotower.errors import ArgumentError, TwoTowerError, install_command
from twotower.training.data.files import (
    PARQUET,
    LineFiles,
    LineStream,
    RawRecord,
    RecordIterator,
    find_files,
    reject_json_array,
)

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset


class Records(Protocol):
    """Records with random access."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> RawRecord: ...


class Table:
    """The records of a map-style `datasets.Dataset`."""

    def __init__(self, dataset: Dataset, name: str) -> None:
        self.dataset, self.name = dataset, name

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, number: int) -> RawRecord:
        return RawRecord(f"{self.name} record {number}", self.dataset[number])


class DatasetStream:
    """The records of a `datasets.IterableDataset`, in its order. It can be read any number of times."""

    def __init__(self, dataset: IterableDataset, name: str) -> None:
        self.dataset, self.name = dataset, name

    def read(self, state: str = "") -> RecordIterator:
        """Iterates from the beginning, or from the state of an earlier iterator."""
        return _DatasetIterator(self, state)


class _DatasetIterator:
    def __init__(self, stream: DatasetStream, state: str) -> None:
        self.name, self.number = stream.name, 0
        self._dataset = copy.deepcopy(stream.dataset)  # iterators of one dataset share their position
        if state:
            self.number, place = json.loads(state)
            self._dataset.load_state_dict(place)
        self._rows = iter(self._dataset)

    def next(self) -> RawRecord | None:
        try:
            row = next(self._rows, None)
        except Exception as error:  # errors of the network or of a parser
            raise TwoTowerError(f"{self.name}: reading failed ({_one_line(error)})") from error
        if row is None:
            return None
        self.number += 1
        return RawRecord(f"{self.name} record {self.number - 1}", row)

    def state(self) -> str:
        return json.dumps([self.number, self._dataset.state_dict()])


Stream = LineStream | DatasetStream


def open_records(
    data: object,
    *,
    name: str,
    split: str | None,
    config: str | None,
    streaming: bool,
    fields: Sequence[str],
    cache_dir: str | Path | None,
) -> Records | Stream:
    """Opens data by path, hub id or as an object of `datasets`. fields: columns to keep; the data has one of the first
    two.

    Raises:
        ArgumentError: the data cannot be opened, is empty, or lacks both required fields.
    """
    if not isinstance(data, str):
        return _wrap(data, name, fields)
    path = Path(data).expanduser()
    if not path.exists():
        return _wrap(_open_hub(data, split, config, streaming, cache_dir), name, fields)
    if config is not None:
        raise ArgumentError(f"{name}: local data has no configurations; leave out @{config}")
    if path.is_dir() and ((path / "state.json").exists() or (path / "dataset_dict.json").exists()):
        return _wrap(_open_saved(path, split, streaming), name, fields)
    paths = find_files(path, split)
    if paths[0].suffix in PARQUET:
        cache = str(cache_dir or _temporary_cache())
        found = {"data_files": [str(p) for p in paths], "split": "train", "streaming": streaming}
        return _wrap(_load(data, "parquet", **found, cache_dir=cache), name, fields)
    for file in paths:
        if ".json" in file.suffixes:
            reject_json_array(file)
    if streaming:
        return LineStream(paths, name)
    lines = LineFiles(paths)
    if not len(lines):
        raise ArgumentError(f"{name}: contains no records; give a file that is not empty")
    return lines


def _temporary_cache() -> Path:
    """The cache for converted local files, in the temporary folder: the home folder may be read-only."""
    user = os.getuid() if hasattr(os, "getuid") else os.environ.get("USERNAME", "")
    return Path(tempfile.gettempdir()) / f"twotower-datasets-{user}"


def _open_hub(
    data: str, split: str | None, config: str | None, streaming: bool, cache_dir: str | Path | None
) -> Dataset | IterableDataset:
    looks_local = data.startswith(("/", ".", "~")) or Path(data).suffix in (
        ".jsonl",
        ".json",
        ".txt",
        ".gz",
        ".parquet",
    )
    if looks_local or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", data):
        raise ArgumentError(f"{data}: no such file or folder; give a path that exists, or a hub data set as OWNER/NAME")
    cache = None if cache_dir is None else str(cache_dir)
    return _load(data, data, name=config, split=split or "train", streaming=streaming, cache_dir=cache)


def _load(shown: str, *args: str, **options: object) -> Dataset | IterableDataset:
    with quiet() as datasets:
        try:
            loaded: Dataset | IterableDataset = datasets.load_dataset(*args, **options)
            return loaded
        except Exception as error:  # errors of `datasets`, the hub, fsspec and pyarrow
            raise ArgumentError(
                f"{shown}: cannot be loaded ({_one_line(error)}); give a local path, or a hub data set as OWNER/NAME"
                "[:SPLIT][@CONFIG]"
            ) from error


def _open_saved(path: Path, split: str | None, streaming: bool) -> Dataset | IterableDataset:
    with quiet() as datasets:
        saved = datasets.load_from_disk(str(path))
    if isinstance(saved, dict):
        if (split or "train") not in saved:
            raise ArgumentError(f"{path}: no split {split or 'train'!r}; it has {', '.join(saved)}")
        saved = saved[split or "train"]
    elif split is not None:
        raise ArgumentError(f"{path}:{split}: the saved data set has no splits; leave out :{split}")
    found: Dataset | IterableDataset = saved.to_iterable_dataset() if streaming else saved
    return found


def _wrap(dataset: object, name: str, fields: Sequence[str]) -> Table | Stream:
    """Selects the columns that are read: decoding others (images, for example) costs time."""
    with quiet() as datasets:
        if not isinstance(dataset, datasets.Dataset | datasets.IterableDataset):
            raise ArgumentError(f"{name}: not a Dataset or IterableDataset of `datasets`; give one of its splits")
        chosen, columns = dataset, dataset.column_names
        if columns is not None:
            if not set(fields[:2]) & set(columns):
                raise ArgumentError(
                    f"{name}: no field {fields[0]!r}; it has {', '.join(columns)}; give one of them as text_field"
                )
            chosen = dataset.select_columns([field for field in dict.fromkeys(fields) if field in columns])
        if isinstance(chosen, datasets.IterableDataset):
            return DatasetStream(chosen, name)
        if not len(chosen):
            raise ArgumentError(f"{name}: contains no records; give data that is not empty")
        return Table(chosen.with_format(None), name)


@contextmanager
def quiet() -> Iterator[ModuleType]:
    """Imports the package `datasets` and silences its progress bars and messages in a `with` block."""
    try:
        import datasets
    except ImportError:
        raise TwoTowerError(f"this data needs the package `datasets`: {install_command('train')}") from None
    bars = datasets.are_progress_bars_disabled()
    level = datasets.utils.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity_error()
    try:
        yield datasets
    finally:
        datasets.utils.logging.set_verbosity(level)
        if not bars:
            datasets.enable_progress_bars()


def _one_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]
