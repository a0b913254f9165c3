"""Qwen3-Next and Qwen3.5: gated DeltaNet in most layers, gated attention in the others; norms multiply by 1 + weight.

Then a gated MLP or, in Qwen3-Next and in the MoE models of Qwen3.5, experts as in Qwen2-MoE.
"""

from __future__ import annotations

from dataclasses import replace

from transformers import PretrainedConfig

from twotower.errors import ConfigError
from twotower.families import llama, qwen_moe
from twotower.families.family import Family, Names, head_dim, only
from twotower.families.mixtral import stacked_experts
from twotower.families.rope import rope_spec
from twotower.specs import AttentionSpec, DeltaNetSpec, LayerSpec, MLPSpec, MoESpec, TowerSpec

_DELTA_NET: Names = {"norm": "input_layernorm", "mixer": "linear_attn"}
_SIZES = (
    "linear_num_value_heads",
    "linear_num_key_heads",
    "linear_value_head_dim",
    "linear_key_head_dim",
    "linear_conv_kernel_dim",
)


def _delta_net(config: PretrainedConfig, *, grouped: bool) -> DeltaNetSpec:
    """The gated DeltaNet mixer of the `linear_*` keys of a configuration.

    Raises:
        ConfigError: its activation is not SiLU, a size is not positive, or the key heads do not divide the value heads.
    """
    only(config, "hidden_act", "silu", "swish")
    for key in _SIZES:
        if getattr(config, key) < 1:
            raise ConfigError(f"config: {key} is {getattr(config, key)}; it must be at least 1")
    heads, groups = config.linear_num_value_heads, config.linear_num_key_heads
    if heads % groups:
        raise ConfigError(
            f"config: linear_num_value_heads is {heads}; it must be a multiple of linear_num_key_heads, {groups}"
        )
    return DeltaNetSpec(
        num_heads=heads,
        head_dim=config.linear_value_head_dim,
        state_size=config.linear_key_head_dim,
        num_groups=groups,
        conv_kernel=config.linear_conv_kernel_dim,
        grouped_projections=grouped,
    )


def _tower(config: PretrainedConfig, feed_forward: list[MLPSpec | MoESpec], *, grouped: bool) -> TowerSpec:
    mixers: dict[str, AttentionSpec | DeltaNetSpec] = {
        "full_attention": replace(llama.normed_attention(config), output_gate=True),
        "linear_attention": _delta_net(config, grouped=grouped),
    }
    layers = []
    for source, (kind, mixer) in enumerate(zip(config.layer_types, feed_forward, strict=True)):
        if kind not in mixers:
            raise ConfigError(f"config: layer_types has {kind!r}; supported are {' and '.join(map(repr, mixers))}")
        layers += [LayerSpec(mixer=mixers[kind], source=source), LayerSpec(mixer=mixer, source=source)]
    rope = rope_spec(config, head_dim(config), partial=True)
    return replace(llama.tower(config, layers, (rope,)), norm_offset=1.0)


def _qwen3_next(config: PretrainedConfig) -> TowerSpec:
    return _tower(config, qwen_moe.feed_forward(config, qwen_moe.experts_with_shared), grouped=True)


def _qwen3_5(config: PretrainedConfig) -> TowerSpec:
    return _tower(config, [llama.mlp(config)] * config.num_hidden_layers, grouped=False)


def _qwen3_5_moe(config: PretrainedConfig) -> TowerSpec:
    return _tower(config, [qwen_moe.experts_with_shared(config)] * config.num_hidden_layers, grouped=False)


def _names(layer: LayerSpec) -> Names:
    return _DELTA_NET if layer.kind == "D" else qwen_moe.names(layer)


QWEN3_NEXT = Family(model_types=("qwen3_next",), spec=_qwen3_next, names=_names, stacked=stacked_experts)
QWEN3_5 = Family(model_types=("qwen3_5_text",), spec=_qwen3_5, names=_names)
QWEN3_5_MOE = Family(model_types=("qwen3_5_moe_text",), spec=_qwen3_5_moe, names=_names, stacked=stacked_experts)
