"""Nemotron-H in GGUF files (architectures `nemotron_h` and `nemotron_h_moe`), which transformers does not read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

from twotower.config import TwoTowerConfig
from twotower.errors import ConfigError
from twotower.json_text import JsonObject
from twotower.specs import LayerKind

ARCHITECTURES = ("nemotron_h", "nemotron_h_moe")
# A tensor that tells the kind of its layer.
_MARKS: dict[str, LayerKind] = {"ssm_in": "M", "attn_q": "*", "ffn_gate_inp": "E", "ffn_up": "-"}
# Metadata of the architecture → key of config.json.
_KEYS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "layer_norm_epsilon",
    "ssm.conv_kernel": "conv_kernel",
    "ssm.state_size": "ssm_state_size",
    "ssm.group_count": "n_groups",
    "ssm.time_step_rank": "mamba_num_heads",
    "expert_count": "n_routed_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "moe_shared_expert_intermediate_size",
    "expert_weights_norm": "norm_topk_prob",
    "expert_weights_scale": "routed_scaling_factor",
    "expert_group_count": "n_group",
    "expert_group_used_count": "topk_group",
    "moe_latent_size": "moe_latent_size",
    "attention.head_count_kv": "num_key_value_heads",  # a list, 0 for layers of other kinds
    "feed_forward_length": "intermediate_size",
}
_OTHER_NAMES = {"A_log": "", "D": "", "dt_bias": ".bias", "e_score_correction_bias": ".bias"}


class Metadata(Protocol):
    """What `GGUFFile` says about a file."""

    path: Path

    def value(self, key: str, default: object = None) -> object: ...

    def own(self, key: str, default: object = None) -> object: ...

    def tensor_names(self) -> Iterable[str]: ...


def config_of(file: Metadata) -> TwoTowerConfig:
    """The configuration of the model of a file.

    Raises:
        ConfigError: a layer has no tensor that tells its kind, or a value is not allowed.
    """
    kinds: dict[int, LayerKind] = {}
    names = set(file.tensor_names())
    for name in names:
        found = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
        if found is not None and found[2] in _MARKS:
            kinds[int(found[1])] = _MARKS[found[2]]
    layers = _number(file.own("block_count"))
    if sorted(kinds) != list(range(layers)):
        raise ConfigError(
            f"{file.path}: block_count is {layers}, but {len(kinds)} layers have tensors; download it again"
        )
    values: JsonObject = {"hybrid_override_pattern": "".join(kinds[i] for i in range(layers))}
    for key, name in _KEYS.items():
        value = file.own(key)
        if key == "expert_feed_forward_length" and isinstance(value, list) and len({*value} - {0}) > 1:
            raise ConfigError(
                f"{file.path}: layers have experts of different widths, as an export with MLPs beside experts has; "
                "convert the original checkpoint"
            )
        if isinstance(value, list):
            value = max(value, default=0)
        if isinstance(value, float):
            value = float(f"{value:.7g}")  # stored in fp32
        if value not in (None, 0):
            values[name] = value
    tokens = file.value("tokenizer.ggml.tokens")
    values["vocab_size"] = len(tokens) if isinstance(tokens, list) else file.own("vocab_size")
    inner = _number(file.own("ssm.inner_size"))
    if inner and "mamba_num_heads" in values:
        values["mamba_head_dim"] = inner // _number(values["mamba_num_heads"])
    for key, bias in (("use_conv_bias", "ssm_conv1d"), ("mlp_bias", "ffn_up"), ("attention_bias", "attn_q")):
        values[key] = any(name.endswith(f".{bias}.bias") for name in names)
    for role, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("mask", "mask")):
        token = file.value(f"tokenizer.ggml.{key}_token_id")
        if token is not None:
            values[f"{role}_token_id"] = token
    try:
        return TwoTowerConfig(**values)
    except ConfigError as error:
        raise ConfigError(f"{file.path}: {error}") from None


def candidates(name: str) -> Iterator[tuple[str, str]]:
    """A name on disk → names that gguf's table may have, each with the suffix of the name in the file."""
    module, _, leaf = name.rpartition(".")
    if leaf in ("weight", "bias"):
        options = [(module, f".{leaf}")]
    else:
        renamed = {"dt_bias": "dt_proj", "e_score_correction_bias": "e_score_correction"}.get(leaf, leaf)
        options = [(f"{module}.{renamed}", _OTHER_NAMES.get(leaf, ".weight"))]
    for found, suffix in options:
        yield found, suffix
        yield found.replace("backbone.", "model.", 1).replace(".mixer.", ".mlp."), suffix


class Processor:
    """Undoes what llama.cpp's converter does to the values of Nemotron-H."""

    def process(self, weights: np.ndarray, name: str, **kwargs: object) -> tuple[np.ndarray, str, object]:
        """decay −exp(A_log) → A_log. Shapes are restored by the caller."""
        return (np.log(-weights) if name.endswith("ssm_a") else weights), name, {}


def _number(value: object) -> int:
    return value if isinstance(value, int) else 0
