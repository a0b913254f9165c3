"""Reads a one-tower checkpoint: transformers' or NVIDIA's Nemotron-H, dense or MoE, in either layout."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from twotower.checkpoint import names, pretrained, reader
from twotower.checkpoint.names import TensorEntry
from twotower.checkpoint.reader import StoredTensor
from twotower.checkpoint.writer import TensorToWrite, write_shards
from twotower.config import ARCHITECTURE, MASK_TOKEN_ID, MODEL_TYPE, BackboneConfig, TwoTowerConfig, read_object
from twotower.errors import ArgumentError, CheckpointError, ConfigError
from twotower.model.towers import TwoTowerModel
from twotower.tokenizer import Tokenizer

SUPPORTED = f"a backbone of the Nemotron-H family (model_type {MODEL_TYPE}, dense or MoE) is needed"
_EXTRA_HEADS = re.compile(r"(?:^|\.)mtp")  # multi-token prediction: heads that draft, which the denoiser replaces
# What config.json says of the old file, its code or those heads, and not of the model.
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
    """A checkpoint whose headers have been checked against its config.

    model: the two-tower model it makes, without storage; places: (name in a tower, expert) → where it is stored.
    """

    directory: Path
    model: TwoTowerModel
    stored: dict[str, StoredTensor]
    places: dict[tuple[str, int | None], TensorEntry]
    notes: tuple[str, ...]


def read(directory: Path) -> OneTowerCheckpoint:
    """Config and headers; no weights.

    Raises:
        ConfigError, CheckpointError: no Nemotron-H backbone, a config no model can be built from, a damaged file, a
            tensor missing, surplus, of the wrong shape or kind.
    """
    config, tied = _config(directory / "config.json")
    found = reader.read_headers(directory)
    if any(name.startswith("context_tower.") for name in found):
        raise CheckpointError(f"{directory}: is already a two-tower checkpoint; it needs no conversion")
    stored = {name: place for name, place in found.items() if not _EXTRA_HEADS.search(name)}
    root = next((root for root in ("backbone.", "model.") if any(name.startswith(root) for name in stored)), None)
    if root is None:
        raise CheckpointError(f"{directory}: has no tensors named backbone.* or model.*; {SUPPORTED}")
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
        yield f"{extra} tensors of multi-token prediction (mtp.*) are left out; the denoiser takes their place"
    if not has_head and tied:
        yield "the embedding is tied to the head; both heads are copies of it, and no longer tied"
    elif not has_head:
        yield "there is no lm_head.weight, though config.json does not tie it; both heads are copies of the embedding"


def _config(file: Path) -> tuple[TwoTowerConfig, bool]:
    """The configuration of the model to be made, and whether the embeddings are tied."""
    raw = read_object(file, "a checkpoint directory has one")
    if ARCHITECTURE in (raw.get("architectures") or ()):
        raise ConfigError(f"{file}: is that of a two-tower checkpoint already; it needs no conversion")
    if raw.get("model_type") != MODEL_TYPE:
        raise ConfigError(f"{file}: model_type is {raw.get('model_type')!r}; {SUPPORTED}")
    if not raw.keys() & {"hybrid_override_pattern", "layers_block_type", "layer_types"}:
        raise ConfigError(f"{file}: has no hybrid_override_pattern or layers_block_type; its layers' kinds are unknown")
    if raw.get("quantization_config"):
        raise ConfigError(f"{file}: the weights are quantised; convert the bf16 checkpoint they were made from")
    try:
        return TwoTowerConfig(**_values(raw)), bool(raw.get("tie_word_embeddings"))
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None


def _values(raw: dict[str, object]) -> dict[str, object]:
    """The keys as `TwoTowerConfig` takes them. What a dense model leaves out may also be null or 0."""
    own = {field.name: field.type for field in dataclasses.fields(BackboneConfig)}
    values: dict[str, object] = {}
    for key, value in raw.items():
        name = _OLDER_NAMES.get(key, key)
        absent = value is None or (value == 0 and own.get(name) == "int")
        if name in _DROPPED or (name != key and name in raw):
            continue
        if absent and name in own and name != "num_key_value_heads":  # null has a meaning there
            continue
        values[name] = value
    return values


def write(directory: Path, weights: dict[str, torch.Tensor], config: TwoTowerConfig, tokenizer: Tokenizer) -> None:
    """A one-tower checkpoint in the original layout, which transformers' NemotronHForCausalLM and `read` both take.

    weights: a tower's tensors under their names in memory (experts stacked).
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
    (directory / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
    tokenizer.save_pretrained(directory)


# --- vocabulary ----------------------------------------------------------------------------------------------------


def tokenizer_of(directory: Path) -> Tokenizer | None:
    """The tokenizer beside the weights, or None.

    Raises:
        CheckpointError: its files are damaged.
    """
    try:
        return pretrained.load_tokenizer(directory)
    except Exception as error:  # tokenizers raise many kinds; the user needs one line
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{directory}: its tokenizer cannot be read ({first}); fetch it again") from None


def mask_token(given: int | None, config: TwoTowerConfig, tokenizer: Tokenizer | None) -> int:
    """The mask's id: as given, else the config's, else the tokenizer's, else 3.

    Raises:
        CheckpointError: the tokenizer has ids beyond the embedding.
        ArgumentError: an id that is not in the vocabulary, or that ends, begins or pads a text.
    """
    size = config.vocab_size
    largest = max(tokenizer.get_vocab().values(), default=-1) if tokenizer is not None else -1
    if tokenizer is not None and largest >= size:
        raise CheckpointError(
            f"{tokenizer.name_or_path}: the tokenizer has ids up to {largest}, but vocab_size is {size}; "
            "they do not belong together"
        )
    candidates = (given, config.mask_token_id, getattr(tokenizer, "mask_token_id", None), MASK_TOKEN_ID)
    mask = next(candidate for candidate in candidates if candidate is not None)
    if not 0 <= mask < size:
        raise ArgumentError(f"the mask token id is {mask}, and vocab_size {size}; give an id from 0 to {size - 1}")
    for source in (config, tokenizer):
        for role in ("eos", "bos", "pad"):
            ids = getattr(source, f"{role}_token_id", None)
            if mask in (ids if isinstance(ids, list | tuple) else [ids]):
                raise ArgumentError(
                    f"the mask token id is {mask}, which is the {role} token; give one that no text contains"
                )
    return mask


def is_ordinary_token(mask: int, tokenizer: Tokenizer | None) -> bool:
    """Whether the tokenizer can produce the id from ordinary text."""
    if tokenizer is None or mask not in tokenizer.get_vocab().values() or mask in tokenizer.all_special_ids:
        return False
    added = tokenizer.added_tokens_decoder.get(mask)
    return added is None or not added.special
