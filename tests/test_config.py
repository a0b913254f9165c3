"""`config.json`, the released one included: accepted, rejected and kept keys."""

from __future__ import annotations

import copy
import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, NemotronHConfig

from twotower import TwoTowerConfig
from twotower.errors import ConfigError, TwoTowerError
from twotower.nemotron_h_fields import NemotronHFields

FOLDERS = ("released", "midsize", "tiny-hybrid", "tiny-groups")


def written(folder: Path, **changes: Any) -> Path:
    """Writes the released config.json with some keys changed (None: removed)."""
    values = json.loads((Path(__file__).parent / "golden/tiny-hybrid/config.json").read_text()) | changes
    values = {key: value for key, value in values.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


# --- the released file --------------------------------------------------------------------------------------------


def test_released_config_with_infinity_is_read(golden_dir: Path) -> None:
    assert "Infinity" in (golden_dir / "released/config.json").read_text()
    backbone = TwoTowerConfig.read(golden_dir / "released").layer_fields
    pattern = backbone.hybrid_override_pattern
    assert {kind: pattern.count(kind) for kind in "M*E-"} == {"M": 23, "*": 6, "E": 23, "-": 0}
    assert (backbone.num_layers, backbone.hidden_size, backbone.vocab_size) == (52, 2688, 131072)
    assert backbone.time_step_limit == (0.0, math.inf)
    assert backbone.mamba_inner == 64 * 64
    assert backbone.conv_dim == 4096 + 2 * 8 * 128
    assert backbone.max_position_embeddings == 262144
    assert (backbone.n_routed_experts, backbone.num_experts_per_tok, backbone.routed_scaling_factor) == (128, 6, 2.5)


@pytest.mark.parametrize("name", FOLDERS)
def test_every_key_of_the_file_comes_back(golden_dir: Path, name: str) -> None:
    raw = json.loads((golden_dir / name / "config.json").read_text())
    raw.pop("transformers_version", None)  # transformers writes its own version
    if "torch_dtype" in raw:
        raw["dtype"] = raw.pop("torch_dtype")  # the only key that transformers 5 renames
    values = TwoTowerConfig.read(golden_dir / name).to_dict()
    assert {key: values.get(key, "lost") for key in raw} == raw


@pytest.mark.parametrize("name", FOLDERS)
def test_to_dict_round_trip(golden_dir: Path, name: str) -> None:
    config = TwoTowerConfig.read(golden_dir / name)
    again = TwoTowerConfig(**config.to_dict())
    assert again.to_dict() == config.to_dict()
    assert again.layer_fields == config.layer_fields


def test_transformers_reads_the_released_file_too(golden_dir: Path) -> None:
    config = AutoConfig.from_pretrained(golden_dir / "released")
    assert isinstance(config, NemotronHConfig)
    assert TwoTowerConfig.of(config).layer_fields == TwoTowerConfig.read(golden_dir / "released").layer_fields


def test_infinity_as_transformers_writes_it_is_read(golden_dir: Path, tmp_path: Path) -> None:
    config = TwoTowerConfig.read(golden_dir / "released")
    config.save_pretrained(tmp_path)
    assert "__float__" in (tmp_path / "config.json").read_text()
    assert TwoTowerConfig.read(tmp_path).layer_fields == config.layer_fields
    assert TwoTowerConfig.from_pretrained(tmp_path).layer_fields == config.layer_fields


# --- as an object -------------------------------------------------------------------------------------------------


def test_unknown_keys_are_kept(tmp_path: Path) -> None:
    config = TwoTowerConfig.read(written(tmp_path, flavour={"sweet": [1, 2]}, use_cache=False, temperature=0.7))
    assert config.flavour == {"sweet": [1, 2]}
    values = config.to_dict()
    assert (values["flavour"], values["use_cache"], values["temperature"]) == ({"sweet": [1, 2]}, False, 0.7)


def test_copies_and_pickles(golden_dir: Path) -> None:
    config = TwoTowerConfig.read(golden_dir / "released")
    assert copy.deepcopy(config) == config
    assert pickle.loads(pickle.dumps(config)) == config
    assert "NemotronHTwoTowerForCausalLM" in str(config)
    assert config.num_hidden_layers == 52


def test_a_changed_field_reaches_the_backbone() -> None:
    config = TwoTowerConfig(hybrid_override_pattern="M*", hidden_size=32)
    config.hidden_size = 48
    assert config.layer_fields.hidden_size == 48
    config.hybrid_override_pattern = "MM*"
    assert config.num_hidden_layers == config.layer_fields.num_layers == 3
    config.time_step_limit = [0.0, 0.1]
    assert config.layer_fields.time_step_limit == (0.0, 0.1)
    config.num_key_value_heads = 7
    with pytest.raises(ConfigError, match="num_key_value_heads, 7"):
        config.layer_fields  # noqa: B018 — built on access


def test_backbone_is_frozen() -> None:
    with pytest.raises(AttributeError):
        TwoTowerConfig().layer_fields.hidden_size = 3  # type: ignore[misc]


def test_both_spellings_of_the_layer_kinds() -> None:
    types = ["mamba", "attention", "moe", "mlp", "linear_attention", "full_attention"]
    for key in ("layers_block_type", "layer_types"):
        assert TwoTowerConfig(**{key: types}).hybrid_override_pattern == "M*E-M*"
        assert TwoTowerConfig(**{key: types}, hybrid_override_pattern="M*E-M*").num_hidden_layers == 6


def test_mask_token_is_three_by_convention() -> None:
    assert TwoTowerConfig().mask_token == 3
    assert "mask_token_id" not in TwoTowerConfig().to_dict()
    assert TwoTowerConfig(mask_token_id=7).mask_token == 7
    assert TwoTowerConfig(mask_token_id=7).to_dict()["mask_token_id"] == 7


def test_missing_key_value_heads_are_as_many_as_heads() -> None:
    assert TwoTowerConfig(num_attention_heads=4, num_key_value_heads=None).layer_fields.num_key_value_heads == 4


# --- errors -------------------------------------------------------------------------------------------------------

REFUSED = {
    "letter": (
        {"hybrid_override_pattern": "MXE", "num_hidden_layers": ...},
        r"hybrid_override_pattern 'MXE' has \['X'\]",
    ),
    "no layers": ({"hybrid_override_pattern": "", "num_hidden_layers": ...}, "has no layers"),
    "pattern not a string": ({"hybrid_override_pattern": 5}, "hybrid_override_pattern is 5; it must be a string"),
    "layer count": ({"num_hidden_layers": 9}, "num_hidden_layers is 9 but .*'MEM.EME' has 7 letters"),
    "block types disagree": ({"layers_block_type": ["mamba"]}, "layers_block_type means 'M'.*remove one of them"),
    "block type": ({"layers_block_type": ["mamba", "rnn"]}, "layers_block_type has 'rnn'"),
    "block types not a list": ({"layers_block_type": "mamba"}, "must be a list of layer kinds"),
    "zero": ({"hidden_size": 0}, "hidden_size is 0; it must be a positive integer"),
    "negative": ({"vocab_size": -5}, "vocab_size is -5"),
    "float for an int": ({"head_dim": 32.0}, "head_dim is 32.0"),
    "true for an int": ({"conv_kernel": True}, "conv_kernel is True"),
    "string for an int": ({"ssm_state_size": "16"}, "ssm_state_size is '16'"),
    "string for a float": ({"layer_norm_epsilon": "1e-5"}, "layer_norm_epsilon is '1e-5'; it must be a number"),
    "NaN": ({"routed_scaling_factor": math.nan}, "routed_scaling_factor is nan"),
    "string for a bool": ({"norm_topk_prob": "yes"}, "norm_topk_prob is 'yes'; it must be true or false"),
    "query heads": (
        {"num_key_value_heads": 3},
        "num_attention_heads is 4; it must be a multiple of num_key_value_heads, 3",
    ),
    "Mamba groups": ({"n_groups": 3}, "mamba_num_heads is .*multiple of n_groups, 3"),
    "expert groups": ({"n_group": 3}, "n_routed_experts is 8; it must be a multiple of n_group, 3"),
    "experts": ({"num_experts_per_tok": 9}, "num_experts_per_tok is 9 but n_routed_experts only 8"),
    "kept groups": ({"topk_group": 2}, "topk_group is 2; it must be at most n_group, 1"),
    "step limit order": ({"time_step_limit": [0.5, 0.1]}, "time_step_limit is .0.5, 0.1."),
    "step limit number": ({"time_step_limit": 0.1}, "time_step_limit is 0.1; it must be two numbers"),
    "step limit length": ({"time_step_limit": [0.1]}, "it must be two numbers"),
    "step limit text": ({"time_step_limit": [0.0, "big"]}, "it must be two numbers"),
    "activation": ({"mlp_hidden_act": "gelu"}, "mlp_hidden_act is 'gelu'; only 'relu2' is supported"),
    "tied": ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
    "window": ({"sliding_window": 128}, "sliding_window is 128"),
    "latent experts": ({"moe_latent_size": 0}, "moe_latent_size is 0; it must be a positive integer, or absent"),
    "mask token": ({"mask_token_id": 256}, "mask_token_id is 256; it must be a token id from 0 to 255"),
    "dtype": ({"torch_dtype": "bloat16"}, "torch_dtype is 'bloat16'"),
    "model type": ({"model_type": "llama"}, "model_type is 'llama'; a two-tower model has 'nemotron_h'"),
    "no pattern": ({"hybrid_override_pattern": ...}, "has no hybrid_override_pattern"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_errors_name_file_field_and_value(tmp_path: Path, case: str) -> None:
    changes, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message) as caught:
        TwoTowerConfig.read(written(tmp_path, **changes))
    assert str(tmp_path / "config.json") in str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, TwoTowerError)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not readable as JSON"),
        ("[1]", "contains a list"),
        ("", "not readable as JSON"),
        (b"\xff\xfe\x00", "not readable as JSON"),
    ],
)
def test_a_file_that_is_not_a_config(tmp_path: Path, content: str | bytes, message: str) -> None:
    (tmp_path / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=message):
        TwoTowerConfig.read(tmp_path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        TwoTowerConfig.read(tmp_path)
    with pytest.raises(ConfigError, match="no such file"):
        TwoTowerConfig.read(tmp_path / "elsewhere")


def test_direct_construction_is_checked_too() -> None:
    with pytest.raises(ConfigError, match="hidden_size"):
        NemotronHFields(hybrid_override_pattern="M", hidden_size=0, vocab_size=8)
