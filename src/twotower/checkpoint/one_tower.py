"""Reads the checkpoint of an autoregressive model, which becomes one tower."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from twotower.checkpoint import gguf_file, names, one_tower_config, pretrained, reader
from twotower.checkpoint.generation_config import GenerationDefaults
from twotower.checkpoint.names import DiskLayout, TensorEntry
from twotower.checkpoint.reader import StoredTensor
from twotower.checkpoint.tokenizer_files import copy_model_files, load_tokenizer, save_tokenizer
from twotower.config import TwoTowerConfig
from twotower.errors import CheckpointError
from twotower.families import family_of
from twotower.json_text import JsonObject
from twotower.model.towers import TwoTowerModel
from twotower.tokenizer import Tokenizer

_EXTRA_HEADS = re.compile(r"(?:^|\.)mtp")  # draft heads of multi-token prediction; the denoiser replaces them
_COMPUTED = re.compile(r"rotary_emb\.inv_freq$")  # older versions of transformers stored these buffers
_TIED = "the head of each tower is its embedding"  # a note for the user


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
    its name in memory without the tower, and the number of its expert. layout: how a checkpoint with weights of its own
    for every tensor is named; None: not for this format. copy_files: writes the tokenizer, the chat
    template and the generation config into a directory.
    """

    model: TwoTowerModel
    places: dict[tuple[str, int | None], TensorEntry]
    weights: Weights
    layout: DiskLayout | None
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
        layout=None,
        tokenizer=tokenizer,
        defaults=GenerationDefaults(),
        copy_files=copy_files,
        notes=(_TIED,) if file.model.spec.tied_head else (),
    )


def _places(entries: Iterable[TensorEntry]) -> dict[tuple[str, int | None], TensorEntry]:
    return {(entry.memory.removeprefix("context."), entry.expert): entry for entry in entries}


def _read_directory(directory: Path) -> OneTowerCheckpoint:
    """Reads config and headers, but no weights.

    Raises:
        ConfigError, CheckpointError: the family is not supported, the config is not valid, a file is damaged, or a
            tensor is missing, unexpected, or of a wrong shape.
    """
    config, tied = one_tower_config.read_config(directory)
    found = reader.read_headers(directory)
    one_tower_config.check_tensor_names(found)
    if any(name.startswith("context_tower.") for name in found):
        raise CheckpointError(f"{directory}: already a two-tower checkpoint; no conversion is needed")
    found = {name: place for name, place in found.items() if not _COMPUTED.search(name)}
    family = family_of(config)
    roots = family.roots
    try:
        root, head = next(r for r in roots if any(name.startswith(f"{r[0]}layers.") for name in found))
    except StopIteration:
        expected = " or ".join(f"{root}layers.*" for root, _ in roots)
        raise CheckpointError(
            f"{directory}: no tensors named {expected}; use the config.json of these weights"
        ) from None
    stored = {name: place for name, place in found.items() if name.startswith((root, f"{head}."))}
    stored = {name: place for name, place in stored.items() if not _EXTRA_HEADS.search(name)}
    notes = list(_notes_about_others(sorted(set(found) - set(stored))))
    config, note = _settle_head(stored, f"{head}.weight", f"{root}{family.embeddings}.weight", config, tied)
    notes += [note] if note else []
    with torch.device("meta"):
        model = TwoTowerModel(config)
    needed = names.one_tower_entries(model, DiskLayout(root, head, stored))
    reader.check_tensors(directory, stored, needed, needed, config)
    return OneTowerCheckpoint(
        model=model,
        places=_places(needed),
        weights=SafetensorsWeights(stored),
        layout=DiskLayout(root, head, {*stored} if model.spec.tied_head else {*stored, f"{head}.weight"}),
        tokenizer=load_tokenizer(directory),
        defaults=GenerationDefaults.read(directory, config.vocab_size),
        copy_files=partial(copy_model_files, directory),
        notes=tuple(notes),
    )


def _settle_head(
    stored: dict[str, StoredTensor], head: str, table: str, config: TwoTowerConfig, tied: bool
) -> tuple[TwoTowerConfig, str | None]:
    """The configuration, tied or not as the file's tensors are, and a note for the user.

    A stored head that equals the embedding to which the configuration ties it is removed from `stored`.
    """
    if config.tie_word_embeddings and {head, table} <= stored.keys():
        if _equal(stored[head], head, stored[table], table):
            del stored[head]
            return config, f"the head of each tower is its embedding; {head} of the source equals it and is left out"
        return one_tower_config.untied(config), (
            f"config.json ties head and embedding, but {head} differs from the embedding; the head stays untied, as in "
            "transformers"
        )
    if config.tie_word_embeddings:
        return config, _TIED
    if head in stored:
        return config, None
    if tied:
        return config, "the head is tied to the embedding; the heads of both towers are untied copies of the embedding"
    return config, f"{head} is missing, and config.json does not tie it; both heads are copies of the embedding"


def _equal(place: StoredTensor, name: str, other_place: StoredTensor, other: str) -> bool:
    """Whether two tensors (V, H) on disk are equal, read in parts of 1024 rows."""
    if place.shape != other_place.shape:
        return False
    with safe_open(place.file, framework="pt") as first, safe_open(other_place.file, framework="pt") as second:
        slices = first.get_slice(name), second.get_slice(other)
        rows = range(0, place.shape[0], 1024)
        return all(torch.equal(*(each[start : start + 1024] for each in slices)) for start in rows)


def _notes_about_others(left_out: list[str]) -> Iterable[str]:
    heads = [name for name in left_out if _EXTRA_HEADS.search(name)]
    if heads:
        yield f"{len(heads)} tensors of multi-token prediction (mtp.*) are left out, because the denoiser replaces them"
    if len(heads) < len(left_out):
        other = next(name for name in left_out if name not in heads)
        yield f"{len(left_out) - len(heads)} tensors of other parts of the model are left out, such as {other}"


def nemotron_h_values(
    model: TwoTowerModel, dtype: str, left_out: Container[str] = ("auto_map", "mask_token_id")
) -> JsonObject:
    """The config.json of the autoregressive model in a model in the released layout. dtype: of its weights."""
    kept = {key: value for key, value in pretrained.config_to_write(model).items() if key not in left_out}
    return kept | {"architectures": ["NemotronHForCausalLM"], "torch_dtype": dtype, "tie_word_embeddings": False}


def write(directory: Path, weights: dict[str, torch.Tensor], config: TwoTowerConfig, tokenizer: Tokenizer) -> None:
    """Writes a one-tower checkpoint in the original layout, for `read` and transformers' NemotronHForCausalLM.

    weights: the tensors of a tower under their names in memory, with stacked experts.
    """
    with torch.device("meta"):
        model = TwoTowerModel(config, towers="context")
    entries = names.one_tower_entries(model, DiskLayout(*family_of(config).roots[0]))
    reader.write_entries(directory, entries, {f"context.{name}": tensor for name, tensor in weights.items()})
    dtype = str(weights["embeddings.weight"].dtype).removeprefix("torch.")
    values = nemotron_h_values(model, dtype, ("auto_map",))
    (directory / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    save_tokenizer(tokenizer, directory)
