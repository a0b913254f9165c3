"""Granite 4: Mamba-2 or attention, then routed experts with a shared one, or a gated MLP alone; Granite's factors.

Attention has no position embedding unless `position_embedding_type` is "rope".
"""

from __future__ import annotations

from dataclasses import replace

from transformers import PretrainedConfig

from twotower.families import bamba, llama
from twotower.families.family import Family, Names, Rows, activation, only
from twotower.families.granite import with_factors
from twotower.families.mixtral import stacked_experts
from twotower.specs import LayerSpec, MLPSpec, MoESpec, TowerSpec


def _spec(config: PretrainedConfig) -> TowerSpec:
    only(config, "position_embedding_type", None, "nope", "rope")
    turned = config.position_embedding_type == "rope"
    attention = replace(llama.biased_attention(config), scale=config.attention_multiplier, rope=0 if turned else None)
    mlp = MLPSpec(width=config.shared_intermediate_size, activation=activation(config))
    feed_forward: MLPSpec | MoESpec = mlp
    if config.num_local_experts:
        feed_forward = MoESpec(
            experts=config.num_local_experts,
            top_k=config.num_experts_per_tok,
            expert=MLPSpec(width=config.intermediate_size, activation=activation(config)),
            shared=mlp,
        )
    layers = []
    for source, kind in enumerate(config.layer_types):
        mixer = attention if kind == "full_attention" else bamba.mamba(config)
        layers += [LayerSpec(mixer=mixer, source=source), LayerSpec(mixer=feed_forward, source=source)]
    tower = with_factors(config, layers)
    return tower if turned else replace(tower, ropes=())


def _mlp(shared: MLPSpec, module: str) -> Names:
    """A gated MLP whose gate and up projections are one tensor on disk. module: in memory."""
    width = shared.width
    return {
        f"{module}.gate_proj": Rows("shared_mlp.input_linear", 0, width, 2 * width),
        f"{module}.up_proj": Rows("shared_mlp.input_linear", width, 2 * width, 2 * width),
        f"{module}.down_proj": "shared_mlp.output_linear",
    }


def _names(layer: LayerSpec) -> Names:
    mixer, norm = layer.mixer, "post_attention_layernorm"
    if isinstance(mixer, MLPSpec):
        return {"norm": norm, **_mlp(mixer, "mixer")}
    if isinstance(mixer, MoESpec) and mixer.shared is not None:
        width, root = mixer.expert.width, "block_sparse_moe"
        both = f"{root}.input_linear.weight"
        return {
            "norm": norm,
            "mixer.gate": f"{root}.router.layer",
            "mixer.experts.gate_proj": Rows(both, 0, width, 2 * width, dim=1),
            "mixer.experts.up_proj": Rows(both, width, 2 * width, 2 * width, dim=1),
            "mixer.experts.down_proj": f"{root}.output_linear.weight",
            **_mlp(mixer.shared, "mixer.shared_experts"),
        }
    return bamba.MAMBA if layer.kind == "M" else llama.ATTENTION


def _stacked(layer: LayerSpec) -> Names:
    names = stacked_experts(layer, "block_sparse_moe")
    return {**names, "mixer.gate": "block_sparse_moe.router"} if names else {}


FAMILY = Family(model_types=("granitemoehybrid",), spec=_spec, names=_names, stacked=_stacked)
