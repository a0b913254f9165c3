"""Loads and saves the weights of a checkpoint directory. Missing and unexpected tensors are errors.

The model is built on the meta device. Each tensor is allocated once, on its device, and filled from the memory-mapped
file.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from twotower.checkpoint import mismatch, stored_quantization
from twotower.checkpoint.atomic import finish_save
from twotower.checkpoint.names import (
    KIND_MARKS,
    LAYER,
    SCALE,
    TensorEntry,
    by_tensor_on_disk,
    int4_shapes,
    tensor_entries,
)
from twotower.checkpoint.writer import DTYPE_NAMES, FLOATS, INDEX_FILE, SINGLE_FILE, TensorToWrite, write_shards
from twotower.config import TwoTowerConfig
from twotower.errors import CheckpointError
from twotower.model.fp32_tensors import named_tensors, target_dtype
from twotower.model.towers import TwoTowerModel
from twotower.ops.cpu import huge_pages
from twotower.ops.reference import int4, int8
from twotower.specs import KIND_NAMES, KIND_OF_LETTER

_SAVE_AGAIN = "load it with transformers and save it with save_pretrained"
_OTHER_FORMATS = {
    "pytorch_model*.bin": _SAVE_AGAIN,
    "*.gguf": "give the file itself to twotower init",
    "consolidated*": "download the files model*.safetensors, which transformers reads",
    "*.safetensors": _SAVE_AGAIN,
    "*.msgpack": _SAVE_AGAIN,
    "*.h5": _SAVE_AGAIN,
}


_PART_DTYPES = {"_packed": "I32", "_shape": "I64"}  # of quantised weights


@dataclass(frozen=True)
class StoredTensor:
    """A tensor on disk: its file, shape and safetensors dtype."""

    file: Path
    shape: tuple[int, ...]
    dtype: str

    @property
    def torch_dtype(self) -> torch.dtype:
        return next(dtype for dtype, name in DTYPE_NAMES.items() if name == self.dtype)


def read_headers(directory: Path) -> dict[str, StoredTensor]:
    """All tensors of a checkpoint directory, from the headers of the files.

    Raises:
        CheckpointError: there are no weights, the index does not match the files, or a file is damaged or truncated.
    """
    finish_save(directory)
    index = directory / INDEX_FILE
    if not index.exists():
        if not (directory / SINGLE_FILE).exists():
            raise CheckpointError(
                f"{directory}: has neither {SINGLE_FILE} nor {INDEX_FILE}; {_other_weights(directory)}"
            )
        return file_header(directory / SINGLE_FILE)
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f" ({error})" if isinstance(error, OSError | ValueError) else ""
        raise CheckpointError(
            f"{index}: not a safetensors index with a weight_map{reason}; download it again"
        ) from None
    found: dict[str, StoredTensor] = {}
    for name in files:
        file = directory / str(name)
        if not file.is_file():
            raise CheckpointError(f"{index}: names {name}, which is not in {directory}; download it again")
        for tensor, stored in file_header(file).items():
            if tensor in found:
                raise CheckpointError(f"{file}: {tensor} is also in {found[tensor].file.name}; remove one of the files")
            if tensor not in weight_map:
                raise CheckpointError(
                    f"{file}: has {tensor}, which {index.name} does not list; does the file belong here?"
                )
            found[tensor] = stored
    for tensor, name in weight_map.items():
        if tensor not in found or found[tensor].file.name != name:
            raise CheckpointError(
                f"{index}: names {name} for {tensor}, which is not there; the shards are of different checkpoints"
            )
    return found


def _other_weights(directory: Path) -> str:
    """What to do about a directory without weights that can be read."""
    for pattern, remedy in _OTHER_FORMATS.items():
        if found := sorted(directory.glob(pattern)):
            return f"{found[0].name} is there: {remedy}"
    return "give a directory with weights"


def file_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file.

    Raises:
        CheckpointError: it is damaged or truncated.
    """
    try:
        with safe_open(file, framework="pt") as handle:
            out = {}
            for name in handle.keys():  # noqa: SIM118 — not a dict
                part = handle.get_slice(name)
                out[name] = StoredTensor(file, tuple(part.get_shape()), part.get_dtype())
            return out
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: not a complete safetensors file ({error}); download it again") from None


def check(
    directory: Path,
    found: dict[str, StoredTensor],
    known: list[TensorEntry],
    needed: list[TensorEntry],
    config: TwoTowerConfig,
) -> None:
    """Checks that no tensor is missing or unexpected and that all shapes match.

    found: tensors on disk. known: all tensors of a two-tower model of this configuration. needed: the tensors to load.
    config: of the model, for the words of the errors.

    Raises:
        CheckpointError: see above; the message names the file and the tensor.
    """
    if not any(name.startswith("context_tower.") for name in found):
        kind = "a one-tower model" if any(n.startswith(("backbone.", "model.")) for n in found) else "another model"
        raise CheckpointError(
            f"{directory}: has no context_tower.* tensors, so it is {kind}, not a two-tower checkpoint; a two-tower "
            "checkpoint has context_tower.*, denoiser_tower.*, lm_head and t_embedder, and twotower init makes one"
        )
    check_tensors(directory, found, known, needed, config)


def check_tensors(
    directory: Path,
    found: dict[str, StoredTensor],
    known: list[TensorEntry],
    needed: list[TensorEntry],
    config: TwoTowerConfig,
) -> None:
    """`check` for the one-tower and the two-tower layout."""
    if config.stored_pattern is not None:
        _check_kinds(found, config.stored_pattern)
    listing = directory / (INDEX_FILE if (directory / INDEX_FILE).exists() else SINGLE_FILE)
    mismatch.check_counts(listing, found, (entry.disk for entry in needed), config)
    missing = [entry for entry in needed if entry.disk not in found]
    if missing:
        raise CheckpointError(
            f"{listing}: {missing[0].disk} is missing (shape {list(missing[0].disk_shape)} expected)"
            + (f", and {len(missing) - 1} more" if len(missing) > 1 else "")
            + "; download it again, or use the config.json of these weights"
        )
    surplus = sorted(set(found) - {entry.disk for entry in known})
    if surplus:
        raise CheckpointError(
            f"{found[surplus[0]].file}: {surplus[0]} is not a tensor of a model with this config"
            + (f", nor are {len(surplus) - 1} more" if len(surplus) > 1 else "")
            + "; use the config.json of these weights"
        )
    for entry in needed:
        stored = found[entry.disk]
        if stored.shape != entry.disk_shape:
            raise CheckpointError(
                f"{stored.file}: {entry.disk} has shape {list(stored.shape)}; "
                f"the config expects {list(entry.disk_shape)}{mismatch.sources_of_shape(entry.memory, config)}; "
                "use the config.json of these weights"
            )
        of_part = _PART_DTYPES.get(entry.part)
        if stored.dtype not in (FLOATS.values() if of_part is None else [of_part]):
            raise CheckpointError(
                f"{stored.file}: {entry.disk} is stored as {stored.dtype}; {of_part or 'a float tensor'} is expected"
            )


def _check_kinds(found: dict[str, StoredTensor], pattern: str) -> None:
    for name, stored in found.items():
        layer = LAYER.match(name)
        if layer is None:
            continue
        i = int(layer[1])
        if i >= len(pattern):
            raise CheckpointError(
                f"{stored.file}: has {name}, but hybrid_override_pattern names only {len(pattern)} layers"
            )
        kind = next((kind for mark, kind in KIND_MARKS.items() if layer[2].startswith(mark)), pattern[i])
        if kind != pattern[i]:
            raise CheckpointError(
                f"{stored.file}: {name} belongs to a layer of kind '{kind}' ({_kind_name(kind)}), but letter {i} of "
                f"hybrid_override_pattern is '{pattern[i]}' ({_kind_name(pattern[i])})"
            )


def _kind_name(letter: str) -> str:
    return KIND_NAMES[KIND_OF_LETTER[letter]]


def load_weights(
    model: TwoTowerModel,
    directory: Path,
    known: list[TensorEntry],
    needed: list[TensorEntry],
    dtype: torch.dtype | None,
    device_of: dict[str, torch.device],
) -> None:
    """Loads the weights into a model on the meta device.

    needed: its tensors on disk. dtype: of the model; None: that of the stored embeddings. device_of: the devices of
    "context" and "denoiser".
    """
    found = read_headers(directory)
    check(directory, found, known, needed, model.config)
    if dtype is None:
        dtype = _stored_dtype(found[embeddings(needed).disk])
    by_file: dict[Path, list[TensorEntry]] = defaultdict(list)
    for entry in needed:
        by_file[found[entry.disk].file].append(entry)
    empty, of_int4 = dict(named_tensors(model)), int4_shapes(model)
    filled: dict[str, Tensor] = {}

    def place(name: str, expert: int | None) -> Tensor:
        """The target tensor, allocated on first use."""
        if name not in filled:
            wanted = target_dtype(name, dtype) if empty[name].is_floating_point() else empty[name].dtype
            device = device_of["context" if name.startswith("context.") else "denoiser"]
            filled[name] = huge_pages.weight_memory(empty[name].shape, wanted, device)
        return filled[name] if expert is None else filled[name][expert]

    for file, wanted in by_file.items():
        with safe_open(file, framework="pt") as handle:
            for entry in wanted:
                source = read_piece(handle, entry)
                if entry.part == "_shape":
                    _check_shape(file, entry, source)
                if entry.part in (SCALE, "_shape"):
                    continue  # read with the weight
                target = place(entry.memory, entry.expert)
                scale = place(entry.memory + SCALE, entry.expert) if entry.memory + SCALE in empty else None
                if entry.part:
                    name = replace(entry, disk=entry.disk.removesuffix(entry.part) + SCALE)
                    with safe_open(found[name.disk].file, framework="pt") as other:
                        stored_quantization.fill(entry, source, read_piece(other, name), target, scale)
                elif scale is not None:
                    int8.quantize_into(target, scale, source)
                elif entry.memory in of_int4:
                    int4.quantize_into(target, source)
                else:
                    target.copy_(source)
    model.load_state_dict(filled, strict=True, assign=True)


def _check_shape(file: Path, entry: TensorEntry, stored: Tensor) -> None:
    if tuple(stored.tolist()) != entry.whole:
        raise CheckpointError(
            f"{file}: {entry.disk} is {stored.tolist()}; the config expects {list(entry.whole)}; use the config.json "
            "of these weights"
        )


def read_piece(handle: safe_open, entry: TensorEntry) -> Tensor:
    """The piece of an entry, from its open file."""
    piece: Tensor = handle.get_slice(entry.disk)[entry.index] if entry.index else handle.get_tensor(entry.disk)
    return piece


def embeddings(entries: list[TensorEntry]) -> TensorEntry:
    """The entry of the context tower's embeddings."""
    return next(entry for entry in entries if entry.memory == "context.embeddings.weight")


def _stored_dtype(stored: StoredTensor) -> torch.dtype:
    if stored.dtype not in ("BF16", "F32", "F64"):
        raise CheckpointError(
            f"{stored.file}: is stored as {stored.dtype}; give a dtype to load it in, such as bfloat16"
        )
    return stored.torch_dtype


# --- writing -------------------------------------------------------------------------------------------------------


def save_weights(model: TwoTowerModel, directory: Path, max_shard_size: int | str) -> None:
    """Saves the weights with the names on disk, in one file, or in shards of at most max_shard_size and an index."""
    entries = list(stored_quantization.stored_entries(model, tensor_entries(model)))
    write_entries(directory, entries, dict(named_tensors(model)), max_shard_size)


def write_entries(
    directory: Path, entries: list[TensorEntry], memory: Mapping[str, Tensor], max_shard_size: int | str = "5GB"
) -> None:
    """Writes tensors in memory, by their names there, as the entries place them on disk."""

    def piece(entry: TensorEntry) -> Tensor:
        def of(name: str) -> Tensor:
            return memory[name] if entry.expert is None else memory[name][entry.expert]

        return stored_quantization.stored_piece(entry, of) if entry.part else of(entry.memory)

    groups = by_tensor_on_disk(entries).values()
    dtype_of = stored_quantization.stored_dtype_of
    to_write = [tensor_to_write(group, dtype_of(group[0], memory[group[0].memory]), piece) for group in groups]
    write_shards(directory, to_write, max_shard_size)


def tensor_to_write(
    group: list[TensorEntry], dtype: torch.dtype, piece: Callable[[TensorEntry], Tensor]
) -> TensorToWrite:
    """A tensor on disk, made of the pieces of its entries when it is written."""
    first = group[0]

    def make() -> Tensor:
        if not first.index:
            return piece(first)
        whole = torch.empty(first.disk_shape, dtype=dtype)
        for entry in group:
            whole[entry.index] = piece(entry).to(dtype)
        return whole

    return TensorToWrite(first.disk, first.disk_shape, dtype, make)
