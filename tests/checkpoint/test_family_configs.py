"""How families read config.json: fields are read, refused or known to have no effect; spellings mean the same."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_backbones import SHAPES, VOCAB, hf_config, hub_spelling, in_float64
from transformers import (
    CONFIG_MAPPING,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
)

from twotower import TwoTowerForCausalLM
from twotower.checkpoint.convert import convert
from twotower.config import GenericTwoTowerConfig, JsonObject
from twotower.errors import ConfigError
from twotower.families import BY_MODEL_TYPE, tower_spec

# Fields that change nothing of what a model computes, by reason.
WITHOUT_EFFECT = {
    "attention_dropout", "embd_pdrop", "resid_pdrop", "router_jitter_noise",  # only in transformers' training
    "output_router_logits", "router_aux_loss_coef", "z_loss_coefficient", "num_logits_to_keep",  # of the loss
    "mamba_expand", "mamba_d_ssm", "expand",  # the configuration checks that they agree with the heads and their size
    "rescale_prenorm_residual", "time_step_rank",  # of the initial weights; of Mamba-1
    "bos_token_id", "eos_token_id", "pad_token_id",  # read for both towers by GenericTwoTowerConfig
    "use_cache", "pretraining_tp",
}  # fmt: skip
# Fields from which transformers' configuration class computes another field, with a value that changes the tower.
DERIVED: dict[str, JsonObject] = {
    "qwen2": {"use_sliding_window": False, "max_window_layers": 2},
    "qwen3": {"use_sliding_window": True, "max_window_layers": 2},
    "qwen2_moe": {"use_sliding_window": True, "max_window_layers": 3},
    "qwen3_moe": {"use_sliding_window": True},
    "smollm3": {"no_rope_layer_interval": 2},
}
ON = {"qwen3": {"use_sliding_window": True}, "qwen2_moe": {"use_sliding_window": True}}
# Fields that transformers' model of a family does not read, though its configuration has them.
UNREAD = {
    "gemma3_text": {"attn_logit_softcapping"},
}


def configurations(model_type: str) -> list[PretrainedConfig]:
    return [hf_config(name) for name in SHAPES if name.partition(":")[0] == model_type]


def fields_read(config: PretrainedConfig) -> set[str]:
    """The attributes that the family reads from a configuration."""
    read = set()

    class Recorder(type(config)):  # type: ignore[misc]
        def __getattribute__(self, name: str) -> Any:
            read.add(name)
            return super().__getattribute__(name)

    config.__class__ = Recorder
    BY_MODEL_TYPE[config.model_type].spec(config)
    return read


def own_fields(model_type: str) -> set[str]:
    every = {field.name for field in dataclasses.fields(CONFIG_MAPPING[model_type])}
    return every - {field.name for field in dataclasses.fields(PretrainedConfig)}


@pytest.mark.parametrize("model_type", BY_MODEL_TYPE)
def test_every_field_is_read_or_has_no_effect(model_type: str) -> None:
    assert configurations(model_type), "SHAPES has no tiny model of this family"
    read = set().union(*map(fields_read, configurations(model_type)))
    known = read | WITHOUT_EFFECT | set(DERIVED.get(model_type, ())) | UNREAD.get(model_type, set())
    assert own_fields(model_type) - known - {"num_hidden_layers"} == set()  # the number of `layer_types`
    assert read & UNREAD.get(model_type, set()) == set()


@pytest.mark.parametrize(("model_type", "field"), [(kind, field) for kind in DERIVED for field in DERIVED[kind]])
def test_derived_fields_change_the_tower(model_type: str, field: str) -> None:
    base = {**SHAPES[model_type], **ON.get(model_type, {}), "sliding_window": 20, "max_window_layers": 1}
    changed = {**base, field: DERIVED[model_type][field]}
    if field == "use_sliding_window":
        base["use_sliding_window"] = not changed["use_sliding_window"]
    assert spec_of(model_type, base) != spec_of(model_type, changed)


def spec_of(model_type: str, options: JsonObject) -> Any:
    config = hf_config(model_type, options).to_dict()
    return tower_spec(GenericTwoTowerConfig(backbone=config))


@pytest.mark.parametrize("model_type", ["qwen2_moe", "qwen3_moe", "qwen3_next"])
def test_a_model_of_no_experts_is_dense(model_type: str) -> None:
    """As in transformers, with whatever number of experts for a token."""
    spec = spec_of(model_type, {**SHAPES[model_type], "num_experts": 0, "num_experts_per_tok": 2})
    assert spec.pattern.count("-") == 3
    assert "E" not in spec.pattern


# Options of some families. Files of other families may have them as leftovers, which transformers' models ignore.
STRAYS: JsonObject = {
    "sliding_window": 5,
    "use_sliding_window": True,
    "layer_types": ["sliding_attention"] * 3,
    "mlp_bias": True,
    "attention_bias": True,
    "final_logit_softcapping": 3.0,
    "attn_logit_softcapping": 3.0,
    "query_pre_attn_scalar": 7,
    "logits_scaling": 3.0,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 3.0,
    "attention_multiplier": 3.0,
    "no_rope_layers": [0, 0, 0],
    "norm_topk_prob": True,
    "shared_expert_intermediate_size": 8,
    "num_shared_experts": 2,
    "clip_qkv": 3.0,
}


@pytest.mark.parametrize(
    ("model_type", "field"),
    [(kind, field) for kind in BY_MODEL_TYPE for field in STRAYS if field not in own_fields(kind)],
)
def test_fields_of_other_families_change_nothing(model_type: str, field: str) -> None:
    config = hf_config(model_type).to_dict()
    expected = tower_spec(GenericTwoTowerConfig(backbone=config))
    with suppress(ConfigError):  # some configurations refuse the field
        assert tower_spec(GenericTwoTowerConfig(backbone={**config, field: STRAYS[field]})) == expected


@pytest.mark.parametrize("name", [name for name in SHAPES if not name.startswith("nemotron_h")])
@pytest.mark.parametrize("type_key", ["rope_type", "type"])
def test_all_spellings_give_the_same_tower(name: str, type_key: str) -> None:
    written = json.loads(json.dumps(hf_config(name).to_dict() | {"dtype": "float32"}))
    expected = tower_spec(GenericTwoTowerConfig(backbone=written))
    older = hub_spelling(written, type_key)
    assert older != written
    if type_key == "type" and "full_attention" in written.get("rope_parameters", ()) and older["rope_scaling"]:
        with pytest.raises(ConfigError, match="write it as rope_type"):  # transformers would not scale
            tower_spec(GenericTwoTowerConfig(backbone=older))
        return
    assert tower_spec(GenericTwoTowerConfig(backbone=older)) == expected
    nested = {"model_type": "gemma3", "text_config": older, "vision_config": {"hidden_size": 5}}
    assert tower_spec(GenericTwoTowerConfig(backbone=nested)) == expected


def test_a_scaling_that_depends_on_the_text_is_refused() -> None:
    dynamic = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}
    with pytest.raises(ConfigError, match="rope_type is 'dynamic'"):
        spec_of("llama", dynamic)


@pytest.mark.parametrize(
    ("model_type", "options", "message"),
    [
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ("olmo3", {"layer_types": ["chunked_attention"] * 3}, "layer_types has 'chunked_attention'"),
        ("smollm3", {"layer_types": ["sliding_attention"] * 3}, "use_sliding_window is false"),
        ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers|index"),
        ("mistral", {"sliding_window": 0}, "sliding_window is 0"),
        ("granite", {"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ("gemma2", {"hidden_activation": "quick_gelu"}, "hidden_activation is 'quick_gelu'"),
    ],
)
def test_values_that_are_not_supported_are_refused(model_type: str, options: JsonObject, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tower_spec(GenericTwoTowerConfig(backbone={**hf_config(model_type, {}).to_dict(), **options}))


def gemma3() -> PreTrainedModel:
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    config = Gemma3Config(
        text_config=hf_config("gemma3_text").to_dict(), vision_config=vision, mm_tokens_per_image=4,
        boi_token_index=4, eoi_token_index=5, image_token_index=6,
    )  # fmt: skip
    return Gemma3ForConditionalGeneration._from_config(config, attn_implementation="eager")


def qwen3_5() -> PreTrainedModel:
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "depth": 1, "num_heads": 2, "out_hidden_size": 48,
        "num_position_embeddings": 16, "patch_size": 2,
    }  # fmt: skip
    config = Qwen3_5Config(
        text_config=hf_config("qwen3_5_text").to_dict(), vision_config=vision, image_token_id=4, video_token_id=5,
        vision_start_token_id=6, vision_end_token_id=7,
    )  # fmt: skip
    return Qwen3_5ForConditionalGeneration._from_config(config, attn_implementation="eager")


@pytest.mark.parametrize("whole", [gemma3, qwen3_5])
def test_the_text_model_of_a_multimodal_file(whole: Callable[[], PreTrainedModel], tmp_path: Path) -> None:
    """Models with vision, which transformers writes with `text_config` and other names of tensors."""
    torch.manual_seed(0)
    theirs = whole().eval()
    theirs.save_pretrained(tmp_path / "ar")
    convert(tmp_path / "ar", tmp_path / "two", mask_token=3)
    model = TwoTowerForCausalLM.from_pretrained(tmp_path / "two", dtype=torch.float64)
    ids = torch.randint(8, VOCAB, (2, 70), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(), in_float64(theirs) as exact:
        expected = exact(ids).logits
    with torch.inference_mode():
        logits = model(ids).logits
    assert (logits - expected).abs().max() <= 1e-9 * expected.abs().max()
