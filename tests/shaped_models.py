"""Two-tower models of several families whose denoiser lacks layers or has another feed-forward, with random weights."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from conftest import random_two_tower
from tiny_backbones import SHAPES as BACKBONES
from tiny_backbones import hf_config

from twotower import TwoTowerForCausalLM
from twotower.config import GenericTwoTowerConfig

MASK = 3


class Shape(NamedTuple):
    """A backbone of `tiny_backbones`, what differs from its entry, and the fields of the denoiser."""

    backbone: str
    options: dict[str, Any]
    denoiser: dict[str, Any]


def dense(width: int) -> dict[str, Any]:
    return {"denoiser_feed_forward": {"kind": "dense", "size": width}}


def experts(count: int) -> dict[str, Any]:
    return {"denoiser_feed_forward": {"kind": "experts", "size": count}}


SHIFTED = {"prediction_shift": 1, "block_attention": "prefix_causal"}
# Groups of experts, a shared expert, a bias for each expert, a latent space, and layers of one mixer.
NEMOTRON = {
    "layers_block_type": [
        "linear_attention", "moe", "full_attention", "moe", "linear_attention", "mlp", "full_attention",
    ],
    "n_group": 3, "topk_group": 1,
}  # fmt: skip
SHAPES: dict[str, Shape] = {
    "dense": Shape("llama", {"num_hidden_layers": 5}, {"denoiser_layers": [1, 4]}),
    "windows": Shape("gemma3_text", {"num_hidden_layers": 5}, {"denoiser_layers": [0, 2, 3]}),
    "one window": Shape("ministral", {}, {"denoiser_layers": [1]}),  # of the layers without a window
    "hybrid": Shape("nemotron_h", NEMOTRON, {"denoiser_layers": [2, 3, 4, 5]}),
    "hybrid, fewer experts": Shape("nemotron_h", NEMOTRON, {"denoiser_layers": [0, 1, 6], **experts(4)}),
    "hybrid, dense": Shape("nemotron_h:latent", {}, dense(40)),
    "two mixers": Shape("granitemoehybrid", {}, {"denoiser_layers": [1, 3], **experts(3)}),
    "MoE": Shape("mixtral", {}, {"denoiser_layers": [0, 2], **dense(30)}),
    "side by side": Shape("falcon_h1", {}, {"denoiser_layers": [2]}),
    "DeltaNet": Shape("qwen3_next", {}, {"denoiser_layers": [0, 1], **experts(2)}),
    "shifted": Shape("llama", {"num_hidden_layers": 5}, {"denoiser_layers": [0, 3], **SHIFTED}),
    "longrope": Shape("phi3:longrope", {}, {"denoiser_layers": [0, 2]}),
}

STATIC = tuple(name for name in SHAPES if name not in ("longrope", "shifted"))  # with one rule for all texts


@cache
def config_of(name: str) -> GenericTwoTowerConfig:
    shape = SHAPES[name]
    backbone = hf_config(shape.backbone, {**BACKBONES[shape.backbone], **shape.options}).to_dict()
    return GenericTwoTowerConfig(backbone=backbone, mask_token_id=MASK, **shape.denoiser)


@cache
def shaped(name: str, dtype: torch.dtype = torch.float64) -> TwoTowerForCausalLM:
    """The model of a name in SHAPES."""
    return random_two_tower(config_of(name), 5, dtype).requires_grad_(False)
