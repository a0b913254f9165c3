"""Writes the weight files of a checkpoint directory, one tensor at a time.

A file's header is written first, because names, shapes and dtypes are known in advance. Each tensor is then made,
written in parts and freed. Tensors that are memory-mapped or on another device therefore need little memory here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor

from twotower.byte_units import parse_bytes
from twotower.errors import ArgumentError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
PART = 2**18  # elements converted and written at a time
FLOATS = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64"}
DTYPE_NAMES = FLOATS | {torch.int32: "I32", torch.int64: "I64"}


@dataclass(frozen=True)
class TensorToWrite:
    """A tensor to write as `dtype`. `make()` returns it, on any device and in any dtype, when it is written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @classmethod
    def of(cls, name: str, shape: tuple[int, ...], tensor: Tensor) -> TensorToWrite:
        """A tensor in memory, written in its own dtype."""
        return cls(name, shape, tensor.dtype, lambda: tensor)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_shards(
    directory: Path,
    to_write: Iterable[TensorToWrite],
    max_shard_size: int | str = "5GB",
    written: Callable[[int], None] = lambda nbytes: None,
) -> list[Path]:
    """Writes one safetensors file, or shards of at most max_shard_size and an index → the files, in order.

    The directory has no weights yet; `replaced_files` gives such a directory. max_shard_size: bytes, or text such as
    "5GB". written(nbytes): called after each tensor.

    Raises:
        ArgumentError: max_shard_size is not a size.
    """
    by_name = {entry.name: entry for entry in to_write}
    most = parse_bytes(max_shard_size)
    if most is None:
        raise ArgumentError(f"max_shard_size is {str(max_shard_size)!r}; give bytes above 0, or a size such as 5GB")
    plan = split_state_dict_into_shards_factory(
        by_name,
        get_storage_size=lambda entry: entry.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=most,
    )
    for file, names in plan.filename_to_tensors.items():
        write_file(directory / file, [by_name[name] for name in names], written)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return [directory / file for file in plan.filename_to_tensors]


def stale_weights(directory: Path, new: set[str]) -> list[Path]:
    """The weight files in a directory that new files of these names make obsolete."""
    found = [*directory.glob("model-*-of-*.safetensors"), directory / INDEX_FILE, directory / SINGLE_FILE]
    return [file for file in found if file.name not in new]


def write_file(file: Path, to_write: list[TensorToWrite], written: Callable[[int], None]) -> None:
    """Writes a file in safetensors format: header length (8 bytes), header (JSON), tensors without gaps."""
    to_write = sorted(to_write, key=lambda entry: (-entry.dtype.itemsize, entry.name))  # widest first, for alignment
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for entry in to_write:
        end = at + entry.nbytes
        header[entry.name] = {
            "dtype": DTYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [at, end],
        }
        at = end
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with file.open("wb") as out:
        out.write(len(head).to_bytes(8, "little") + head)
        for entry in to_write:
            values = entry.make().detach()
            assert tuple(values.shape) == entry.shape, entry
            for part in values.flatten().split(PART):
                out.write(part.to("cpu", entry.dtype).view(torch.uint8).numpy().data)
            written(entry.nbytes)
