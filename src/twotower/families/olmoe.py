"""OLMoE: attention with norms of queries and keys over their whole width, and routed experts in every layer."""

from __future__ import annotations

from dataclasses import replace

from transformers import PretrainedConfig

from twotower.families import llama, qwen_moe
from twotower.families.family import Family, activation
from twotower.families.mixtral import stacked_experts
from twotower.specs import LayerSpec, MLPSpec, MoESpec, TowerSpec


def _spec(config: PretrainedConfig) -> TowerSpec:
    attention = replace(
        llama.attention(config),
        qkv_bias=config.attention_bias,
        output_bias=config.attention_bias,
        qk_norm="width",
        clip=config.clip_qkv,
    )
    experts = MoESpec(
        experts=config.num_experts,
        top_k=config.num_experts_per_tok,
        expert=MLPSpec(width=config.intermediate_size, activation=activation(config)),
        normalise=config.norm_topk_prob,
    )
    layers = [
        LayerSpec(mixer=mixer, source=source)
        for source in range(config.num_hidden_layers)
        for mixer in (attention, experts)
    ]
    return llama.tower(config, layers)


FAMILY = Family(model_types=("olmoe",), spec=_spec, names=qwen_moe.names, stacked=stacked_experts)
