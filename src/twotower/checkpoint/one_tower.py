"""Reads the checkpoint of an autoregressive model, which becomes one tower."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from twotower.checkpoint import gguf_file, names, pretrained, reader
from twotower.checkpoint.generation_config import GenerationDefaults
from twotower.checkpoint.names import DiskLayout, TensorEntry
from twotower.checkpoint.reader import StoredTensor
from twotower.checkpoint.tokenizer_files import copy_model_files, load_tokenizer, save_tokenizer
from twotower.checkpoint.writer import write_shards
from twotower.config import (
    ARCHITECTURE,
    GENERIC_MODEL_TYPE,
    MODEL_TYPE,
    GenericTwoTowerConfig,
    TwoTowerConfig,
    read_object,
)
from twotower.errors import CheckpointError, ConfigError
from twotower.families import family_of, tower_spec
from twotower.model.towers import TwoTowerModel
from twotower.nemotron_h_fields import NemotronHFields
from twotower.tokenizer import Tokenizer

_EXTRA_HEADS = re.compile(r"(?:^|\.)mtp")  # draft heads of multi-token prediction; the denoiser replaces them
# Keys of config.json that describe the file, its code or the draft heads, not the model.
_DROPPED = {
    "architectures",
    "auto_map",
    "dtype",
    "model_type",
    "mtp_hybrid_override_pattern",
    "mtp_layers_block_type",
    "num_nextn_predict_layers",
    "tie_word_embeddings",
    "torch_dtype",
    "transformers_version",
    "_name_or_path",
}
_OLDER_NAMES = {
    "attention_head_dim": "head_dim",
    "mamba_chunk_size": "chunk_size",
    "mamba_conv_bias": "use_conv_bias",
    "mamba_d_conv": "conv_kernel",
    "mamba_dt_init_floor": "time_step_floor",
    "mamba_dt_limit": "time_step_limit",
    "mamba_dt_max": "time_step_max",
    "mamba_dt_min": "time_step_min",
    "mamba_n_groups": "n_groups",
    "num_local_experts": "n_routed_experts",
}


class Weights(Protocol):
    """The tensors of a checkpoint, read on demand."""

    def dtype(self, entry: TensorEntry) -> torch.dtype:
        """The dtype that the entry's tensor has in a conversion that keeps the dtypes."""

    def read(self, entry: TensorEntry) -> Tensor:
        """The piece of an entry."""


class SafetensorsWeights:
    """Tensors of safetensors files, which stay memory-mapped once opened."""

    def __init__(self, stored: dict[str, StoredTensor]) -> None:
        self._stored = stored
        self._opened: dict[Path, safe_open] = {}

    def dtype(self, entry: TensorEntry) -> torch.dtype:
        return self._stored[entry.disk].torch_dtype

    def read(self, entry: TensorEntry) -> Tensor:
        file = self._stored[entry.disk].file
        if file not in self._opened:
            self._opened[file] = safe_open(file, framework="pt")
        return reader.read_piece(self._opened[file], entry)


@dataclass(frozen=True, kw_only=True)
class OneTowerCheckpoint:
    """A checkpoint whose headers match its config.

    model: the two-tower model of the conversion, on the meta device. places: the entry of each tensor of a tower, by
    its name in memory without the tower, and the number of its expert. copy_files: writes the tokenizer, the chat
    template and the generation config into a directory.
    """

    model: TwoTowerModel
    places: dict[tuple[str, int | None], TensorEntry]
    weights: Weights
    tokenizer: Tokenizer | None
    defaults: GenerationDefaults
    copy_files: Callable[[Path], None]
    notes: tuple[str, ...]


def read(path: Path) -> OneTowerCheckpoint:
    """Reads config and headers of a directory or a GGUF file, but no weights."""
    return _read_gguf(path) if path.suffix == gguf_file.SUFFIX else _read_directory(path)


def _read_gguf(path: Path) -> OneTowerCheckpoint:
    file = gguf_file.GGUFFile(path)
    tokenizer = file.tokenizer()

    def copy_files(target: Path) -> None:
        if tokenizer is not None:
            save_tokenizer(tokenizer, target)

    return OneTowerCheckpoint(
        model=file.model,
        places=_places(file.entries),
        weights=file,
        tokenizer=tokenizer,
        defaults=GenerationDefaults(),
        copy_files=copy_files,
        notes=("the head of each tower is its embedding",) if file.model.spec.tied_head else (),
    )


def _places(entries: Iterable[TensorEntry]) -> dict[tuple[str, int | None], TensorEntry]:
    return {(entry.memory.removeprefix("context."), entry.expert): entry for entry in entries}


def _read_directory(directory: Path) -> OneTowerCheckpoint:
    """Reads config and headers, but no weights.

    Raises:
        ConfigError, CheckpointError: the family is not supported, the config is not valid, a file is damaged, or a
            tensor is missing, unexpected, or of a wrong shape.
    """
    config, tied = _config(directory / "config.json")
    found = reader.read_headers(directory)
    if any(name.startswith("context_tower.") for name in found):
        raise CheckpointError(f"{directory}: already a two-tower checkpoint; no conversion is needed")
    roots = family_of(config).roots
    try:
        root, head = next(r for r in roots if any(name.startswith(f"{r[0]}layers.") for name in found))
    except StopIteration:
        expected = " or ".join(f"{root}layers.*" for root, _ in roots)
        raise CheckpointError(
            f"{directory}: no tensors named {expected}; use the config.json of these weights"
        ) from None
    stored = {name: place for name, place in found.items() if name.startswith((root, f"{head}."))}
    stored = {name: place for name, place in stored.items() if not _EXTRA_HEADS.search(name)}
    with torch.device("meta"):
        model = TwoTowerModel(config)
    needed = names.one_tower_entries(model, DiskLayout(root, head, stored))
    reader.check_tensors(directory, stored, needed, needed, config.stored_pattern)
    return OneTowerCheckpoint(
        model=model,
        places=_places(needed),
        weights=SafetensorsWeights(stored),
        tokenizer=load_tokenizer(directory),
        defaults=GenerationDefaults.read(directory, config.vocab_size),
        copy_files=partial(copy_model_files, directory),
        notes=tuple(_notes(sorted(set(found) - set(stored)), f"{head}.weight" in stored, tied, model.spec.tied_head)),
    )


def _notes(left_out: list[str], has_head: bool, tied: bool, stays_tied: bool) -> Iterable[str]:
    heads = [name for name in left_out if _EXTRA_HEADS.search(name)]
    if heads:
        yield f"{len(heads)} tensors of multi-token prediction (mtp.*) are left out, because the denoiser replaces them"
    if len(heads) < len(left_out):
        other = next(name for name in left_out if name not in heads)
        yield f"{len(left_out) - len(heads)} tensors of other parts of the model are left out, such as {other}"
    if stays_tied:
        yield "the head of each tower is its embedding"
    elif not has_head and tied:
        yield "the head is tied to the embedding; the heads of both towers are untied copies of the embedding"
    elif not has_head:
        yield "lm_head.weight is missing, and config.json does not tie it; both heads are copies of the embedding"


def _config(file: Path) -> tuple[TwoTowerConfig, bool]:
    """The configuration of the two-tower model, and whether the source ties head and embedding."""
    raw = read_object(file, "give a checkpoint directory")
    if ARCHITECTURE in (raw.get("architectures") or ()):
        raise ConfigError(f"{file}: already the config of a two-tower checkpoint; no conversion is needed")
    if raw.get("model_type") == GENERIC_MODEL_TYPE:
        raise ConfigError(f"{file}: already the config of a two-tower checkpoint; no conversion is needed")
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method", "unknown")
        raise ConfigError(f"{file}: the weights are quantised ({method}); convert the original bf16 checkpoint")
    if raw.get("model_type") != MODEL_TYPE:
        try:
            config: TwoTowerConfig = GenericTwoTowerConfig(backbone=raw)
            return config, tower_spec(config).tied_head
        except ConfigError as error:
            raise ConfigError(f"{file}: {error}") from None
    if not raw.keys() & {"hybrid_override_pattern", "layers_block_type", "layer_types"}:
        raise ConfigError(
            f"{file}: has no hybrid_override_pattern or layers_block_type, so the kinds of the layers are unknown"
        )
    try:
        return TwoTowerConfig(**_values(raw)), bool(raw.get("tie_word_embeddings"))
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None


def _values(raw: dict[str, object]) -> dict[str, object]:
    """The keyword arguments of `TwoTowerConfig`. Keys that a dense model lacks may be absent, null or 0."""
    own = {field.name: field.type for field in dataclasses.fields(NemotronHFields)}
    values: dict[str, object] = {}
    for key, value in raw.items():
        name = _OLDER_NAMES.get(key, key)
        absent = value is None or (value == 0 and own.get(name) == "int")
        if name in _DROPPED or (name != key and name in raw):
            continue
        if absent and name in own and name != "num_key_value_heads":  # null means num_attention_heads
            continue
        values[name] = value
    return values


def write(directory: Path, weights: dict[str, torch.Tensor], config: TwoTowerConfig, tokenizer: Tokenizer) -> None:
    """Writes a one-tower checkpoint in the original layout, for `read` and transformers' NemotronHForCausalLM.

    weights: the tensors of a tower under their names in memory, with stacked experts.
    """
    with torch.device("meta"):
        model = TwoTowerModel(config, towers="context")

    def piece(entry: TensorEntry) -> torch.Tensor:
        tensor = weights[entry.memory.removeprefix("context.")]
        return tensor if entry.expert is None else tensor[entry.expert]

    root, head = family_of(config).roots[0]
    groups = names.by_tensor_on_disk(names.one_tower_entries(model, DiskLayout(root, head))).values()
    first = [weights[group[0].memory.removeprefix("context.")] for group in groups]
    write_shards(directory, [reader.tensor_to_write(g, t.dtype, piece) for g, t in zip(groups, first, strict=True)])
    dtype = str(weights["embeddings.weight"].dtype).removeprefix("torch.")
    values = {key: value for key, value in pretrained.config_to_write(model).items() if key != "auto_map"}
    values |= {"architectures": ["NemotronHForCausalLM"], "torch_dtype": dtype, "tie_word_embeddings": False}
    (directory / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    save_tokenizer(tokenizer, directory)
