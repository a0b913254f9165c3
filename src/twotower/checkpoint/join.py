"""Joins checkpoints with the same context tower to one with several denoisers, and writes one denoiser alone again.

The context tower is stored once. The tensors of a denoiser keep their names, values and dtypes behind the prefix
`denoisers.NAME.`, so a checkpoint that is written alone again has the tensors of its source bit for bit. Tensors are
read from memory-mapped files and copied one by one, so the memory need is small for any model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from twotower.checkpoint import names, one_tower, pretrained, reader, tokenizer_files
from twotower.checkpoint.convert import counter
from twotower.checkpoint.names import TensorEntry
from twotower.checkpoint.one_tower_model import refuse_one_tower
from twotower.checkpoint.output_folder import check_target, unfinished_folder
from twotower.checkpoint.reader import StoredTensor
from twotower.checkpoint.source import resolve_source
from twotower.checkpoint.stored_quantization import refuse_quantized
from twotower.checkpoint.writer import TensorToWrite, write_shards
from twotower.config import MODEL_TYPE, GenericTwoTowerConfig, TwoTowerConfig, errors_of
from twotower.denoiser_fields import DenoiserConfig
from twotower.errors import ArgumentError, CheckpointError, ConfigError
from twotower.families import tower_spec
from twotower.model.towers import TwoTowerModel
from twotower.named_denoisers import MODES_WITH_DENOISER, NamedDenoiser, NamedDenoisers

# Keys of config.json that may differ between the sources without a note.
_OWN_KEYS = {"architectures", "auto_map", "backbone", "block_size", "model_type"}


@dataclass(frozen=True, kw_only=True)
class JoinResult:
    """Facts of a written checkpoint. denoisers: parameters of each beside the context tower; for_mode: see
    `NamedDenoisers`. bytes: of all tensors. notes: remarks for the user, one sentence each."""

    directory: Path
    denoisers: Mapping[str, int]
    for_mode: Mapping[str, str]
    context_parameters: int
    bytes: int
    files: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, object]:
        """The fields as plain data for `--json`."""
        return asdict(self) | {"directory": str(self.directory)}


@dataclass(frozen=True)
class _Source:
    """A two-tower checkpoint with one denoiser. config: in the generic layout. entries: its tensors on disk."""

    origin: Path
    config: GenericTwoTowerConfig
    found: Mapping[str, StoredTensor]
    entries: list[TensorEntry]

    def tensors(self, of_context: bool) -> list[str]:
        """The names on disk of the context tower's tensors, or of the denoiser's."""
        return list(dict.fromkeys(one.disk for one in self.entries if names.of_context(one) == of_context))


def join(
    sources: Mapping[str, str | Path],
    directory: str | Path,
    *,
    modes: Mapping[str, str] | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> JoinResult:
    """Writes one checkpoint with the denoisers of several, whose context towers are equal bit for bit.

    sources: by the name of its denoiser, each a directory or a hub id. modes: the name of the denoiser of a mode; the
    first source has the other modes. Tokenizer, chat template and generation config are those of the first source.
    overwrite: whether to replace a checkpoint in `directory`. progress(done, total): bytes, called after each tensor.

    Raises:
        ConfigError, CheckpointError: a source is not a valid checkpoint with one denoiser; the context towers differ.
        ArgumentError: fewer than two sources, a wrong name or mode, or a directory that may not be replaced.
    """
    target = check_target(Path(directory), overwrite)
    if len(sources) < 2:
        raise ArgumentError("one denoiser needs no joining; give two checkpoints or more, each as NAME=MODEL")
    first_name = next(iter(sources))
    read = {name: _read(source, target, directory) for name, source in sources.items()}
    own = {name: NamedDenoiser(one.config.denoiser, one.config.block_size) for name, one in read.items()}
    several = NamedDenoisers.named(own, dict.fromkeys(MODES_WITH_DENOISER, first_name) | dict(modes or {}))
    first, *others = read.values()
    notes = [note for other in others for note in _compared(first, other)]
    config = _joined_config(first, several)
    with ExitStack() as files:
        for other in others:
            _check_same_context(first, other, files)
        to_write = list(_copies(first.found, {name: name for name in first.tensors(of_context=True)}, files))
        for name, one in read.items():
            places = {disk: f"{names.DENOISERS}{name}.{disk}" for disk in one.tensors(of_context=False)}
            to_write += _copies(one.found, places, files)
        weights, total = _write(Path(directory), config, first, to_write, (max_shard_size, overwrite), progress)
    return JoinResult(
        directory=Path(directory),
        denoisers={name: _parameters(one.found, one.tensors(of_context=False)) for name, one in read.items()},
        for_mode=several.for_mode,
        context_parameters=_parameters(first.found, first.tensors(of_context=True)),
        bytes=total,
        files=tuple(file.name for file in weights),
        notes=tuple(notes),
    )


def export_denoiser(
    source: str | Path,
    directory: str | Path,
    denoiser: str,
    *,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> JoinResult:
    """Writes the checkpoint with one of several denoisers alone. Arguments and exceptions are those of `join`."""
    target = check_target(Path(directory), overwrite)
    origin = _origin(source, target, directory)
    refuse_one_tower(origin, "denoiser")
    config = TwoTowerConfig.read(origin)
    if not isinstance(config, GenericTwoTowerConfig) or config.denoisers is None:
        raise CheckpointError(f"{origin}: has one denoiser already, without a name; it is as you would export it")
    own = config.with_denoiser(denoiser)
    refuse_quantized(config, origin, "twotower export")
    with torch.device("meta"), errors_of(origin / "config.json"):
        known, model = names.tensor_entries(TwoTowerModel(config)), TwoTowerModel(own)
    found = reader.read_headers(origin)
    reader.check(origin, found, known, known, config)
    entries = names.tensor_entries(model)
    pairs = zip(names.among_several(entries, denoiser), entries, strict=True)
    alone = _Source(origin, own, found, entries)
    with ExitStack() as files:
        to_write = list(_copies(found, {there.disk: one.disk for there, one in pairs}, files))
        released = _released(own)
        weights, total = _write(Path(directory), released, alone, to_write, (max_shard_size, overwrite), progress)
    sizes = {entry.name: torch.Size(entry.shape).numel() for entry in to_write}
    return JoinResult(
        directory=Path(directory),
        denoisers={denoiser: sum(sizes[name] for name in alone.tensors(of_context=False))},
        for_mode={},
        context_parameters=sum(sizes[name] for name in alone.tensors(of_context=True)),
        bytes=total,
        files=tuple(file.name for file in weights),
    )


def _origin(source: str | Path, target: Path, directory: str | Path) -> Path:
    origin = resolve_source(source, {})
    if origin.resolve() == target or target in origin.resolve().parents:
        raise ArgumentError(f"{directory}: the directory contains the source checkpoint; choose another directory")
    return origin


def _read(source: str | Path, target: Path, directory: str | Path) -> _Source:
    origin = _origin(source, target, directory)
    config = TwoTowerConfig.read(origin)
    refuse_quantized(config, origin, "twotower join")
    with errors_of(origin / "config.json"), torch.device("meta"):
        _ = config.denoiser  # raises ConfigError if there are several
        model = TwoTowerModel(config)
    found, known = reader.read_headers(origin), names.tensor_entries(model)
    reader.check(origin, found, known, known, config)
    if not isinstance(config, GenericTwoTowerConfig):
        dtype = found[reader.embeddings(known).disk].torch_dtype
        backbone = one_tower.nemotron_h_values(model, str(dtype).removeprefix("torch."))
        generic = GenericTwoTowerConfig(backbone=backbone, mask_token_id=config.mask_token)
        generic.dtype, config = config.dtype, generic
    return _Source(origin, config, found, known)


def _compared(first: _Source, other: _Source) -> Iterator[str]:
    """Notes on what the new checkpoint takes from the first source alone.

    Raises:
        ConfigError: the context towers or the mask tokens differ.
    """
    one, two = first.config, other.config
    if tower_spec(one) != tower_spec(two):
        raise ConfigError(
            f"{other.origin}: its context tower has other layers or options than that of {first.origin}; join "
            "denoisers of one autoregressive model"
        )
    if one.mask_token != two.mask_token:
        raise ConfigError(
            f"{other.origin}: mask_token_id is {two.mask_token}, and {one.mask_token} in {first.origin}; make the "
            "denoisers with the same mask token: twotower init --mask-token"
        )
    values = [{key: value for key, value in config.to_dict().items() if key not in _OWN_KEYS} for config in (one, two)]
    fields = {"format", *(field for field in DenoiserConfig.__dataclass_fields__)}
    differing = sorted(key for key in values[0].keys() | values[1].keys() if values[0].get(key) != values[1].get(key))
    for key in differing:
        if key not in fields:
            yield f"{key} of config.json differs; the new checkpoint has that of {first.origin}"
    for file in _other_files(first.origin, other.origin):
        yield f"{file} differs; the new checkpoint has that of {first.origin}"


def _other_files(one: Path, two: Path) -> list[str]:
    """Files of tokenizer and generation that two directories have, or one of them, with other contents."""
    found = {
        file.relative_to(root) for root in (one, two) for each in tokenizer_files.PATTERNS for file in root.glob(each)
    }
    contents = {
        file: [(root / file).read_bytes() if (root / file).is_file() else b"" for root in (one, two)] for file in found
    }
    return sorted(str(file) for file, (a, b) in contents.items() if a != b)


def _check_same_context(first: _Source, other: _Source, files: ExitStack) -> None:
    """Raises CheckpointError if a tensor of the context tower differs in any bit."""
    one, two = _Open(files), _Open(files)
    there = set(other.tensors(of_context=True))
    for name in first.tensors(of_context=True):
        if name not in there:
            raise CheckpointError(
                f"{other.origin}: has no {name}, which {first.origin} has; join denoisers of one model"
            )
        a, b = (opened.tensor(source.found[name].file, name) for opened, source in ((one, first), (two, other)))
        if a.dtype != b.dtype or not torch.equal(_bits(a), _bits(b)):
            raise CheckpointError(
                f"{other.origin}: {name} differs from that of {first.origin}, so the denoisers belong to different "
                "context towers; join denoisers of one autoregressive model"
            )


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


class _Open:
    """Files of tensors that are open until the end of `files`."""

    def __init__(self, files: ExitStack) -> None:
        self._files = files
        self._handles: dict[Path, safe_open] = {}

    def tensor(self, file: Path, name: str) -> Tensor:
        if file not in self._handles:
            self._handles[file] = self._files.enter_context(safe_open(file, framework="pt"))
        found: Tensor = self._handles[file].get_tensor(name)
        return found


def _copies(found: Mapping[str, StoredTensor], places: Mapping[str, str], files: ExitStack) -> Iterator[TensorToWrite]:
    """Copies of tensors on disk. places: the new name of each."""
    opened = _Open(files)
    for old, new in places.items():
        stored = found[old]
        yield TensorToWrite(new, stored.shape, stored.torch_dtype, partial(opened.tensor, stored.file, old))


def _joined_config(first: _Source, several: NamedDenoisers) -> GenericTwoTowerConfig:
    fields = {*DenoiserConfig.__dataclass_fields__, "format", "block_size", "model_type"}
    values = {key: value for key, value in first.config.to_dict().items() if key not in fields}
    return GenericTwoTowerConfig(**values | several.to_json())


def _released(config: GenericTwoTowerConfig) -> TwoTowerConfig:
    """The configuration in the released layout, if that can hold it: the one in which twotower init writes it."""
    if config.denoiser != DenoiserConfig() or config.block_size is not None:
        return config
    if config.backbone.get("model_type") != MODEL_TYPE:
        return config
    left_out = ("model_type", "architectures", "torch_dtype", "dtype")
    values = {key: value for key, value in config.backbone.items() if key not in left_out}
    out = TwoTowerConfig(**values, mask_token_id=config.mask_token)
    out.dtype = config.dtype
    return out


def _write(
    directory: Path,
    config: TwoTowerConfig,
    source: _Source,
    to_write: list[TensorToWrite],
    options: tuple[int | str, bool],
    progress: Callable[[int, int], None] | None,
) -> tuple[list[Path], int]:
    """Writes a checkpoint → its weight files, and the bytes of its tensors. options: max_shard_size, overwrite."""
    total, (max_shard_size, overwrite) = sum(entry.nbytes for entry in to_write), options
    with torch.device("meta"):
        model = TwoTowerModel(config)
    dtype = str(source.found[reader.embeddings(source.entries).disk].torch_dtype).removeprefix("torch.")
    values = pretrained.config_to_write(model) | {"torch_dtype": dtype}
    known = names.tensor_entries(model)
    with unfinished_folder(directory, overwrite, total) as folder:
        weights = write_shards(folder, to_write, max_shard_size, counter(total, progress))
        (folder / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        (folder / pretrained.CODE_FILE).write_text(pretrained.CODE, encoding="utf-8")
        tokenizer_files.copy_model_files(source.origin, folder)
        reader.check(folder, reader.read_headers(folder), known, known, config)
    return weights, total


def _parameters(found: Mapping[str, StoredTensor], tensors: Iterable[str]) -> int:
    return sum(torch.Size(found[name].shape).numel() for name in tensors)
