"""Reads the config.json of an autoregressive checkpoint, and says what cannot become two towers."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from twotower.checkpoint.reader import StoredTensor
from twotower.config import (
    ARCHITECTURE,
    GENERIC_MODEL_TYPE,
    MODEL_TYPE,
    GenericTwoTowerConfig,
    TwoTowerConfig,
    errors_of,
    read_object,
)
from twotower.errors import CheckpointError, ConfigError
from twotower.families import tower_spec
from twotower.json_text import JsonObject
from twotower.nemotron_h_fields import NemotronHFields

ADAPTER_FILE = "adapter_config.json"  # of a LoRA adapter, as peft writes it
ADAPTER_FIELDS = "two_tower.json"  # beside it, if twotower export wrote the adapter
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
_QUANTISED = re.compile(
    r"\.(qweight|qzeros|g_idx|weight_packed|weight_scale|weight_scale_inv|SCB|absmax|quant_map|weight_format)$"
    r"|\.quant_state\.|_blocks$|_scales$"
)
_QUANTISED_DTYPES = ("F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "I4", "U8")
_DEQUANTISED_BY_TRANSFORMERS = ("bitsandbytes", "fp8", "fbgemm_fp8", "mxfp4", "hqq", "compressed-tensors")
_ADAPTER = re.compile(r"lora_[AB]\b|lora_embedding_[AB]\b|\.base_layer\.")


def read_config(directory: Path) -> tuple[TwoTowerConfig, bool]:
    """The configuration of the two-tower model, and whether the source ties head and embedding.

    Raises:
        ConfigError, CheckpointError: there is no config.json, or its model cannot become two towers.
    """
    file = directory / "config.json"
    check_not_adapter(directory)
    raw = read_object(file, "give a checkpoint directory")
    if ARCHITECTURE in (raw.get("architectures") or ()) or raw.get("model_type") == GENERIC_MODEL_TYPE:
        raise ConfigError(
            f"{file}: already the config of a two-tower checkpoint; use it with twotower train or "
            "twotower generate, or write its autoregressive model alone: twotower export --to one-tower"
        )
    _check_not_quantised(file, raw)
    if raw.get("model_type") != MODEL_TYPE:
        with errors_of(file):
            config: TwoTowerConfig = GenericTwoTowerConfig(backbone=raw)
            return config, tower_spec(config).tied_head
    if not raw.keys() & {"hybrid_override_pattern", "layers_block_type", "layer_types"}:
        raise ConfigError(
            f"{file}: has no hybrid_override_pattern or layers_block_type, so the kinds of the layers are unknown"
        )
    with errors_of(file):
        return TwoTowerConfig(**_values(raw)), bool(raw.get("tie_word_embeddings"))


def untied(config: TwoTowerConfig) -> TwoTowerConfig:
    """The configuration of a generic backbone with a head of its own."""
    assert isinstance(config, GenericTwoTowerConfig)
    flag = {"tie_word_embeddings": False}
    backbone = config.backbone | flag
    if isinstance(text := backbone.get("text_config"), dict):
        backbone["text_config"] = text | flag
    return GenericTwoTowerConfig(backbone=backbone)


def check_tensor_names(stored: dict[str, StoredTensor]) -> None:
    """Raises CheckpointError if names or dtypes of tensors show quantised weights, or an adapter that is not merged."""
    for name, place in stored.items():
        if _ADAPTER.search(name):
            raise CheckpointError(
                f"{place.file}: has {name}, a tensor of an adapter that is not merged; merge it with peft's "
                "merge_and_unload(), and save the model again"
            )
        if _QUANTISED.search(name) or place.dtype in _QUANTISED_DTYPES:
            raise CheckpointError(
                f"{place.file}: {name} is stored as {place.dtype}, so the weights are quantised; " + _remedy(None)
            )


def check_not_adapter(directory: Path) -> None:
    """Raises CheckpointError for the directory of an adapter without the weights of its model."""
    if not (directory / ADAPTER_FILE).exists() or any(directory.glob("model*.safetensors")):
        return
    base = read_object(directory / ADAPTER_FILE, "").get("base_model_name_or_path")
    if (directory / ADAPTER_FIELDS).exists():
        name = base if isinstance(base, str) and base else "MODEL"
        raise CheckpointError(
            f"{directory}: has adapters alone, which twotower export wrote; twotower init --from {name} --adapters "
            f"{directory} makes a model of them"
        )
    raise CheckpointError(
        f"{directory}: is an adapter of {base!r} ({ADAPTER_FILE}), not a whole model; merge it with peft's "
        "merge_and_unload(), save the model, and convert that"
    )


def _check_not_quantised(file: Path, raw: JsonObject) -> None:
    parts = (("", raw), ("text_config.", raw.get("text_config")))
    for prefix, part in parts:
        for key in ("quantization_config", "compression_config"):
            given = part.get(key) if isinstance(part, dict) else None
            if not given:
                continue
            method = given.get("quant_method") if isinstance(given, dict) else given
            raise ConfigError(
                f"{file}: {prefix}{key} has quant_method {method!r}, so the weights are quantised; {_remedy(method)}"
            )


def _remedy(method: object) -> str:
    known = ", or save it with transformers' model.dequantize() first" if method in _DEQUANTISED_BY_TRANSFORMERS else ""
    return f"convert the original checkpoint in bf16 or fp32{known}"


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
