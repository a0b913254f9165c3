"""Reads a GGUF file of an autoregressive model, tensor by tensor, as the source of a two-tower checkpoint.

Names and the order of rows are translated with the tables of `gguf` and transformers. What transformers translates no
configuration for is refused, except Nemotron-H, which is translated here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from twotower.checkpoint import gguf_nemotron_h, gguf_rope
from twotower.checkpoint.names import DiskLayout, TensorEntry, one_tower_entries
from twotower.config import GenericTwoTowerConfig, TwoTowerConfig
from twotower.errors import CheckpointError, ConfigError, TwoTowerError, install_command
from twotower.families import family_of
from twotower.json_text import JsonObject
from twotower.model.towers import TwoTowerModel
from twotower.tokenizer import Tokenizer

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor

SUFFIX = ".gguf"
_MAGIC = b"GGUF"
_EXPERT = re.compile(r"\.experts\.\d+\.")
# Metadata that changes what the model computes, and that transformers does not translate.
_CHANGES = re.compile(r"attention\.(?:clamp|scale|max_alibi)|logit_scale|residual_scale|embedding_scale")


# Metadata of the architecture that transformers does not translate for every family → key of config.json.
_NOT_TRANSLATED = {
    "attention.key_length": "head_dim",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}


class TensorProcessor(Protocol):
    """transformers' translation of the values of one architecture."""

    def process(self, weights: np.ndarray, name: str, **kwargs: object) -> tuple[np.ndarray, str, object]: ...


class GGUFFile:
    """A GGUF file: the configuration of its model, and its tensors under the names that the model's family gives.

    Raises:
        CheckpointError: it is not a complete GGUF file, or a tensor has no place in the model.
        ConfigError: its model is not supported.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._reader = _open(path)
        self.architecture = str(self.value("general.architecture"))
        self._tensors: dict[str, ReaderTensor] = {tensor.name: tensor for tensor in self._reader.tensors}
        self._scaled = False
        self._check_factors()
        if self.architecture in gguf_nemotron_h.ARCHITECTURES:
            self.config: TwoTowerConfig = gguf_nemotron_h.config_of(self)
            self._processor: TensorProcessor = gguf_nemotron_h.Processor()
        else:
            self.config = GenericTwoTowerConfig(backbone=self._backbone())
            self._processor = _processor(self.architecture, self.config)
        with torch.device("meta"):
            self.model = TwoTowerModel(self.config)
        self.entries = one_tower_entries(self.model, DiskLayout(*family_of(self.config).roots[0]))
        self._names = self._translate(self.entries)

    # --- metadata -------------------------------------------------------------------------------------------------

    def has(self, key: str) -> bool:
        """Whether the file has a metadata key."""
        return key in self._reader.fields

    def value(self, key: str, default: object = None) -> object:
        """A value of the metadata: a number, a string, or a list."""
        field = self._reader.fields.get(key)
        return default if field is None else field.contents()

    def own(self, key: str, default: object = None) -> object:
        """A value of the model's architecture: `value` of "<architecture>.<key>"."""
        return self.value(f"{self.architecture}.{key}", default)

    def own_keys(self) -> Iterable[str]:
        """The keys that `own` knows."""
        start = f"{self.architecture}."
        return (key.removeprefix(start) for key in self._reader.fields if key.startswith(start))

    def tensor_names(self) -> Iterable[str]:
        return self._tensors.keys()

    def values(self, name: str) -> np.ndarray:
        """The values of a tensor in fp32, as they are in the file."""
        from gguf.quants import dequantize

        tensor = self._tensors[name]
        return np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)

    def _backbone(self) -> JsonObject:
        """The config.json of the model, as transformers translates the metadata."""
        from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

        try:
            values: JsonObject = load_gguf_checkpoint(str(self.path), return_tensors=False)["config"]
        except Exception as error:  # transformers raises several types
            raise ConfigError(
                f"{self.path}: transformers cannot read a GGUF of architecture {self.architecture!r} "
                f"({str(error).splitlines()[0]}); convert the original checkpoint"
            ) from None
        for key, name in _NOT_TRANSLATED.items():
            if (value := self.own(key)) is not None:
                values.setdefault(name, value)
        for role, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
            token = self.value(f"tokenizer.ggml.{key}_token_id")
            if token is not None:
                values[f"{role}_token_id"] = token
        values.pop("_model_name_or_path", None)
        scaling = gguf_rope.scaling_of(self, values)
        self._scaled = "rope_scaling" in scaling
        if self.architecture == "phi3":
            heads, width = (self.own(key) for key in ("attention.head_count", "embedding_length"))
            assert isinstance(heads, int)
            assert isinstance(width, int)
            scaling |= gguf_rope.partial_of(self, width / heads)
        return values | scaling

    def _check_factors(self) -> None:
        ignored = [key for key in self._reader.fields if _CHANGES.search(key) and self.value(key) not in ("none", 1.0)]
        if ignored:
            raise ConfigError(
                f"{self.path}: {ignored[0]} scales a product, and cannot be translated to a config.json; convert the "
                "original checkpoint"
            )

    # --- tensors --------------------------------------------------------------------------------------------------

    def _translate(self, entries: list[TensorEntry]) -> dict[str, str]:
        """The name in the file of each tensor, by the name that the family gives."""
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

        kind = next((arch for arch, name in MODEL_ARCH_NAMES.items() if name == self.architecture), None)
        if kind is None:
            raise ConfigError(f"{self.path}: gguf knows no architecture {self.architecture!r}; update the package gguf")
        table = get_tensor_name_map(kind, self.model.spec.layers[-1].source + 1)
        names, missing = {}, []
        for entry in entries:
            found = self._name_of(entry.disk, table.get_name)
            if found is None or found not in self._tensors:
                missing.append(entry.disk)
            else:
                names[entry.disk] = found
        read = set(names.values()) | (gguf_rope.TENSORS if self._scaled else set())
        surplus = sorted(set(self._tensors) - read)
        if missing or surplus:
            what = f"has no tensor for {missing[0]}" if missing else f"has {surplus[0]}, which the model does not have"
            raise CheckpointError(
                f"{self.path}: {what}; is the file complete, and its architecture {self.architecture!r}?"
            )
        return names

    def _name_of(self, disk: str, get_name: NameTable) -> str | None:
        """The name in the file of a tensor with this name on disk; an expert's is that of the stacked experts."""
        stacked = _EXPERT.sub(".experts.", disk)
        for name, suffix in gguf_nemotron_h.candidates(stacked):
            if (found := get_name(name)) is not None:
                return found + suffix
        return None

    def dtype(self, entry: TensorEntry) -> torch.dtype:
        """fp32 if the embeddings are stored in fp32, else bf16: quantised values are dequantised."""
        from gguf import GGMLQuantizationType

        embeddings = self._tensors["token_embd.weight"].tensor_type
        return torch.float32 if embeddings == GGMLQuantizationType.F32 else torch.bfloat16

    def read(self, entry: TensorEntry) -> Tensor:
        """The piece of an entry of `entries` in fp32; only its rows are dequantised."""
        from gguf.quants import dequantize

        tensor = self._tensors[self._names[entry.disk]]
        data = tensor.data if entry.expert is None else tensor.data[entry.expert]
        weights = dequantize(data, tensor.tensor_type)
        weights, _, _ = self._processor.process(weights, tensor.name)
        found = torch.from_numpy(np.array(weights, dtype=np.float32))
        found = found[entry.index] if entry.index and entry.expert is None else found
        if found.numel() != np.prod(entry.shape):
            raise CheckpointError(
                f"{self.path}: {tensor.name} has shape {list(found.shape)}; the metadata mean {list(entry.shape)}"
            )
        return found.reshape(entry.shape)

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer of the file, with its chat template; None if transformers cannot translate it."""
        from transformers import AutoTokenizer

        if not self.has("tokenizer.ggml.tokens"):
            return None
        try:
            return cast(Tokenizer, AutoTokenizer.from_pretrained(self.path.parent, gguf_file=self.path.name))
        except Exception:  # transformers raises many types; the checkpoint is complete without a tokenizer
            return None


class NameTable(Protocol):
    """`gguf.TensorNameMap.get_name`."""

    def __call__(self, key: str) -> str | None: ...


def require_package() -> None:
    """Raises TwoTowerError if the package `gguf` is not installed."""
    try:
        import gguf  # noqa: F401
    except ModuleNotFoundError:
        raise TwoTowerError(f"a GGUF file needs the package `gguf`: {install_command('gguf')}") from None


def _open(path: Path) -> GGUFReader:
    require_package()
    from gguf import GGUFReader

    _check_start(path)
    try:
        return GGUFReader(path)
    except Exception:  # the reader raises several types, with the words of numpy
        raise CheckpointError(f"{path}: the GGUF file is truncated or damaged; download it again") from None


def _check_start(path: Path) -> None:
    """Raises CheckpointError if a path is not a file that begins as a GGUF file of a version that gguf reads."""
    from gguf.gguf_reader import READER_SUPPORTED_VERSIONS

    try:
        with path.open("rb") as file:
            start = file.read(8)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; check the path") from None
    except IsADirectoryError:
        raise CheckpointError(f"{path}: is a directory; give a file, such as {path}/model.gguf") from None
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror}); check the path and its permissions"
        ) from None
    if start[:4] != _MAGIC:
        raise CheckpointError(
            f"{path}: not a GGUF file, because it begins with {start[:4]!r} and not with {_MAGIC!r}; give a GGUF file"
        )
    versions = [int.from_bytes(start[4:], order) for order in ("little", "big")]
    if len(start) == 8 and not set(versions) & set(READER_SUPPORTED_VERSIONS):
        raise CheckpointError(
            f"{path}: GGUF version {versions[0]}, which the package gguf cannot read; update the package, or convert "
            "the file to version 3"
        )


def _processor(architecture: str, config: TwoTowerConfig) -> TensorProcessor:
    """transformers' translation of the values of an architecture."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS
    from transformers.modeling_gguf_pytorch_utils import TensorProcessor as Unchanged

    assert isinstance(config, GenericTwoTowerConfig)
    make = cast(Callable[..., TensorProcessor], TENSOR_PROCESSORS.get(architecture, Unchanged))
    return make(config=config.autoregressive.to_dict())
