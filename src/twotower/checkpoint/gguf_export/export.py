"""`twotower export --to gguf`: the context tower of a checkpoint as a GGUF file, and a Modelfile for Ollama."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from twotower.checkpoint.convert import counter
from twotower.checkpoint.export import ExportResult
from twotower.checkpoint.gguf_export import limits
from twotower.checkpoint.gguf_export.architectures import Architecture, architecture_of
from twotower.checkpoint.gguf_export.metadata import model_keys
from twotower.checkpoint.gguf_export.modelfile import NAME as MODELFILE
from twotower.checkpoint.gguf_export.modelfile import modelfile
from twotower.checkpoint.gguf_export.rotation import Value, rotation_keys
from twotower.checkpoint.gguf_export.source import ContextTower, open_context
from twotower.checkpoint.gguf_export.tensors import ExportedTensor, exported_tensors
from twotower.checkpoint.gguf_export.tokenizer import TokenizerKeys, tokenizer_keys
from twotower.checkpoint.gguf_export.writer import FileTensor, write_file
from twotower.checkpoint.gguf_file import SUFFIX, require_package
from twotower.checkpoint.output_folder import FolderKind, check_apart, check_target, unfinished_folder
from twotower.errors import ArgumentError, CheckpointError

FileDtype = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]
# Dtype → its number in `general.file_type` (llama.cpp's `llama_ftype`).
DTYPES: dict[FileDtype, int] = {
    "f32": 0,
    "f16": 1,
    "bf16": 32,
    "q8_0": 7,
    "q5_1": 9,
    "q5_0": 8,
    "q4_1": 3,
    "q4_0": 2,
}
_BLOCK = 32  # values of a row that share a scale
_QUANTISATION_VERSION = 2  # of the layout of blocks
FOLDER = FolderKind("a GGUF export", MODELFILE, (f"*{SUFFIX}", MODELFILE))
_TABLES = ("token_embd.weight", "output.weight")  # at least 8 bits


@dataclass(frozen=True)
class _Contents:
    """What is written: the metadata, the tensors, the tokenizer, and notes for the user."""

    architecture: Architecture
    keys: dict[str, Value]
    tensors: list[FileTensor]
    tokenizer: TokenizerKeys
    notes: tuple[str, ...]


def export_gguf(
    source: str | Path,
    directory: str | Path,
    *,
    dtype: FileDtype = "f16",
    pre_tokenizer: str | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ExportResult:
    """Writes the context tower of a checkpoint with two towers or one, a directory or a hub id, as a GGUF file.

    dtype: of the matrices; vectors, routers and convolutions are fp32. pre_tokenizer: llama.cpp's name of the
    tokenizer's pre-tokenizer; None: it is recognised. overwrite: whether to replace an export in `directory`.
    progress(done, total): bytes, called after each part of a tensor. An unfinished export is in `<directory>.partial`.

    Raises:
        TwoTowerError: the package `gguf` is not installed.
        ConfigError, CheckpointError: the source is not valid, or llama.cpp does not compute its model or tokenizer.
        ArgumentError: an unknown dtype, a directory that may not be replaced, or not enough disk space.
    """
    folder = Path(directory)
    if dtype not in DTYPES:
        raise ArgumentError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}", param="dtype")
    if folder.suffix == SUFFIX:
        raise ArgumentError(
            f"{folder}: the output is a directory with a GGUF file and a Modelfile; give {folder.with_suffix('')}"
        )
    require_package()
    target = check_target(folder, overwrite, FOLDER)
    tower = open_context(source, "twotower export")
    check_apart(folder, target, tower.origin)
    name = _name(source)
    made = _contents(tower, name, dtype, pre_tokenizer)
    file = f"{name}-{dtype}{SUFFIX}"
    total = sum(tensor.nbytes for tensor in made.tensors)
    chat = "tokenizer.chat_template" in made.tokenizer.keys
    text = modelfile(file, made.tokenizer.ends, tower.defaults.sampling(), chat)
    with unfinished_folder(folder, overwrite, total, FOLDER) as unfinished:
        written = counter(total, progress)
        write_file(unfinished / file, made.architecture.name, made.keys, made.tensors, written)
        (unfinished / MODELFILE).write_text(text, encoding="utf-8")
    return ExportResult(
        source=str(source),
        directory=folder,
        architecture=made.architecture.name,
        parameters=sum(math.prod(shape) for shape in tower.shapes().values()),
        bytes=total,
        files=(file, MODELFILE),
        notes=made.notes,
    )


def _name(source: str | Path) -> str:
    """The name of the model in the file and of the file: the last part of the source."""
    return Path(source).resolve().name if Path(source).is_dir() else str(source).rpartition("/")[2]


def _contents(tower: ContextTower, name: str, dtype: FileDtype, pre_tokenizer: str | None) -> _Contents:
    config, spec = tower.config, tower.model.spec
    architecture = architecture_of(config, spec)
    limits.check(spec, architecture)
    own, notes = model_keys(spec, architecture)
    rotation, divisors, more = rotation_keys(config, spec, architecture)
    if tower.tokenizer is None:
        raise CheckpointError(
            f"{tower.origin}: has no tokenizer.json, and a GGUF file needs a tokenizer; put it beside config.json"
        )
    ends = tower.defaults.eos_or(getattr(config, "eos_token_id", None))
    described = tokenizer_keys(
        tower.tokenizer,
        spec.vocab_size,
        bos=getattr(config, "bos_token_id", None),
        ends=[] if ends is None else [ends] if isinstance(ends, int) else list(ends),
        mask=config.mask_token_id if tower.two_towers else None,
        pre_tokenizer=pre_tokenizer,
    )
    tensors = [_of_tower(tower, tensor, dtype) for tensor in exported_tensors(spec, architecture, tower.shapes())]
    keys: dict[str, Value] = {"general.type": "model", "general.name": name, "general.file_type": DTYPES[dtype]}
    if dtype.startswith("q"):
        keys["general.quantization_version"] = _QUANTISATION_VERSION
    keys |= {f"{architecture.name}.{key}": value for key, value in (own | rotation).items()}
    return _Contents(
        architecture,
        keys | described.keys,
        [*tensors, *(_of_values(name, values) for name, values in divisors.items())],
        described,
        (*tower.notes, *notes, *more, *described.notes, *_notes(tensors, dtype)),
    )


def _notes(tensors: Sequence[FileTensor], dtype: FileDtype) -> Iterator[str]:
    wide = [tensor for tensor in tensors if dtype.startswith("q") and tensor.kind == "F16" and tensor.shape[-1] > 1]
    if wide:
        rows = f"rows of {wide[0].shape[-1]} values are not whole blocks of {_BLOCK}"
        yield f"{len(wide)} matrices are in f16, because their {rows}"


# --- tensors --------------------------------------------------------------------------------------------------------


def _of_tower(tower: ContextTower, tensor: ExportedTensor, dtype: FileDtype) -> FileTensor:
    kind = dtype
    if tensor.exact:
        kind = "f32"
    elif dtype.startswith("q"):
        if tensor.name in _TABLES:
            kind = "q8_0"
        if tensor.shape[-1] % _BLOCK:
            kind = "f16"
    return FileTensor(tensor.name, tensor.shape, kind.upper(), partial(_pieces, tower, tensor))


def _pieces(tower: ContextTower, tensor: ExportedTensor) -> Iterator[Tensor]:
    for part in tensor.parts:
        if part.source is None:
            yield torch.zeros(1).expand(part.shape)
        else:
            change = part.change
            for piece in tower.pieces(part.source):
                yield piece if change is None else change(piece)


def _of_values(name: str, values: np.ndarray) -> FileTensor:
    return FileTensor(name, values.shape, "F32", lambda: iter([torch.from_numpy(values)]))
