"""Phi-3: Llama's layers with packed projections on disk, and a rotary embedding of a part of each head."""

from __future__ import annotations

from transformers import PretrainedConfig

from twotower.families import llama
from twotower.families.family import Family, Names, Rows, head_dim
from twotower.families.rope import rope_spec
from twotower.specs import AttentionSpec, LayerSpec, MLPSpec, TowerSpec


def packed_qkv(spec: AttentionSpec) -> Names:
    """The places of q, k and v in one projection, in this order."""
    both = "self_attn.qkv_proj"
    q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    of = q + 2 * kv
    return {
        "mixer.q_proj": Rows(both, 0, q, of),
        "mixer.k_proj": Rows(both, q, q + kv, of),
        "mixer.v_proj": Rows(both, q + kv, of, of),
    }


def packed_gate_up(spec: MLPSpec) -> Names:
    """The places of the gate and of the up-projection in one projection, in this order."""
    both = "mlp.gate_up_proj"
    return {
        "mixer.gate_proj": Rows(both, 0, spec.width, 2 * spec.width),
        "mixer.up_proj": Rows(both, spec.width, 2 * spec.width, 2 * spec.width),
    }


def _spec(config: PretrainedConfig) -> TowerSpec:
    layers = llama.alternating(config, llama.attention(config), llama.mlp(config))
    return llama.tower(config, layers, (rope_spec(config, head_dim(config), partial=True),))


def _names(layer: LayerSpec) -> Names:
    if isinstance(layer.mixer, AttentionSpec):
        return {**llama.ATTENTION, **packed_qkv(layer.mixer)}
    assert isinstance(layer.mixer, MLPSpec)
    return {**llama.MLP, **packed_gate_up(layer.mixer)}


FAMILY = Family(model_types=("phi3",), spec=_spec, names=_names)
