"""Qwen2-MoE and Qwen3-MoE: the attention of Qwen2 and Qwen3, with routed experts in some or all layers.

Qwen2-MoE adds a shared expert, multiplied by the sigmoid of a projection.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from transformers import PretrainedConfig

from twotower.errors import ConfigError
from twotower.families import llama
from twotower.families.family import Family, Names, activation, declared
from twotower.families.mixtral import stacked_experts
from twotower.specs import AttentionSpec, LayerSpec, MLPSpec, MoESpec, TowerSpec

EXPERTS: Names = {
    "norm": "post_attention_layernorm",
    "mixer.gate": "mlp.gate",
    **{f"mixer.experts.{name}": f"mlp.experts.{{}}.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")},
    "mixer.shared_experts": "mlp.shared_expert",
    "mixer.shared_expert_gate": "mlp.shared_expert_gate",
}


def names(layer: LayerSpec) -> Names:
    """The modules of a layer in transformers' names."""
    return EXPERTS if layer.kind == "E" else llama.names(layer)


def experts(config: PretrainedConfig) -> MoESpec:
    """The routed experts of a configuration, without a shared expert."""
    return MoESpec(
        experts=config.num_experts,
        top_k=config.num_experts_per_tok,
        expert=MLPSpec(width=config.moe_intermediate_size, activation=activation(config)),
        normalise=declared(config, "norm_topk_prob", True),
    )


def experts_with_shared(config: PretrainedConfig) -> MoESpec:
    """The routed experts of a configuration, and a shared expert with a gate."""
    shared = MLPSpec(width=config.shared_expert_intermediate_size, activation=activation(config))
    return replace(experts(config), shared=shared, shared_gate=True)


def feed_forward(config: PretrainedConfig, moe: Callable[[PretrainedConfig], MoESpec]) -> list[MLPSpec | MoESpec]:
    """The feed-forward mixer of each layer. moe: makes that of layers with experts.

    Every `decoder_sparse_step`-th layer has experts, except for the layers in `mlp_only_layers`. A model of 0 experts
    has none.

    Raises:
        ConfigError: `decoder_sparse_step` is not positive.
    """
    step = config.decoder_sparse_step
    if step < 1:
        raise ConfigError(f"config: decoder_sparse_step is {step}; it must be at least 1")
    dense = [bool((i + 1) % step or i in config.mlp_only_layers) for i in range(config.num_hidden_layers)]
    return [llama.mlp(config) if plain or not config.num_experts else moe(config) for plain in dense]


def _tower(config: PretrainedConfig, attention: AttentionSpec, moe: Callable[[PretrainedConfig], MoESpec]) -> TowerSpec:
    layers = []
    for source, (window, mixer) in enumerate(zip(llama.windows(config), feed_forward(config, moe), strict=True)):
        layers.append(LayerSpec(mixer=replace(attention, window=window), source=source))
        layers.append(LayerSpec(mixer=mixer, source=source))
    return llama.tower(config, layers)


def _qwen3_moe(config: PretrainedConfig) -> TowerSpec:
    return _tower(config, llama.normed_attention(config), experts)


def _qwen2_moe(config: PretrainedConfig) -> TowerSpec:
    attention = replace(llama.attention(config), qkv_bias=config.qkv_bias)
    return _tower(config, attention, experts_with_shared)


QWEN3_MOE = Family(model_types=("qwen3_moe",), spec=_qwen3_moe, names=names, stacked=stacked_experts)
QWEN2_MOE = Family(model_types=("qwen2_moe",), spec=_qwen2_moe, names=names, stacked=stacked_experts)
