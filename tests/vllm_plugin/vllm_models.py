"""Tiny two-tower checkpoints with sizes that vLLM's CPU kernels have: heads of 32, widths that are multiples of 32."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from conftest import random_two_tower
from tiny_backbones import BASE, FAMILY_NAMES, SHAPES, save_tokenizer
from transformers import CONFIG_MAPPING

from twotower import TwoTowerForCausalLM
from twotower.config import GenericTwoTowerConfig, TwoTowerConfig
from twotower.denoiser_fields import DenoiserConfig

WIDTHS: dict[str, Any] = {
    "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128,
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64, "shared_intermediate_size": 64,
    "mamba_d_head": 32, "mamba_d_ssm": 256, "mamba_d_state": 32, "state_size": 32, "head_dim": 32,
    "linear_key_head_dim": 32, "linear_value_head_dim": 32, "ssm_state_size": 32, "mamba_head_dim": 32,
    "moe_shared_expert_intermediate_size": 64, "time_step_limit": [0.0, math.inf],
}  # fmt: skip
ALWAYS = ("hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size")
# Without a class in vLLM; not on a CPU in fp32 (vLLM's gated DeltaNet); classes that import torchvision.
NOT_RUN = ("bamba", "ministral", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")
RUN = tuple(name for name in FAMILY_NAMES if name not in NOT_RUN)


def backbone(name: str, **options: Any) -> dict[str, Any]:
    """The config.json of a tiny backbone: the shape of `tiny_backbones` with other sizes."""
    shape = BASE | SHAPES[name]
    wider = {key: value for key, value in WIDTHS.items() if key in shape or key in ALWAYS}
    if name == "mamba2":
        wider["intermediate_size"] = 256  # vLLM's width of the mixer
    kind = name.partition(":")[0]
    values: dict[str, Any] = CONFIG_MAPPING[kind](**shape | wider | options).to_dict()
    return values


def save_family(
    name: str, directory: Path, denoiser: DenoiserConfig | None = None, **options: Any
) -> TwoTowerForCausalLM:
    """Saves a two-tower checkpoint of a family in fp32, with random weights; returns the model."""
    choices = DenoiserConfig() if denoiser is None else denoiser
    values = backbone(name, **options)
    if name == "nemotron_h" and choices == DenoiserConfig():
        config: TwoTowerConfig = TwoTowerConfig(**{key: value for key, value in values.items() if key != "model_type"})
    else:
        config = GenericTwoTowerConfig(backbone=values, mask_token_id=3, **choices.to_json())
    model = random_two_tower(config, 0, torch.float32)
    model.save_pretrained(directory)
    save_tokenizer(directory, "<mask>", mask_token="<mask>")
    return model
