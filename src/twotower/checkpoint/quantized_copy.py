"""Writes a quantised copy of a two-tower checkpoint, one tensor at a time (`twotower quantize`).

The files are those that `from_pretrained(…, quantization=plan)` and `save_pretrained` would write, bit for bit, without
the model in memory. A calibration may round the int4 weights of layers instead.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from twotower.checkpoint import names, pretrained, reader, tokenizer_files
from twotower.checkpoint.convert import CALIBRATED, counter
from twotower.checkpoint.names import SCALE, TensorEntry
from twotower.checkpoint.output_folder import check_target, unfinished_folder
from twotower.checkpoint.quantize import quantization_of, quantize_
from twotower.checkpoint.reader import StoredTensor
from twotower.checkpoint.source import resolve_source
from twotower.checkpoint.stored_quantization import refuse_quantized, stored_dtype_of, stored_entries, stored_piece
from twotower.checkpoint.writer import write_shards
from twotower.config import TwoTowerConfig, errors_of
from twotower.errors import ArgumentError
from twotower.model.fp32_tensors import named_tensors, target_dtype
from twotower.model.towers import TwoTowerModel
from twotower.ops.reference import int4, int8
from twotower.quantization import QuantizationPlan


class Calibration(Protocol):
    """Rounds weights with inputs that a text gives them."""

    def __call__(self, origin: Path, made: TwoTowerModel, folder: Path) -> Mapping[str, Path]:
        """Writes int4 data of weights into safetensors files of `folder` → name of each weight in memory, and its file.

        origin: the checkpoint's directory. made: the quantised model, on the meta device. The data of a weight are as
        in `ops.reference.int4`. Weights that are not named are rounded to nearest.
        """


@dataclass(frozen=True, kw_only=True)
class QuantizedCopy:
    """Facts of a written checkpoint. source_bytes, bytes: of all tensors. calibrated: the number of such weights."""

    source: str
    directory: Path
    quantization: str
    source_bytes: int
    bytes: int
    calibrated: int
    files: tuple[str, ...]

    def to_dict(self) -> dict[str, object]:
        """The fields as plain data for `--json`."""
        return asdict(self) | {"directory": str(self.directory)}


def quantize_checkpoint(
    source: str | Path,
    directory: str | Path,
    plan: QuantizationPlan | str,
    *,
    dtype: torch.dtype | str = "auto",
    calibration: Calibration | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> QuantizedCopy:
    """Writes a quantised copy of a two-tower checkpoint, a directory or a hub id.

    plan: as `QuantizationPlan.parse` reads it. dtype: of the tensors that are not quantised, as in `from_pretrained`.
    Tokenizer, chat template and generation config go along. overwrite: whether to replace a checkpoint in `directory`.
    progress(done, total): bytes, called after each tensor. An unfinished checkpoint is in `<directory>.partial`.

    Raises:
        ConfigError, CheckpointError: the source is not a valid two-tower checkpoint, or its weights are quantised.
        ArgumentError: a plan without effect, a directory that may not be replaced, or not enough disk space.
    """
    schemes = QuantizationPlan.parse(plan) if isinstance(plan, str) else plan
    target = check_target(Path(directory), overwrite)
    origin = resolve_source(source, {})
    if origin.resolve() == target or target in origin.resolve().parents:
        raise ArgumentError(f"{directory}: the directory contains the source checkpoint; choose another directory")
    config = TwoTowerConfig.read(origin)
    refuse_quantized(config, origin, "twotower quantize")
    with torch.device("meta"), errors_of(origin / "config.json"):
        known = names.tensor_entries(TwoTowerModel(config))
        made = quantize_(TwoTowerModel(config), schemes)
    if quantization_of(made) == "none":
        raise ArgumentError(f"the plan {str(schemes)!r} quantises no weight of {source}; choose another scheme")
    found = reader.read_headers(origin)
    reader.check(origin, found, known, known, config)
    others = pretrained._dtype(dtype, config) or reader._stored_dtype(found[reader.embeddings(known).disk])
    made.to(others)
    memory = dict(named_tensors(made))
    with ExitStack() as files:
        pieces = _Pieces(found, memory, files)
        to_write = [
            reader.tensor_to_write(group, _dtype_on_disk(group[0], memory, others), pieces)
            for group in names.by_tensor_on_disk(stored_entries(made, names.tensor_entries(made))).values()
        ]
        total = sum(entry.nbytes for entry in to_write)
        with unfinished_folder(Path(directory), overwrite, total * (1 if calibration is None else 2)) as folder:
            if calibration is not None:
                (folder / CALIBRATED).mkdir()
                pieces.calibrated = calibration(origin, made, folder / CALIBRATED)
            weights = write_shards(folder, to_write, max_shard_size, counter(total, progress))
            shutil.rmtree(folder / CALIBRATED, ignore_errors=True)
            (folder / pretrained.CODE_FILE).write_text(pretrained.CODE, encoding="utf-8")
            values = json.dumps(pretrained.config_to_write(made), indent=2, sort_keys=True)
            (folder / "config.json").write_text(values + "\n", encoding="utf-8")
            tokenizer_files.copy_model_files(origin, folder)
    return QuantizedCopy(
        source=str(source),
        directory=Path(directory),
        quantization=quantization_of(made),
        source_bytes=sum(_bytes(stored) for stored in found.values()),
        bytes=total,
        calibrated=len(pieces.calibrated),
        files=tuple(file.name for file in weights),
    )


class _Pieces:
    """Makes the pieces of tensors on disk from the source checkpoint. A weight is read and rounded once.

    Its scales are written after its integers. They are kept until then: 1/8 of the int4 integers at most.
    """

    def __init__(self, found: Mapping[str, StoredTensor], memory: Mapping[str, Tensor], files: ExitStack) -> None:
        self.found, self.memory, self.files = found, memory, files
        self.calibrated: Mapping[str, Path] = {}
        self._open: dict[Path, safe_open] = {}
        self._scales: dict[tuple[str, int | None], Tensor] = {}

    def __call__(self, entry: TensorEntry) -> Tensor:
        if entry.part == "_shape" or not entry.part:
            return stored_piece(entry, lambda name: self.memory[name]) if entry.part else self._read(entry)
        key = entry.memory, entry.expert
        if entry.part == SCALE and key in self._scales:
            return self._scales.pop(key)
        rounded = self._rounded(entry)
        if entry.part != SCALE:
            self._scales[key] = stored_piece(replace(entry, part=SCALE), rounded.__getitem__)
        return stored_piece(entry, rounded.__getitem__)

    def _rounded(self, entry: TensorEntry) -> dict[str, Tensor]:
        """The tensors of the weight in a quantised model, by name."""
        if entry.memory in self.calibrated:
            part = self._handle(self.calibrated[entry.memory]).get_slice(entry.memory)
            return {entry.memory: part[:] if entry.expert is None else part[entry.expert]}
        weight = self._read(replace(entry, disk=entry.disk.removesuffix(entry.part)))
        if self.memory[entry.memory].dtype == torch.uint8:
            return {entry.memory: int4.quantize(weight)}
        q, scale = int8.quantize(weight)
        return {entry.memory: q, entry.memory + SCALE: scale}

    def _read(self, entry: TensorEntry) -> Tensor:
        return reader.read_piece(self._handle(self.found[entry.disk].file), entry)

    def _handle(self, file: Path) -> safe_open:
        if file not in self._open:
            self._open[file] = self.files.enter_context(safe_open(file, framework="pt"))
        return self._open[file]


def _dtype_on_disk(entry: TensorEntry, memory: Mapping[str, Tensor], dtype: torch.dtype) -> torch.dtype:
    return stored_dtype_of(entry, memory[entry.memory]) if entry.part else target_dtype(entry.memory, dtype)


def _bytes(stored: StoredTensor) -> int:
    return torch.Size(stored.shape).numel() * stored.torch_dtype.itemsize
