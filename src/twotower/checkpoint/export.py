"""Writes parts of a two-tower checkpoint for other programs: the autoregressive model, or the adapters on it.

The autoregressive model is the context tower. Tensors get their original names and keep their values and dtypes. The
config.json is that of the source, verbatim; for Nemotron-H, whose keys the two-tower config has, it is made from these.
Tensors are copied one by one from memory-mapped files, so the memory need is small for any model. `peft_adapters` has
the format of adapters.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PretrainedConfig

from twotower.checkpoint import names, one_tower, peft_adapters, reader, tokenizer_files
from twotower.checkpoint.convert import counter
from twotower.checkpoint.names import TWO_TOWERS, DiskLayout
from twotower.checkpoint.one_tower_model import refuse_one_tower
from twotower.checkpoint.output_folder import CHECKPOINT, FolderKind, check_apart, check_target, unfinished_folder
from twotower.checkpoint.reader import StoredTensor
from twotower.checkpoint.source import resolve_source
from twotower.checkpoint.stored_quantization import refuse_quantized
from twotower.checkpoint.writer import TensorToWrite, write_shards
from twotower.config import GenericTwoTowerConfig, TwoTowerConfig
from twotower.errors import CheckpointError
from twotower.families import family_of
from twotower.json_text import JsonObject
from twotower.model.towers import TwoTowerModel


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """Facts of written files. bytes: of all tensors. notes: remarks for the user, one sentence each.

    architecture: transformers' class of the autoregressive model. rank: of adapters; None: the model itself.
    """

    source: str
    directory: Path
    architecture: str
    parameters: int
    bytes: int
    files: tuple[str, ...]
    notes: tuple[str, ...]
    rank: int | None = None

    def to_dict(self) -> dict[str, object]:
        """The fields as plain data for `--json`."""
        return asdict(self) | {"directory": str(self.directory)}


def export_one_tower(
    source: str | Path,
    directory: str | Path,
    *,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ExportResult:
    """Writes the context tower of a two-tower checkpoint, a directory or a hub id, as an autoregressive checkpoint.

    Tokenizer, chat template and generation config go along. overwrite: whether to replace a checkpoint in `directory`.
    progress(done, total): bytes, called after each tensor. An unfinished checkpoint is in `<directory>.partial`.

    Raises:
        ConfigError, CheckpointError: the source is not a valid two-tower checkpoint.
        ArgumentError: a directory that may not be replaced, or not enough disk space.
    """
    origin = _origin(source, Path(directory), overwrite)
    refuse_one_tower(origin, "context tower beside a denoiser")
    config = TwoTowerConfig.read(origin)
    refuse_quantized(config, origin, "twotower export")
    with torch.device("meta"):
        model = TwoTowerModel(config)
    found, known = reader.read_headers(origin), names.tensor_entries(model)
    reader.check(origin, found, known, known, config)
    context = dict.fromkeys(entry.disk for entry in known if names.of_context(entry))
    table = found[reader.embeddings(known).disk].torch_dtype
    values, notes = autoregressive_values(model, table)
    with ExitStack() as files:
        to_write = list(_tensors_to_write({name: found[name] for name in context}, _layout(config), files))
        total = sum(entry.nbytes for entry in to_write)
        with unfinished_folder(Path(directory), overwrite, total) as folder:
            weights = write_shards(folder, to_write, max_shard_size, counter(total, progress))
            (folder / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            tokenizer_files.copy_model_files(origin, folder)
            one_tower.read(folder)
    return ExportResult(
        source=str(source),
        directory=Path(directory),
        architecture=(values.get("architectures") or [values["model_type"]])[0],
        parameters=sum(torch.Size(entry.shape).numel() for entry in to_write),
        bytes=total,
        files=tuple(file.name for file in weights),
        notes=tuple(notes),
    )


def export_peft(
    source: str | Path,
    directory: str | Path,
    *,
    base: str | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ExportResult:
    """Writes the adapters of a two-tower checkpoint, a directory or a hub id, in PEFT's format (`peft_adapters`).

    base: the name or path of the autoregressive model, for `adapter_config.json`. overwrite, progress: as in
    `export_one_tower`.

    Raises:
        ConfigError, CheckpointError: the source is not a valid two-tower checkpoint, or its denoiser is a tower.
        ArgumentError: a directory that may not be replaced, or not enough disk space.
    """
    origin = _origin(source, Path(directory), overwrite, peft_adapters.FOLDER)
    refuse_one_tower(origin, "adapters")
    config = TwoTowerConfig.read(origin)
    if config.denoiser.adapters is None or not isinstance(config, GenericTwoTowerConfig):
        raise CheckpointError(
            f"{origin}: its denoiser is a tower of its own, not adapters, so PEFT's format cannot hold it; twotower "
            "init --denoiser-lora makes a model with adapters"
        )
    with torch.device("meta"):
        model = TwoTowerModel(config)
    found = reader.read_headers(origin)
    entries = {entry.memory: entry for entry in names.tensor_entries(model)}
    own = [entry for name, entry in entries.items() if names.of_adapters(name)]
    reader.check_tensors(origin, {n: p for n, p in found.items() if n.startswith("adapters.")}, own, own, config)
    with ExitStack() as files:

        def read(name: str) -> Tensor:
            entry = entries[name]
            return reader.read_piece(files.enter_context(safe_open(found[entry.disk].file, framework="pt")), entry)

        tensors = peft_adapters.tensors_to_write(model, read)
        first = peft_adapters.fingerprint_entry(model)
        known = entries[first].disk in found  # not in a quantised checkpoint
        fingerprint = peft_adapters.weights_fingerprint(read(first)) if known else None
    total = sum(entry.nbytes for _, entry in tensors)
    with unfinished_folder(Path(directory), overwrite, total, peft_adapters.FOLDER) as folder:
        peft_adapters.write_folder(folder, model, tensors, base, fingerprint, counter(total, progress))
    return ExportResult(
        source=str(source),
        directory=Path(directory),
        architecture=_class_name(config.autoregressive),
        parameters=sum(torch.Size(entry.shape).numel() for entry in own),
        bytes=total,
        files=peft_adapters.FOLDER.files,
        notes=tuple(_notes_for_peft(config, base)),
        rank=config.denoiser.adapters.rank,
    )


def _notes_for_peft(config: GenericTwoTowerConfig, base: str | None) -> Iterator[str]:
    if base is None:
        yield "adapter_config.json does not name the autoregressive model; --base NAME adds its name"
    if isinstance(config.backbone.get("text_config"), dict):
        yield "the names are those of the text model, which twotower export --to one-tower writes"
    kind = config.autoregressive.model_type
    if kind in peft_adapters.REFUSED_BY_PEFT:
        yield (
            f"peft itself refuses adapters on out_proj of {kind} models, because their fast kernels skip such "
            "adapters; twotower init --adapters reads these files"
        )


def _origin(source: str | Path, directory: Path, overwrite: bool, kind: FolderKind = CHECKPOINT) -> Path:
    """The directory of the source, if the output may be written."""
    target = check_target(directory, overwrite, kind)
    origin = resolve_source(source, {})
    check_apart(directory, target, origin)
    return origin


def autoregressive_values(model: TwoTowerModel, dtype: torch.dtype) -> tuple[JsonObject, list[str]]:
    """The config.json of the autoregressive model with weights of this dtype, and notes for the user."""
    name = str(dtype).removeprefix("torch.")
    config = model.config
    if not isinstance(config, GenericTwoTowerConfig):
        return one_tower.nemotron_h_values(model, name), []
    values: JsonObject = dict(config.backbone)
    notes: list[str] = []
    if isinstance(config.backbone.get("text_config"), dict):
        notes.append("the source has further parts, such as an image encoder; its text model alone is written")
        values = _text_values(config)
    for key in ("dtype", "torch_dtype"):
        if values.get(key) not in (None, name):
            notes.append(f"{key} was {values[key]} in the source; the weights are {name}")
            values[key] = name
    return values, notes


def _text_values(config: GenericTwoTowerConfig) -> JsonObject:
    """The config.json of the text model of a multimodal source."""
    whole = config.backbone
    values: JsonObject = dict(whole["text_config"])
    for key in ("tie_word_embeddings", "dtype", "torch_dtype", "bos_token_id", "eos_token_id", "pad_token_id"):
        if key in whole:
            values.setdefault(key, whole[key])
    text = config.autoregressive
    values["model_type"] = text.model_type
    values["architectures"] = [_class_name(text)]
    return values


def _class_name(config: PretrainedConfig) -> str:
    """The name of transformers' class of an autoregressive model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    name: str = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]
    return name


def _layout(config: TwoTowerConfig) -> DiskLayout:
    return DiskLayout(*family_of(config).roots[0])


def _tensors_to_write(
    context: dict[str, StoredTensor], layout: DiskLayout, files: ExitStack
) -> Iterator[TensorToWrite]:
    """The tensors of the context tower under their original names, read on demand; `files` keeps the files open."""
    stored_files = sorted({stored.file for stored in context.values()})
    opened = {file: files.enter_context(safe_open(file, framework="pt")) for file in stored_files}

    def read(name: str) -> Tensor:
        tensor: Tensor = opened[context[name].file].get_tensor(name)
        return tensor

    ours = TWO_TOWERS["context"]
    for name, stored in context.items():
        if name.startswith(ours.root):
            original = layout.root + name.removeprefix(ours.root)
        else:
            original = layout.head + name.removeprefix(ours.head)
        yield TensorToWrite(original, stored.shape, stored.torch_dtype, partial(read, name))
