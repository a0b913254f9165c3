"""Falcon-H1: attention and Mamba-2 side by side, then a gated MLP, in every layer; factors everywhere."""

from __future__ import annotations

from dataclasses import replace

import torch
from transformers import PretrainedConfig

from twotower.families import bamba, llama
from twotower.families.family import Family, Names
from twotower.specs import GateNorm, LayerSpec, Mamba2Spec, ParallelSpec, TowerSpec

_PARALLEL: Names = {
    "norm": "input_layernorm",
    "mixer.mamba": "mamba",
    **{f"mixer.attention.{name}": f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")},
}
_MLP: Names = {"norm": "pre_ff_layernorm", "mixer": "feed_forward"}


def _mamba(config: PretrainedConfig) -> Mamba2Spec:
    norm: GateNorm = "before_gate" if config.mamba_norm_before_gate else "after_gate"
    with torch.device("cpu"):  # transformers rounds these factors to fp32
        z, x, b, c, dt = torch.tensor(config.ssm_multipliers, dtype=torch.float32).tolist()
    return replace(
        bamba.mamba(config),
        output_bias=config.projectors_bias,
        norm=norm if config.mamba_rms_norm else "none",
        factors=(z, x, b, c, dt),
    )


def _spec(config: PretrainedConfig) -> TowerSpec:
    attention = llama.biased_attention(config)
    parallel = ParallelSpec(
        attention=replace(attention, scale=config.key_multiplier * attention.head_dim**-0.5),
        mamba=_mamba(config),
        attention_input_factor=config.attention_in_multiplier,
        attention_factor=config.attention_out_multiplier,
        mamba_input_factor=config.ssm_in_multiplier,
        mamba_factor=config.ssm_out_multiplier,
    )
    gate, down = config.mlp_multipliers
    mlp = replace(llama.mlp(config), gate_factor=gate)
    layers = []
    for source in range(config.num_hidden_layers):
        layers.append(LayerSpec(mixer=parallel, source=source))
        layers.append(LayerSpec(mixer=mlp, source=source, residual_factor=down))
    return replace(
        llama.tower(config, layers),
        embedding_factor=config.embedding_multiplier,
        logit_factor=config.lm_head_multiplier,
    )


def _names(layer: LayerSpec) -> Names:
    return _PARALLEL if layer.kind == "P" else _MLP


FAMILY = Family(model_types=("falcon_h1",), spec=_spec, names=_names, norm_f="final_layernorm")
