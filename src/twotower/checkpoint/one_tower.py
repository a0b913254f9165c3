"""Reads a one-tower Nemotron-H checkpoint, dense or MoE, in the layout of transformers or of NVIDIA."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from twotower.checkpoint import names, pretrained, reader
from twotower.checkpoint.generation_config import GenerationDefaults
from twotower.checkpoint.names import TensorEntry
from twotower.checkpoint.reader import StoredTensor
from twotower.checkpoint.tokenizer_files import save_tokenizer
from twotower.checkpoint.writer import TensorToWrite, write_shards
from twotower.config import ARCHITECTURE, MASK_TOKEN_ID, MODEL_TYPE, BackboneConfig, TwoTowerConfig, read_object
from twotower.errors import ArgumentError, CheckpointError, ConfigError
from twotower.model.towers import TwoTowerModel
from twotower.tokenizer import Tokenizer

SUPPORTED = f"only Nemotron-H models (model_type {MODEL_TYPE}, dense or MoE) can be converted"
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


@dataclass(frozen=True, kw_only=True)
class OneTowerCheckpoint:
    """A checkpoint whose headers match its config.

    model: the two-tower model of the conversion, on the meta device. places: see `names.one_tower_entries`.
    """

    directory: Path
    model: TwoTowerModel
    stored: dict[str, StoredTensor]
    places: dict[tuple[str, int | None], TensorEntry]
    notes: tuple[str, ...]


def read(directory: Path) -> OneTowerCheckpoint:
    """Reads config and headers, but no weights.

    Raises:
        ConfigError, CheckpointError: the model is not Nemotron-H, the config is not valid, a file is damaged, or a
            tensor is missing, unexpected, or of a wrong shape.
    """
    config, tied = _config(directory / "config.json")
    found = reader.read_headers(directory)
    if any(name.startswith("context_tower.") for name in found):
        raise CheckpointError(f"{directory}: already a two-tower checkpoint; no conversion is needed")
    stored = {name: place for name, place in found.items() if not _EXTRA_HEADS.search(name)}
    root = next((root for root in ("backbone.", "model.") if any(name.startswith(root) for name in stored)), None)
    if root is None:
        raise CheckpointError(f"{directory}: no tensors named backbone.* or model.*; {SUPPORTED}")
    with torch.device("meta"):
        model = TwoTowerModel(config)
    places = names.one_tower_entries(model, stored, root)
    needed = list({entry.disk: entry for entry in places.values()}.values())
    reader.check_tensors(directory, stored, needed, needed, config.hybrid_override_pattern)
    return OneTowerCheckpoint(
        directory=directory,
        model=model,
        stored=stored,
        places=places,
        notes=tuple(_notes(len(found) - len(stored), "lm_head.weight" in stored, tied)),
    )


def _notes(extra: int, has_head: bool, tied: bool) -> Iterable[str]:
    if extra:
        yield f"{extra} tensors of multi-token prediction (mtp.*) are left out, because the denoiser replaces them"
    if not has_head and tied:
        yield "the head is tied to the embedding; the heads of both towers are untied copies of the embedding"
    elif not has_head:
        yield "lm_head.weight is missing, and config.json does not tie it; both heads are copies of the embedding"


def _config(file: Path) -> tuple[TwoTowerConfig, bool]:
    """The configuration of the two-tower model, and whether the source ties head and embedding."""
    raw = read_object(file, "give a checkpoint directory")
    if ARCHITECTURE in (raw.get("architectures") or ()):
        raise ConfigError(f"{file}: already the config of a two-tower checkpoint; no conversion is needed")
    if raw.get("model_type") != MODEL_TYPE:
        raise ConfigError(f"{file}: model_type is {raw.get('model_type')!r}; {SUPPORTED}")
    if not raw.keys() & {"hybrid_override_pattern", "layers_block_type", "layer_types"}:
        raise ConfigError(
            f"{file}: has no hybrid_override_pattern or layers_block_type, so the kinds of the layers are unknown"
        )
    if raw.get("quantization_config"):
        raise ConfigError(f"{file}: the weights are quantised; convert the original bf16 checkpoint")
    try:
        return TwoTowerConfig(**_values(raw)), bool(raw.get("tie_word_embeddings"))
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None


def _values(raw: dict[str, object]) -> dict[str, object]:
    """The keyword arguments of `TwoTowerConfig`. Keys that a dense model lacks may be absent, null or 0."""
    own = {field.name: field.type for field in dataclasses.fields(BackboneConfig)}
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
    to_write = []
    for entry in names.tensor_entries(model):
        part = entry.memory.removeprefix("context.")
        tensor = weights[part] if entry.expert is None else weights[part][entry.expert]
        disk = "lm_head.weight" if part == "head.weight" else entry.disk.replace("context_tower.", "backbone.", 1)
        to_write.append(TensorToWrite.of(disk, entry.shape, tensor))
    write_shards(directory, to_write)
    dtype = str(weights["embeddings.weight"].dtype).removeprefix("torch.")
    values = {key: value for key, value in pretrained.config_to_write(model).items() if key != "auto_map"}
    values |= {"architectures": ["NemotronHForCausalLM"], "torch_dtype": dtype, "tie_word_embeddings": False}
    (directory / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    save_tokenizer(tokenizer, directory)


# --- vocabulary ----------------------------------------------------------------------------------------------------


def mask_token(
    given: int | None, config: TwoTowerConfig, defaults: GenerationDefaults, tokenizer: Tokenizer | None
) -> int:
    """The id of the mask token: the given one, else that of the config, else that of the tokenizer, else 3.

    defaults: the contents of `generation_config.json`, whose EOS tokens must differ from the mask token.

    Raises:
        CheckpointError: the tokenizer has ids beyond the embedding.
        ArgumentError: the id is not in the vocabulary, or it is the EOS, BOS or padding token.
    """
    size = config.vocab_size
    largest = max(tokenizer.get_vocab().values(), default=-1) if tokenizer is not None else -1
    if tokenizer is not None and largest >= size:
        raise CheckpointError(
            f"{tokenizer.name_or_path}: the tokenizer has ids up to {largest}, but vocab_size is {size}; "
            "use the tokenizer of this model"
        )
    candidates = (given, config.mask_token_id, getattr(tokenizer, "mask_token_id", None), MASK_TOKEN_ID)
    mask = next(candidate for candidate in candidates if candidate is not None)
    if not 0 <= mask < size:
        raise ArgumentError(f"the mask token id is {mask}, but vocab_size is {size}; choose an id from 0 to {size - 1}")
    for source in (config, defaults, tokenizer):
        for role in ("eos", "bos", "pad"):
            ids = getattr(source, f"{role}_token_id", None)
            if mask in (ids if isinstance(ids, list | tuple) else [ids]):
                raise ArgumentError(
                    f"the mask token id is {mask}, which is the {role} token; choose a token that no text contains"
                )
    return mask


def is_ordinary_token(mask: int, tokenizer: Tokenizer | None) -> bool:
    """Whether the tokenizer can encode ordinary text to this id."""
    if tokenizer is None or mask not in tokenizer.get_vocab().values() or mask in tokenizer.all_special_ids:
        return False
    added = tokenizer.added_tokens_decoder.get(mask)
    return added is None or not added.special
