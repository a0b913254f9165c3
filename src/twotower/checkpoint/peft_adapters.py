"""Adapters in PEFT's file format for LoRA: `twotower export --to peft` writes them, `twotower init --adapters` reads.

A directory has `adapter_config.json` and `adapter_model.safetensors`, as PEFT reads them for transformers' class of the
backbone, and two files that PEFT ignores: the embedding of the mask token, and the fields of the two-tower checkpoint.
lora_alpha equals r, so PEFT's factor lora_alpha / r is 1, as in `model.adapters.LowRank`.

Several linear layers of a tower may be one module there, such as gate and up projections in `gate_up_proj`. Its rank is
then the sum of their ranks: lora_A has their A below each other, lora_B their B as blocks on the diagonal, else zeros.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from twotower.checkpoint import names, reader
from twotower.checkpoint.names import DiskLayout, TensorEntry
from twotower.checkpoint.one_tower_config import ADAPTER_FIELDS, ADAPTER_FILE
from twotower.checkpoint.output_folder import FolderKind
from twotower.checkpoint.source import resolve_source
from twotower.checkpoint.writer import FLOATS, TensorToWrite, write_file
from twotower.config import errors_of, read_object
from twotower.denoiser_fields import NAMES, AdapterConfig, DenoiserConfig
from twotower.errors import CheckpointError, ConfigError
from twotower.families import family_of
from twotower.json_text import JsonObject
from twotower.model.towers import TwoTowerModel

WEIGHTS_FILE = "adapter_model.safetensors"
MASK_FILE = "mask_embedding.safetensors"
FOLDER = FolderKind("a folder of adapters", ADAPTER_FILE, (ADAPTER_FILE, WEIGHTS_FILE, MASK_FILE, ADAPTER_FIELDS))

# model_type of families for which PEFT refuses adapters on `out_proj` (seen in peft 0.21.2)
REFUSED_BY_PEFT = ("falcon_h1", "mamba2", "nemotron_h")
_ROOT = "base_model.model."  # of the names of PEFT's tensors
_IN_LAYER = re.compile(r".*\blayers\.\d+\.(.*)")


@dataclass(frozen=True)
class AdaptedModule:
    """A linear module of transformers' class, and the weights of the tower that it holds, in the order of its rows.

    path: in transformers' class. weights: their entries in the module's weight.
    """

    path: str
    weights: tuple[TensorEntry, ...]

    @property
    def in_layer(self) -> str:
        """The path relative to the layer."""
        found = _IN_LAYER.match(self.path)
        assert found is not None, self.path
        return found[1]

    def tensor(self, matrix: str) -> str:
        """PEFT's name of the matrix A or B."""
        return f"{_ROOT}{self.path}.lora_{matrix}.weight"

    def shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        """The shapes of A and B by PEFT's names. rank: of each linear layer of the tower."""
        out_features, in_features = self.weights[0].disk_shape
        whole = rank * len(self.weights)
        return {self.tensor("A"): (whole, in_features), self.tensor("B"): (out_features, whole)}

    def joined(self, rank: int, tensor: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """A and B of the module, by PEFT's names. tensor: of the tower, by its name in memory."""
        a, b = ([tensor(_adapter(entry, which)) for entry in self.weights] for which in "ab")
        (first, _), (second, shape) = self.shapes(rank).items()
        whole = torch.zeros(shape, dtype=b[0].dtype)
        for entry, place, block in zip(self.weights, _blocks(rank, len(b)), b, strict=True):
            whole[(*(entry.index or (slice(None),)), place)] = block
        return {first: torch.cat(a), second: whole}

    def parts(self, rank: int, tensor: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """The tower's tensors, by their names in memory. tensor: of the module, by PEFT's name.

        Raises:
            CheckpointError: B has values outside its blocks.
        """
        a, b = tensor(self.tensor("A")), tensor(self.tensor("B"))
        out = {}
        for entry, place in zip(self.weights, _blocks(rank, len(self.weights)), strict=True):
            out[_adapter(entry, "a")] = a[place]
            out[_adapter(entry, "b")] = b[(*(entry.index or (slice(None),)), place)]
        if b.count_nonzero() != sum(out[_adapter(entry, "b")].count_nonzero() for entry in self.weights):
            raise CheckpointError(
                f"{self.tensor('B')} has values outside the blocks of its {len(self.weights)} projections, which are "
                "apart in a two-tower model; give adapters that twotower export wrote"
            )
        return out


def _adapter(weight: TensorEntry, matrix: str) -> str:
    return f"{weight.memory.removesuffix('weight')}adapter.{matrix}"


def _blocks(rank: int, count: int) -> list[slice]:
    return [slice(i * rank, (i + 1) * rank) for i in range(count)]


def adapted_modules(model: TwoTowerModel) -> list[AdaptedModule]:
    """The modules of transformers' class whose linear layers have adapters in a model, which may be on meta."""
    family = family_of(model.config)
    root = family.roots[0][0] if family.module_root is None else family.module_root
    adapters = {name for name in names.weight_shapes(model) if name.endswith(".adapter.a")}
    entries = names.one_tower_entries(model, DiskLayout(root, family.roots[0][1]))
    own = [entry for entry in entries if entry.memory.endswith(".weight") and _adapter(entry, "a") in adapters]
    groups = names.by_tensor_on_disk(own)
    return [AdaptedModule(disk.removesuffix(".weight"), tuple(group)) for disk, group in groups.items()]


def peft_config(modules: list[AdaptedModule], rank: int, base: str | None) -> JsonObject:
    """The adapter_config.json. base: the name or path of the autoregressive model."""
    packed = {module.in_layer: rank * len(module.weights) for module in modules if len(module.weights) > 1}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": packed,
        "alpha_pattern": packed,
        "target_modules": sorted({module.in_layer for module in modules}),
        "bias": "none",
        "lora_bias": False,
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_dora": False,
        "use_rslora": False,
    }


_COMPARED = (
    *("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern"),
    *("bias", "lora_bias", "fan_in_fan_out", "use_dora", "use_rslora"),
)


# --- writing -------------------------------------------------------------------------------------------------------


def tensors_to_write(model: TwoTowerModel, tensor: Callable[[str], Tensor]) -> list[tuple[str, TensorToWrite]]:
    """The files of tensors, each with a tensor. tensor: of the tower, by its name in memory."""
    rank = rank_of(model.config.denoiser)
    out = []
    for module in adapted_modules(model):
        for name, whole in module.joined(rank, tensor).items():
            out.append((WEIGHTS_FILE, TensorToWrite.of(name, tuple(whole.shape), whole)))
    for memory, name in _beside(model.config.denoiser).items():
        whole = tensor(memory)
        out.append((MASK_FILE, TensorToWrite.of(name, tuple(whole.shape), whole)))
    return out


def write_folder(
    folder: Path,
    model: TwoTowerModel,
    tensors: list[tuple[str, TensorToWrite]],
    base: str | None,
    fingerprint: str | None,
    written: Callable[[int], None],
) -> None:
    """Writes the files of a directory of adapters. fingerprint: `weights_fingerprint` of the backbone, if known."""
    config = model.config
    for file in (WEIGHTS_FILE, MASK_FILE):
        write_file(folder / file, [entry for place, entry in tensors if place == file], written)
    fields = {
        **config.denoiser.to_json(),
        "mask_token_id": config.mask_token,
        "block_size": config.block_size,
        "weights_sha256": fingerprint,
    }
    for file, values in (
        (ADAPTER_FILE, peft_config(adapted_modules(model), rank_of(config.denoiser), base)),
        (ADAPTER_FIELDS, fields),
    ):
        (folder / file).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _beside(denoiser: DenoiserConfig) -> dict[str, str]:
    """The tensors that PEFT's files have no place for, by their names in memory → their names in `MASK_FILE`."""
    names = ["mask_embedding.weight"]
    if denoiser.draft_head is not None:
        names += ["draft_head.previous", "draft_head.following"]
    return {f"context.{name}": name.removesuffix(".weight") for name in names}


def fingerprint_entry(model: TwoTowerModel) -> str:
    """The name in memory of the weight that `weights_fingerprint` reads: the first that has an adapter."""
    return adapted_modules(model)[0].weights[0].memory


def rank_of(denoiser: DenoiserConfig) -> int:
    """The rank of a denoiser that has adapters."""
    assert denoiser.adapters is not None
    return denoiser.adapters.rank


def weights_fingerprint(weight: Tensor) -> str:
    """The SHA-256 of a weight in bf16, which shows whether adapters belong to a backbone of equal shape."""
    rounded = weight.to("cpu", torch.bfloat16).contiguous()
    return hashlib.sha256(rounded.view(torch.uint8).numpy().data).hexdigest()


# --- reading -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class AdapterFolder:
    """The fields of a directory of adapters: those of `two_tower.json`, for the config.json of a two-tower checkpoint.

    weights_sha256: of the backbone that the adapters come from; None if it is not known.
    """

    directory: Path
    denoiser: DenoiserConfig
    mask_token_id: int
    block_size: int | None
    weights_sha256: str | None

    @classmethod
    def read(cls, source: str | Path) -> AdapterFolder:
        """Reads the fields of a directory or a hub id, but no weights.

        Raises:
            CheckpointError, ConfigError: a file is missing or not valid.
        """
        directory = resolve_source(source, {})
        for name in FOLDER.files:
            if not (directory / name).is_file():
                raise CheckpointError(
                    f"{directory}: has no {name}, so it is not a folder of adapters that twotower export wrote; give "
                    "such a folder"
                )
        file = directory / ADAPTER_FIELDS
        values = read_object(file, "")
        with errors_of(file):
            return cls(directory=directory, **_fields(values))

    def tensors(self, model: TwoTowerModel, backbone: Path, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The adapters, the mask embedding and the draft head of a model on meta, by their names in memory.

        backbone: the source of the model, for the words of the errors. dtype: None keeps the dtype of each tensor.

        Raises:
            CheckpointError, ConfigError: a tensor does not fit the backbone, or `adapter_config.json` does not say what
                the tensors are.
        """
        modules, rank = adapted_modules(model), rank_of(self.denoiser)
        shapes: dict[str, tuple[int, ...]] = {}
        for module in modules:
            shapes |= module.shapes(rank)
        found = self._read(WEIGHTS_FILE, shapes, backbone)
        beside, own = _beside(self.denoiser), dict(model.named_parameters())
        others = self._read(MASK_FILE, {name: tuple(own[part].shape) for part, name in beside.items()}, backbone)
        self._check_config(peft_config(modules, rank, None))
        out = {part: others[name] for part, name in beside.items()}
        for module in modules:
            try:
                out |= module.parts(rank, found.__getitem__)
            except CheckpointError as error:
                raise CheckpointError(f"{self.directory / WEIGHTS_FILE}: {error}") from None
        return {name: tensor.to(dtype or tensor.dtype) for name, tensor in out.items()}

    def _read(self, name: str, shapes: Mapping[str, tuple[int, ...]], backbone: Path) -> dict[str, Tensor]:
        """The tensors of a file, which must have these shapes."""
        file = self.directory / name
        found = reader.file_header(file)
        another = f"the adapters are of another backbone than {backbone}"
        for tensor, shape in shapes.items():
            if tensor not in found:
                raise CheckpointError(f"{file}: {tensor} is missing; {another}")
            if found[tensor].shape != shape:
                raise CheckpointError(
                    f"{file}: {tensor} has shape {list(found[tensor].shape)}, and {list(shape)} fits; {another}"
                )
            if found[tensor].dtype not in FLOATS.values():
                raise CheckpointError(
                    f"{file}: {tensor} is stored as {found[tensor].dtype}; a float tensor is expected"
                )
        if surplus := sorted(found.keys() - shapes.keys()):
            raise CheckpointError(f"{file}: {surplus[0]} has no place in the model; {another}")
        with safe_open(file, framework="pt") as handle:
            out = {tensor: handle.get_tensor(tensor) for tensor in shapes}
        for tensor, values in out.items():
            if not values.isfinite().all():
                raise CheckpointError(
                    f"{file}: {tensor} has a value that is NaN or infinite, so the file is damaged; download it again"
                )
        return out

    def _check_config(self, expected: JsonObject) -> None:
        file = self.directory / ADAPTER_FILE
        values = read_object(file, "")
        for key in _COMPARED:
            if (value := values.get(key, expected[key] or None) or None) != (expected[key] or None):
                raise ConfigError(
                    f"{file}: {key} is {value!r}; for adapters of rank {rank_of(self.denoiser)} as twotower export "
                    f"writes them it is {expected[key]!r}"
                )


def _fields(values: JsonObject) -> JsonObject:
    """The fields of `two_tower.json`, validated."""
    known = (*NAMES, "mask_token_id", "block_size", "weights_sha256")
    if unknown := sorted(values.keys() - set(known)):
        raise ConfigError(f"{unknown[0]} is not a known field; known are {', '.join(known)}; update twotower")
    mask, block = values.get("mask_token_id"), values.get("block_size")
    if type(mask) is not int or mask < 0:
        raise ConfigError(f"mask_token_id is {mask!r}; it must be the id of a token")
    if block is not None and (type(block) is not int or block < 1):
        raise ConfigError(f"block_size is {block!r}; it must be a positive integer")
    digest = values.get("weights_sha256")
    if digest is not None and not isinstance(digest, str):
        raise ConfigError(f"weights_sha256 is {digest!r}; it must be a text")
    AdapterConfig.of(values.get("adapters"))  # they are not optional here
    return {
        "denoiser": DenoiserConfig.of(values),
        "mask_token_id": mask,
        "block_size": block,
        "weights_sha256": digest,
    }
