"""Bamba: Mamba-2 or attention with RoPE, then a gated MLP in every layer."""

from __future__ import annotations

from transformers import PretrainedConfig

from twotower.families import llama
from twotower.families.family import Family, Names, head_dim, only
from twotower.families.rope import rope_spec
from twotower.specs import LayerSpec, Mamba2Spec, TowerSpec

MAMBA: Names = {"norm": "input_layernorm", "mixer": "mamba"}
_MLP: Names = {"norm": "pre_ff_layernorm", "mixer": "feed_forward"}


def mamba(config: PretrainedConfig) -> Mamba2Spec:
    """The Mamba-2 mixer of the `mamba_*` keys of a configuration.

    Raises:
        ConfigError: its activation is not SiLU.
    """
    only(config, "hidden_act", "silu", "swish")
    low, high = config.time_step_limit
    return Mamba2Spec(
        num_heads=config.mamba_n_heads,
        head_dim=config.mamba_d_head,
        state_size=config.mamba_d_state,
        num_groups=config.mamba_n_groups,
        conv_kernel=config.mamba_d_conv,
        conv_bias=config.mamba_conv_bias,
        input_bias=config.mamba_proj_bias,
        output_bias=config.mamba_proj_bias,
        chunk_size=config.mamba_chunk_size,
        time_step_limit=(float(low), float(high)),
    )


def _names(layer: LayerSpec) -> Names:
    if layer.kind == "-":
        return _MLP
    return MAMBA if layer.kind == "M" else llama.ATTENTION


def _spec(config: PretrainedConfig) -> TowerSpec:
    layers = []
    for source, kind in enumerate(config.layers_block_type):
        mixer = llama.biased_attention(config) if kind == "full_attention" else mamba(config)
        layers += [LayerSpec(mixer=mixer, source=source), LayerSpec(mixer=llama.mlp(config), source=source)]
    return llama.tower(config, layers, (rope_spec(config, head_dim(config), partial=True),))


FAMILY = Family(model_types=("bamba",), spec=_spec, names=_names, norm_f="final_layernorm")
