"""Writes a GGUF file tensor by tensor: a few rows are in memory in fp32 at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from twotower.checkpoint.gguf_export.rotation import Value
from twotower.errors import CheckpointError

if TYPE_CHECKING:
    from gguf import GGUFWriter

CHUNK = 2**22  # values that are converted at a time: 16 MiB in fp32


@dataclass(frozen=True)
class FileTensor:
    """A tensor to write. kind: ggml's name of its dtype. pieces: its values, which follow each other, as any floats."""

    name: str
    shape: tuple[int, ...]
    kind: str
    pieces: Callable[[], Iterator[Tensor]]

    @property
    def nbytes(self) -> int:
        """The bytes of the tensor in the file."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        values, size = GGML_QUANT_SIZES[GGMLQuantizationType[self.kind]]
        return math.prod(self.shape) // values * size


def write_file(
    path: Path,
    architecture: str,
    keys: Mapping[str, Value],
    tensors: Sequence[FileTensor],
    written: Callable[[int], None],
) -> None:
    """Writes metadata and tensors. written(nbytes): called after each part of a tensor.

    Raises:
        CheckpointError: a value does not fit into the dtype of the file.
        OSError: the file cannot be written.
    """
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(path, architecture)
    try:
        for name, value in keys.items():
            _add_key(writer, name, value)
        for tensor in tensors:
            kind = GGMLQuantizationType[tensor.kind]
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None
        file = writer.fout[0]
        for tensor in tensors:
            writer.write_padding(file, file.tell())
            _write_tensor(file, tensor, written)
        writer.write_padding(file, file.tell())
    finally:
        writer.close()


def _add_key(writer: GGUFWriter, name: str, value: Value) -> None:
    if isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, int):
        writer.add_uint32(name, value)
    elif isinstance(value, float):
        writer.add_float32(name, value)
    elif isinstance(value, str):
        writer.add_string(name, value)
    else:
        writer.add_array(name, value)


def _write_tensor(file: IO[bytes], tensor: FileTensor, written: Callable[[int], None]) -> None:
    count = 0
    for piece in tensor.pieces():
        rows = piece.reshape(-1, tensor.shape[-1])
        step = max(1, CHUNK // tensor.shape[-1])
        for start in range(0, len(rows), step):
            data = _encoded(rows[start : start + step], tensor)
            file.write(data.data)
            written(data.nbytes)
            count += data.nbytes
    assert count == tensor.nbytes, f"{tensor.name}: {count} bytes of {tensor.nbytes}"


def _encoded(rows: Tensor, tensor: FileTensor) -> np.ndarray:
    """Some rows of a tensor as they are in the file."""
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    values = rows.to(torch.float32).contiguous().numpy()
    if tensor.kind == "F32":
        return values
    if tensor.kind != "F16":
        return np.ascontiguousarray(quantize(values, GGMLQuantizationType[tensor.kind]))
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    if not np.isfinite(half).all() and np.isfinite(values).all():
        largest = float(np.abs(values).max())
        raise CheckpointError(
            f"{tensor.name} has the value {largest:.6g}, which float16 cannot hold; export with --dtype bf16"
        )
    return half
