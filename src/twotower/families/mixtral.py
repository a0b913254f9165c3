"""Mixtral: Mistral's attention, and routed gated experts with softmax scores instead of the MLP."""

from __future__ import annotations

from dataclasses import replace

from transformers import PretrainedConfig

from twotower.families import llama
from twotower.families.family import Family, Names, Rows, activation
from twotower.specs import LayerSpec, MLPSpec, MoESpec, TowerSpec

_EXPERTS: Names = {
    "norm": "post_attention_layernorm",
    "mixer.gate": "block_sparse_moe.gate",
    "mixer.experts.gate_proj": "block_sparse_moe.experts.{}.w1.weight",
    "mixer.experts.up_proj": "block_sparse_moe.experts.{}.w3.weight",
    "mixer.experts.down_proj": "block_sparse_moe.experts.{}.w2.weight",
}


def _spec(config: PretrainedConfig) -> TowerSpec:
    attention = replace(llama.attention(config), window=config.sliding_window)
    experts = MoESpec(
        experts=config.num_local_experts,
        top_k=config.num_experts_per_tok,
        expert=MLPSpec(width=config.intermediate_size, activation=activation(config)),
    )
    layers = [
        LayerSpec(mixer=mixer, source=source)
        for source in range(config.num_hidden_layers)
        for mixer in (attention, experts)
    ]
    return llama.tower(config, layers)


def _names(layer: LayerSpec) -> Names:
    return _EXPERTS if layer.kind == "E" else llama.names(layer)


def stacked_experts(layer: LayerSpec, module: str = "mlp") -> Names:
    """The stacked experts that transformers 5 has in memory: gate and up in one tensor (E, 2·I, H)."""
    if not isinstance(layer.mixer, MoESpec):
        return {}
    width = layer.mixer.expert.width
    both = f"{module}.experts.gate_up_proj"
    return {
        "mixer.gate": f"{module}.gate",
        "mixer.experts.gate_proj": Rows(both, 0, width, 2 * width, dim=1),
        "mixer.experts.up_proj": Rows(both, width, 2 * width, 2 * width, dim=1),
        "mixer.experts.down_proj": f"{module}.experts.down_proj",
    }


FAMILY = Family(model_types=("mixtral",), spec=_spec, names=_names, stacked=stacked_experts)
