"""Mamba-2: a Mamba-2 mixer in every layer, and nothing else."""

from __future__ import annotations

from transformers import PretrainedConfig

from twotower.families.family import Family, only
from twotower.specs import LayerSpec, Mamba2Spec, TowerSpec

# Mamba reads texts of any length. Caches and prompts need a limit, so it is large.
LONGEST = 2**20


def _spec(config: PretrainedConfig) -> TowerSpec:
    only(config, "hidden_act", "silu", "swish")
    low, high = config.time_step_limit
    mixer = Mamba2Spec(
        num_heads=config.num_heads,
        head_dim=config.head_dim,
        state_size=config.state_size,
        num_groups=config.n_groups,
        conv_kernel=config.conv_kernel,
        conv_bias=config.use_conv_bias,
        input_bias=config.use_bias,
        output_bias=config.use_bias,
        chunk_size=config.chunk_size,
        time_step_limit=(float(low), float(high)),
        time_step_init=(config.time_step_min, config.time_step_max, config.time_step_floor),
    )
    return TowerSpec(
        layers=tuple(LayerSpec(mixer=mixer, source=source) for source in range(config.num_hidden_layers)),
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        max_position_embeddings=LONGEST,
        norm_eps=config.layer_norm_epsilon,
        tied_head=config.tie_word_embeddings,
        residual_in_fp32=config.residual_in_fp32,
        initializer_range=config.initializer_range,
    )


FAMILY = Family(
    model_types=("mamba2",),
    spec=_spec,
    names=lambda layer: {},
    embeddings="embeddings",
    norm_f="norm_f",
    roots=(("backbone.", "lm_head"),),
)
