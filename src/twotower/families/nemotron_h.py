"""Nemotron-H, the family of the released model. In memory the modules have the names of the released checkpoint."""

from __future__ import annotations

from transformers import PretrainedConfig

from twotower.config import TwoTowerConfig
from twotower.families.family import Family, Names
from twotower.nemotron_h_fields import NemotronHFields
from twotower.specs import (
    AttentionSpec,
    LayerKind,
    LayerSpec,
    Mamba2Spec,
    MixerSpec,
    MLPSpec,
    MoESpec,
    TowerSpec,
)


def spec_of(fields: NemotronHFields) -> TowerSpec:
    """The tower of the fields of a config.json."""
    mixers: dict[LayerKind, MixerSpec] = {
        "M": Mamba2Spec(
            num_heads=fields.mamba_num_heads,
            head_dim=fields.mamba_head_dim,
            state_size=fields.ssm_state_size,
            num_groups=fields.n_groups,
            conv_kernel=fields.conv_kernel,
            conv_bias=fields.use_conv_bias,
            input_bias=fields.use_bias,
            output_bias=fields.use_bias,
            chunk_size=fields.chunk_size,
            time_step_limit=fields.time_step_limit,
            time_step_init=(fields.time_step_min, fields.time_step_max, fields.time_step_floor),
        ),
        "*": AttentionSpec(
            num_heads=fields.num_attention_heads,
            num_kv_heads=fields.num_key_value_heads,
            head_dim=fields.head_dim,
            qkv_bias=fields.attention_bias,
            output_bias=fields.attention_bias,
        ),
        "E": MoESpec(
            experts=fields.n_routed_experts,
            top_k=fields.num_experts_per_tok,
            expert=_mlp(fields.moe_intermediate_size, bias=False),
            shared=_mlp(fields.moe_shared_expert_intermediate_size, bias=fields.mlp_bias),
            scores="sigmoid",
            normalise=fields.norm_topk_prob,
            factor=fields.routed_scaling_factor,
            num_groups=fields.n_group,
            top_groups=fields.topk_group,
            correction_bias=True,
            latent=fields.moe_latent_size,
            latent_bias=fields.mlp_bias,
        ),
        "-": _mlp(fields.intermediate_size, bias=fields.mlp_bias),
    }
    layers = [LayerSpec(mixer=mixers[kind], source=i) for i, kind in enumerate(fields.layer_kinds)]
    return TowerSpec(
        layers=tuple(layers),
        hidden_size=fields.hidden_size,
        vocab_size=fields.vocab_size,
        max_position_embeddings=fields.max_position_embeddings,
        norm_eps=fields.layer_norm_epsilon,
        residual_in_fp32=fields.residual_in_fp32,
        initializer_range=fields.initializer_range,
    )


def _mlp(width: int, *, bias: bool) -> MLPSpec:
    return MLPSpec(width=width, activation="relu2", gated=False, bias=bias)


def _names(layer: LayerSpec) -> Names:
    """Modules have the same names in memory and on disk, except that each expert has its own tensors on disk."""
    return {
        "mixer.experts.up_proj": "mixer.experts.{}.up_proj.weight",
        "mixer.experts.down_proj": "mixer.experts.{}.down_proj.weight",
    }


def _stacked(layer: LayerSpec) -> Names:
    """Stacked experts, as transformers 5 writes them."""
    return {f"mixer.experts.{name}": f"mixer.experts.{name}" for name in ("up_proj", "down_proj")}


def _spec(config: PretrainedConfig) -> TowerSpec:
    return spec_of(TwoTowerConfig.of(config).layer_fields)


FAMILY = Family(
    model_types=("nemotron_h",),
    spec=_spec,
    names=_names,
    stacked=_stacked,
    embeddings="embeddings",
    norm_f="norm_f",
    roots=(("backbone.", "lm_head"), ("model.", "lm_head")),
    module_root="model.",
)
