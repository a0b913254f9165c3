"""The architectures of llama.cpp that the context tower of a family becomes, and what each of them computes.

The properties are those of `src/models/*.cpp` in the llama.cpp of llama-cpp-python 0.3.36. A model with another one
is refused by name: llama.cpp would load the file and compute something else.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from twotower.config import MODEL_TYPE, GenericTwoTowerConfig, TwoTowerConfig
from twotower.errors import ConfigError
from twotower.specs import Activation, QKNorm, TowerSpec

Rotation = Literal["neighbours", "halves", "none"]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """An architecture of llama.cpp.

    name: in the file. rotation: which dimensions of a head turn together. partial: whether a part of a head may turn.
    divisors: whether it reads divisors of the rotary frequencies. every_nth: each n-th layer has no rotary embedding.
    windows: the period of the layers without a window that it assumes; 0: it has no windows. square: queries are as
    wide as the hidden state. packed_qkv: q, k and v are one tensor. packed_gate: gate and up are. own_head: the file
    needs a head. tied_head: it has none. equal_heads: as many key heads as query heads. normalise: of the expert
    weights; None: as the file says. sigmoid: the router's scores. caps: scores and logits are capped. logit_cap: logits
    may be. gemma: embeddings times √hidden, and the scale of scores that Gemma's 27B has if there are `wide_scale`
    layers. factors: Granite's, in the metadata. folded: Falcon-H1's, in the weights. delta_net: the recurrent
    layers are gated DeltaNet, and attention has gates of its output. feed_norm: the name of the norm before the
    feed-forward. merged: a mixer and the feed-forward behind it are one layer.
    """

    name: str
    rotation: Rotation = "halves"
    partial: bool = False
    divisors: bool = False
    every_nth: int = 0
    windows: int = 0
    square: bool = False
    packed_qkv: bool = False
    packed_gate: bool = False
    own_head: bool = False
    tied_head: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: QKNorm = "none"
    equal_heads: bool = False
    activation: Activation = "silu"
    gated: bool = True
    normalise: bool | None = True
    shared: bool = False
    shared_gate: bool = False
    sigmoid: bool = False
    caps: bool = False
    logit_cap: bool = False
    gemma: bool = False
    wide_scale: int = 0
    factors: bool = False
    folded: bool = False
    delta_net: bool = False
    feed_norm: str = "ffn_norm"
    pre_norm: bool = True
    post_norm: bool = False
    merged: bool = True


_LLAMA = Architecture(name="llama", rotation="neighbours", divisors=True, output_bias=True, mlp_bias=True)
_GRANITE = Architecture(
    name="granite", rotation="neighbours", divisors=True, output_bias=True, mlp_bias=True, factors=True
)
_GRANITE_MOE = Architecture(
    name="granitemoe", rotation="neighbours", divisors=True, output_bias=True, factors=True, shared=True
)
_GRANITE_HYBRID = Architecture(
    name="granitehybrid",
    rotation="neighbours",
    divisors=True,
    output_bias=True,
    mlp_bias=True,
    factors=True,
    shared=True,
)
_GEMMA2 = Architecture(
    name="gemma2",
    activation="gelu_tanh",
    tied_head=True,
    caps=True,
    gemma=True,
    windows=2,
    wide_scale=46,
    post_norm=True,
)
_GEMMA3 = Architecture(
    name="gemma3",
    activation="gelu_tanh",
    qk_norm="head",
    logit_cap=True,
    gemma=True,
    windows=6,
    wide_scale=62,
    post_norm=True,
)
_OLMO2 = Architecture(
    name="olmo2", square=True, own_head=True, qk_norm="width", windows=4, pre_norm=False, post_norm=True
)
_NEMOTRON_H = Architecture(
    name="nemotron_h",
    rotation="none",
    output_bias=True,
    mlp_bias=True,
    activation="relu2",
    gated=False,
    normalise=None,
    shared=True,
    sigmoid=True,
    merged=False,
)

_QWEN_NEXT = Architecture(
    name="qwen3next",
    partial=True,
    qk_norm="head",
    shared=True,
    shared_gate=True,
    delta_net=True,
    feed_norm="post_attention_norm",
)

# model_type → architecture. Nemotron-H with experts and Granite without Mamba-2 have others: `architecture_of`.
ARCHITECTURES: dict[str, Architecture] = {
    "nemotron_h": _NEMOTRON_H,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "ministral": _LLAMA,
    "mixtral": _LLAMA,
    "qwen2": Architecture(name="qwen2", square=True),
    "qwen3": Architecture(name="qwen3", qk_norm="head"),
    "qwen2_moe": Architecture(
        name="qwen2moe", square=True, own_head=True, normalise=False, shared=True, shared_gate=True
    ),
    "qwen3_moe": Architecture(name="qwen3moe", qk_norm="head"),
    "olmoe": Architecture(name="olmoe", square=True, own_head=True, qk_norm="width", equal_heads=True, normalise=False),
    "smollm3": Architecture(name="smollm3", rotation="neighbours", every_nth=4),
    "phi3": Architecture(name="phi3", partial=True, square=True, packed_qkv=True, packed_gate=True),
    "gemma": Architecture(name="gemma", activation="gelu_tanh", tied_head=True, gemma=True),
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA3,
    "olmo2": _OLMO2,
    "olmo3": _OLMO2,
    "granite": _GRANITE,
    "granitemoehybrid": _GRANITE_HYBRID,
    "bamba": replace(_GRANITE_HYBRID, partial=True),
    "falcon_h1": Architecture(name="falcon-h1", divisors=False, mlp_bias=True, own_head=True, folded=True),
    "qwen3_next": _QWEN_NEXT,
    "qwen3_5_text": replace(_QWEN_NEXT, name="qwen35"),
    "qwen3_5_moe_text": replace(_QWEN_NEXT, name="qwen35moe"),
    "glm4": Architecture(name="glm4", rotation="neighbours", partial=True, packed_gate=True, post_norm=True),
    "mamba2": Architecture(name="mamba2", rotation="none", merged=False),
}


def architecture_of(config: TwoTowerConfig, spec: TowerSpec) -> Architecture:
    """The architecture that a context tower becomes.

    Raises:
        ConfigError: llama.cpp has no architecture for the family, or this package does not write it.
    """
    kind = config.autoregressive.model_type if isinstance(config, GenericTwoTowerConfig) else MODEL_TYPE
    if kind not in ARCHITECTURES:
        raise ConfigError(
            f"config: model_type is {kind!r}, which is not written as GGUF; supported are "
            f"{', '.join(sorted(ARCHITECTURES))}. twotower export --to one-tower writes every family"
        )
    if kind == MODEL_TYPE and "E" in spec.pattern:
        return replace(_NEMOTRON_H, name="nemotron_h_moe")
    if kind == "granitemoehybrid" and "M" not in spec.pattern:
        return _GRANITE_MOE if "E" in spec.pattern else _GRANITE
    return ARCHITECTURES[kind]
