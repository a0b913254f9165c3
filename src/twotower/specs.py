"""What a tower is made of: the layers, their mixers and their options, as plain frozen data.

A family of backbones (`families/`) makes a `TowerSpec` from a config.json. The modules of `model/`, the caches, the
kernels and the plans read only the `TowerSpec`: they know options, never families.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeVar, get_args

from twotower.errors import ConfigError

LayerKind = Literal["M", "*", "E", "-", "P", "D"]
KIND_NAMES: dict[LayerKind, str] = {
    "M": "Mamba-2",
    "*": "attention",
    "E": "MoE",
    "-": "MLP",
    "P": "parallel attention and Mamba-2",
    "D": "gated DeltaNet",
}
COUPLED_KINDS = frozenset[LayerKind](("M", "*", "P", "D"))  # a denoiser layer reads its context layer's cache
KIND_OF_LETTER: dict[str, LayerKind] = {kind: kind for kind in get_args(LayerKind)}

Activation = Literal["relu2", "silu", "gelu", "gelu_tanh"]
QKNorm = Literal["none", "head", "width"]
GateNorm = Literal["after_gate", "before_gate", "none"]
RouterScores = Literal["sigmoid", "softmax"]


@dataclass(frozen=True, kw_only=True)
class RopeSpec:
    """Rotary position embedding: pairs of dimensions turn by position · inverse frequency.

    inverse_frequencies: of the R / 2 pairs; dimensions R and above do not turn. factor: multiplies cosines and sines.
    interleaved: pairs are neighbours (0, 1), (2, 3), …; otherwise halves (0, R / 2), (1, R / 2 + 1), ….
    long_inverse_frequencies: of all positions of a text with more than `original_length` tokens (LongRoPE, Ding et al.
    2024); empty: the frequencies do not depend on the length.
    """

    inverse_frequencies: tuple[float, ...]
    factor: float = 1.0
    interleaved: bool = False
    long_inverse_frequencies: tuple[float, ...] = ()
    original_length: int | None = None


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """Grouped-query attention.

    rope: index in `TowerSpec.ropes`; None: no position embedding. window: keys that a query attends to, itself
    included; None: all. qk_norm: RMSNorm of queries and keys, over each head or over all heads together. scale: of the
    scores; None: 1 / √head_dim. softcap: s ↦ softcap · tanh(s / softcap) of the scaled scores. clip: queries, keys and
    values are clipped to [−clip, clip], after norms over the width and before the rotation. output_gate: each head's
    output is multiplied by the sigmoid of a gate, whose projection follows the head's queries in q_proj.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    output_bias: bool = False
    rope: int | None = None
    window: int | None = None
    qk_norm: QKNorm = "none"
    scale: float | None = None
    softcap: float | None = None
    clip: float | None = None
    output_gate: bool = False


@dataclass(frozen=True, kw_only=True)
class MLPSpec:
    """down(act(up·x)), or gated: down(act(gate·x · gate_factor) · up·x)."""

    width: int
    activation: Activation
    gated: bool = True
    bias: bool = False
    gate_factor: float = 1.0


@dataclass(frozen=True, kw_only=True)
class MoESpec:
    """Routed experts, and an optional shared expert that reads every token.

    experts: the number of experts; top_k: those of a token. scores: of the router. normalise: the selected scores are
    divided by their sum. factor: multiplies the expert weights. num_groups, top_groups: experts are selected within the
    best groups. correction_bias: a bias per expert changes the selection only. shared_gate: the shared expert's output
    is multiplied by the sigmoid of a projection. latent: width at which the routed experts work, between two
    projections, which have biases if latent_bias; None: hidden_size.
    """

    experts: int
    top_k: int
    expert: MLPSpec
    shared: MLPSpec | None = None
    shared_gate: bool = False
    scores: RouterScores = "softmax"
    normalise: bool = True
    factor: float = 1.0
    num_groups: int = 1
    top_groups: int = 1
    correction_bias: bool = False
    latent: int | None = None
    latent_bias: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.experts:
            raise ConfigError(
                f"config: {self.top_k} experts are selected for a token, but there are {self.experts}; "
                "select at least 1 and at most all"
            )


@dataclass(frozen=True, kw_only=True)
class Mamba2Spec:
    """A Mamba-2 mixer. norm: RMSNorm of the output within each group, after or before the gate, or none.

    input_bias, output_bias: of the projections in and out. factors: multiply z, x, B, C and dt after the projection.
    """

    num_heads: int
    head_dim: int
    state_size: int
    num_groups: int
    conv_kernel: int
    conv_bias: bool = True
    input_bias: bool = False
    output_bias: bool = False
    chunk_size: int = 128
    time_step_limit: tuple[float, float] = (0.0, float("inf"))
    time_step_init: tuple[float, float, float] = (0.001, 0.1, 1e-4)  # smallest, largest, floor
    norm: GateNorm = "after_gate"
    factors: tuple[float, float, float, float, float] | None = None

    @property
    def inner(self) -> int:
        """Inner width: heads × head_dim."""
        return self.num_heads * self.head_dim

    @property
    def conv_dim(self) -> int:
        """Channels of the causal convolution: x | B | C."""
        return self.inner + 2 * self.num_groups * self.state_size


@dataclass(frozen=True, kw_only=True)
class DeltaNetSpec:
    """A gated DeltaNet mixer: num_heads value heads of head_dim, and num_groups query and key heads of state_size.

    grouped_projections: the rows of the projections are ordered by key head (Qwen3-Next), not by kind (Qwen3.5).
    """

    num_heads: int
    head_dim: int
    state_size: int
    num_groups: int
    conv_kernel: int
    grouped_projections: bool = False
    chunk_size: int = 64

    @property
    def inner(self) -> int:
        """Inner width: value heads × head_dim."""
        return self.num_heads * self.head_dim

    @property
    def conv_dim(self) -> int:
        """Channels of the causal convolution: q | k | v."""
        return self.inner + 2 * self.num_groups * self.state_size


@dataclass(frozen=True, kw_only=True)
class ParallelSpec:
    """Attention and Mamba-2 side by side: both read the same input, and their outputs are added.

    The factors multiply the input and the output of either.
    """

    attention: AttentionSpec
    mamba: Mamba2Spec
    attention_input_factor: float = 1.0
    attention_factor: float = 1.0
    mamba_input_factor: float = 1.0
    mamba_factor: float = 1.0


MixerSpec = AttentionSpec | Mamba2Spec | MoESpec | MLPSpec | ParallelSpec | DeltaNetSpec
Spec = TypeVar("Spec", AttentionSpec, Mamba2Spec, MoESpec, MLPSpec, DeltaNetSpec)
_KINDS: dict[type, LayerKind] = {
    AttentionSpec: "*",
    Mamba2Spec: "M",
    MoESpec: "E",
    MLPSpec: "-",
    ParallelSpec: "P",
    DeltaNetSpec: "D",
}


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """A residual layer: x + factor · post_norm(mixer(pre_norm(x))).

    source: the number of the layer of the autoregressive model that this layer is a part of.
    """

    mixer: MixerSpec
    source: int
    pre_norm: bool = True
    post_norm: bool = False
    residual_factor: float = 1.0

    @property
    def kind(self) -> LayerKind:
        return _KINDS[type(self.mixer)]

    @property
    def parts(self) -> tuple[MixerSpec, ...]:
        """The mixer, or the two mixers that it consists of."""
        return (self.mixer.attention, self.mixer.mamba) if isinstance(self.mixer, ParallelSpec) else (self.mixer,)


@dataclass(frozen=True, kw_only=True)
class TowerSpec:
    """A tower: embedding, layers, final norm, head.

    norm_eps, norm_offset: of all RMSNorms, which multiply by norm_offset + weight. embedding_factor: multiplies the
    embeddings. logit_factor: multiplies the logits; logit_softcap: as in `AttentionSpec`, after it. tied_head: the head
    is the embedding. residual_in_fp32: the residual stream is at least fp32. ropes: see `AttentionSpec.rope`.
    counterparts: of a denoiser that lacks layers, the number of the context layer that each of its layers corresponds
    to, whose cache it reads; None: layer i corresponds to context layer i.
    """

    layers: tuple[LayerSpec, ...]
    hidden_size: int
    vocab_size: int
    max_position_embeddings: int
    norm_eps: float = 1e-5
    norm_offset: float = 0.0
    embedding_factor: float = 1.0
    logit_factor: float = 1.0
    logit_softcap: float | None = None
    tied_head: bool = False
    residual_in_fp32: bool = False
    initializer_range: float = 0.02
    ropes: tuple[RopeSpec, ...] = ()
    counterparts: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        shapes = {(spec.num_kv_heads, spec.head_dim) for spec in self._mixers(AttentionSpec)}
        scans: list[Mamba2Spec | DeltaNetSpec] = [*self._mixers(Mamba2Spec), *self._mixers(DeltaNetSpec)]
        states = {(spec.num_heads, spec.head_dim, spec.state_size, spec.conv_dim) for spec in scans}
        if len(shapes) > 1 or len(states) > 1:
            raise ConfigError("config: layers of one kind have different head counts or sizes; they must be equal")
        if self.original_length is not None and scans:
            raise ConfigError("config: rope_type is 'longrope'; it is not supported beside recurrent layers")

    def _mixers(self, kind: type[Spec]) -> list[Spec]:
        return [part for layer in self.layers for part in layer.parts if isinstance(part, kind)]

    @cached_property
    def original_length(self) -> int | None:
        """The tokens up to which a text has the short frequencies of LongRoPE; None without LongRoPE.

        Raises:
            ConfigError: rotary embeddings have different lengths.
        """
        lengths = {rope.original_length for rope in self.ropes if rope.long_inverse_frequencies}
        if len(lengths) > 1:
            raise ConfigError("config: original_max_position_embeddings differs between layers; it must be equal")
        return next(iter(lengths), None)

    @cached_property
    def pattern(self) -> str:
        """The kinds of the layers, a letter a layer, first to last."""
        return "".join(layer.kind for layer in self.layers)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def context_layers(self) -> Sequence[int]:
        """The number of the context layer that each layer of a denoiser corresponds to; see `counterparts`."""
        return range(self.num_layers) if self.counterparts is None else self.counterparts

    @cached_property
    def attention(self) -> AttentionSpec | None:
        """The first attention layer; all have the same number of KV heads and the same head_dim."""
        return next(iter(self._mixers(AttentionSpec)), None)

    @cached_property
    def windows(self) -> tuple[int, ...]:
        """The different windows of the attention layers, smallest first."""
        return tuple(sorted({mixer.window for mixer in self._mixers(AttentionSpec) if mixer.window is not None}))

    def window_of(self, layer: int) -> int | None:
        """The window of an attention layer; None: it attends to all keys."""
        parts = self.layers[layer].parts
        return next((part.window for part in parts if isinstance(part, AttentionSpec)), None)

    @cached_property
    def mamba(self) -> Mamba2Spec | None:
        """The first Mamba-2 layer; all have states of the same shape."""
        return next(iter(self._mixers(Mamba2Spec)), None)

    @cached_property
    def delta_net(self) -> DeltaNetSpec | None:
        """The first gated DeltaNet layer; all have states of the same shape."""
        return next(iter(self._mixers(DeltaNetSpec)), None)

    @cached_property
    def moe(self) -> MoESpec | None:
        """The first MoE layer."""
        return next(iter(self._mixers(MoESpec)), None)

    @property
    def chunk_size(self) -> int:
        """Tokens that Mamba-2 or DeltaNet layers read in one matrix-form chunk; 128 without such layers."""
        scan = self.mamba or self.delta_net
        return 128 if scan is None else scan.chunk_size
