"""Llama and the families with the same layers: attention with RoPE and a gated MLP, a norm before each.

Mistral adds a sliding window, Qwen2 biases of q, k and v, Qwen3 norms of queries and keys over each head.
"""

from __future__ import annotations

from dataclasses import replace

from transformers import PretrainedConfig

from twotower.errors import ConfigError
from twotower.families.family import Family, Names, activation, declared, head_dim, kv_head_count
from twotower.families.rope import rope_spec
from twotower.specs import AttentionSpec, LayerSpec, MLPSpec, RopeSpec, TowerSpec

ATTENTION: Names = {
    "norm": "input_layernorm",
    **{f"mixer.{name}": f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")},
}
MLP: Names = {
    "norm": "post_attention_layernorm",
    **{f"mixer.{name}": f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")},
}


def names(layer: LayerSpec) -> Names:
    """The modules of a layer in transformers' names."""
    return ATTENTION if layer.kind == "*" else MLP


def attention(config: PretrainedConfig) -> AttentionSpec:
    """The attention of a configuration, without biases, window and norms; rope 0."""
    return AttentionSpec(
        num_heads=config.num_attention_heads,
        num_kv_heads=kv_head_count(config),
        head_dim=head_dim(config),
        rope=0,
    )


def mlp(config: PretrainedConfig) -> MLPSpec:
    """The gated MLP of a configuration."""
    return MLPSpec(
        width=config.intermediate_size, activation=activation(config), bias=declared(config, "mlp_bias", False)
    )


def tower(config: PretrainedConfig, layers: list[LayerSpec], ropes: tuple[RopeSpec, ...] | None = None) -> TowerSpec:
    """A tower of these layers, with the keys that all families share. ropes: None: one, of whole heads."""
    return TowerSpec(
        layers=tuple(layers),
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position_embeddings,
        norm_eps=config.rms_norm_eps,
        tied_head=config.tie_word_embeddings,
        initializer_range=config.initializer_range,
        ropes=(rope_spec(config, head_dim(config)),) if ropes is None else ropes,
    )


def windows(config: PretrainedConfig) -> list[int | None]:
    """The window of each layer: `sliding_window` where `layer_types` says so, or everywhere without `layer_types`.

    Raises:
        ConfigError: a layer has another type, or the window is empty.
    """
    given: list[str] | None = declared(config, "layer_types", None)
    types = given or ["sliding_attention"] * config.num_hidden_layers
    unknown = sorted(set(types) - {"sliding_attention", "full_attention"})
    if unknown:
        raise ConfigError(
            f"config: layer_types has {unknown[0]!r}; supported are 'sliding_attention' and 'full_attention'"
        )
    window: int | None = declared(config, "sliding_window", None)
    if "sliding_attention" in types and window is not None and window < 1:
        raise ConfigError(f"config: sliding_window is {window}; it must be at least 1")
    return [window if kind == "sliding_attention" else None for kind in types]


def alternating(config: PretrainedConfig, attention: AttentionSpec, mlp: MLPSpec) -> list[LayerSpec]:
    """An attention and an MLP for each layer of the configuration, with the layer's window."""
    out = []
    for source, window in enumerate(windows(config)):
        out += [LayerSpec(mixer=replace(attention, window=window), source=source), LayerSpec(mixer=mlp, source=source)]
    return out


def with_ropes_of_layer_types(
    config: PretrainedConfig, layers: list[LayerSpec]
) -> tuple[list[LayerSpec], tuple[RopeSpec, ...]]:
    """The layers, whose rotary embeddings are those of their type in `layer_types`, and the rotary embeddings."""
    kinds = ("sliding_attention", "full_attention")
    turned = [
        replace(layer, mixer=replace(layer.mixer, rope=kinds.index(config.layer_types[layer.source])))
        if isinstance(layer.mixer, AttentionSpec)
        else layer
        for layer in layers
    ]
    return turned, tuple(rope_spec(config, head_dim(config), kind) for kind in kinds)


def biased_attention(config: PretrainedConfig) -> AttentionSpec:
    """`attention`, with biases of all four projections if `attention_bias` is set."""
    return replace(attention(config), qkv_bias=config.attention_bias, output_bias=config.attention_bias)


def _llama(config: PretrainedConfig) -> TowerSpec:
    return tower(config, alternating(config, biased_attention(config), mlp(config)))


def _mistral(config: PretrainedConfig) -> TowerSpec:
    return tower(config, alternating(config, attention(config), mlp(config)))


def _qwen2(config: PretrainedConfig) -> TowerSpec:
    return tower(config, alternating(config, replace(attention(config), qkv_bias=True), mlp(config)))


def normed_attention(config: PretrainedConfig) -> AttentionSpec:
    """Qwen3's attention, without a window: norms of queries and keys over each head, and optional biases."""
    return replace(biased_attention(config), qk_norm="head")


def _qwen3(config: PretrainedConfig) -> TowerSpec:
    return tower(config, alternating(config, normed_attention(config), mlp(config)))


LLAMA = Family(model_types=("llama",), spec=_llama, names=names)
MISTRAL = Family(model_types=("mistral", "ministral"), spec=_mistral, names=names)
QWEN2 = Family(model_types=("qwen2",), spec=_qwen2, names=names)
QWEN3 = Family(model_types=("qwen3",), spec=_qwen3, names=names)
