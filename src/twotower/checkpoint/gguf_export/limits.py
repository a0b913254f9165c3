"""What an architecture of llama.cpp does not compute, of a context tower: an export would be silently wrong."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from twotower.checkpoint.gguf_export.architectures import Architecture
from twotower.errors import ConfigError
from twotower.model.delta_net import L2_EPS
from twotower.specs import AttentionSpec, DeltaNetSpec, LayerSpec, Mamba2Spec, MLPSpec, MoESpec, TowerSpec

_OTHER_WAY = "twotower export --to one-tower writes the model for other programs"


def check(spec: TowerSpec, architecture: Architecture) -> None:
    """Raises ConfigError if llama.cpp's architecture does not compute a part of the tower."""
    for reason in _reasons(spec, architecture):
        raise ConfigError(
            f"config: the model has {reason}, which llama.cpp's architecture {architecture.name!r} does not compute; "
            f"{_OTHER_WAY}"
        )


def _reasons(spec: TowerSpec, architecture: Architecture) -> Iterator[str]:
    yield from _of_tower(spec, architecture)
    for layer in spec.layers:
        yield from _of_layer(layer, architecture)
        for mixer in layer.parts:
            if isinstance(mixer, AttentionSpec):
                yield from _of_attention(mixer, spec, architecture)
            elif isinstance(mixer, Mamba2Spec):
                yield from _of_mamba(mixer, spec, architecture)
            elif isinstance(mixer, MoESpec):
                yield from _of_experts(mixer, architecture)
            elif isinstance(mixer, MLPSpec):
                yield from _of_mlp(mixer, architecture, "")
            elif isinstance(mixer, DeltaNetSpec):
                yield from _of_delta_net(mixer, spec)
    yield from _of_rotation(spec, architecture)


def _of_tower(spec: TowerSpec, architecture: Architecture) -> Iterator[str]:
    if architecture.tied_head and not spec.tied_head:
        yield "a head that is not the embedding"
    wanted = math.sqrt(spec.hidden_size) if architecture.gemma else 1.0
    inside = architecture.factors or architecture.folded
    if not inside and not math.isclose(spec.embedding_factor, wanted, rel_tol=1e-6):
        yield f"a factor of the embeddings of {spec.embedding_factor}"
    if not inside and spec.logit_factor != 1.0:
        yield f"a factor of the logits of {spec.logit_factor}"
    if architecture.caps and spec.logit_softcap is None:
        yield "logits without a cap"
    if not (architecture.caps or architecture.logit_cap) and spec.logit_softcap is not None:
        yield "a cap of the logits"
    kinds = set(spec.pattern)
    if {"-", "E"} <= kinds and architecture.merged:
        yield "layers with experts and layers without them"
    if architecture.name == "mamba2" and kinds != {"M"}:
        yield "layers other than Mamba-2"


def _of_layer(layer: LayerSpec, architecture: Architecture) -> Iterator[str]:
    if (layer.pre_norm, layer.post_norm) != (architecture.pre_norm, architecture.post_norm):
        yield "norms in other places"
    if layer.residual_factor != 1.0 and not (architecture.factors or architecture.folded):
        yield f"a factor of the residual branches of {layer.residual_factor}"


def _of_attention(mixer: AttentionSpec, spec: TowerSpec, architecture: Architecture) -> Iterator[str]:
    width = mixer.num_heads * mixer.head_dim
    if mixer.output_bias and not architecture.output_bias:
        yield "a bias of the output of attention"
    if mixer.qk_norm != architecture.qk_norm:
        yield f"norms of queries and keys of the kind {mixer.qk_norm!r}"
    if mixer.clip is not None:
        yield "clipped queries, keys and values"
    if mixer.output_gate != architecture.delta_net:
        yield "gates of the output of attention" if mixer.output_gate else "no gates of the output of attention"
    if (mixer.softcap is not None) != architecture.caps:
        yield "attention scores without a cap" if architecture.caps else "a cap of attention scores"
    if mixer.scale is not None and not (architecture.factors or architecture.folded):
        wide = architecture.wide_scale == spec.layers[-1].source + 1
        expected = (spec.hidden_size // mixer.num_heads if wide else mixer.head_dim) ** -0.5
        if not math.isclose(mixer.scale, expected, rel_tol=1e-6):
            yield f"a scale of attention scores of {mixer.scale:.6g}, not {expected:.6g}"
    if architecture.square and width != spec.hidden_size:
        yield f"queries of width {width} beside a hidden size of {spec.hidden_size}"
    if architecture.equal_heads and mixer.num_kv_heads != mixer.num_heads:
        yield "fewer key heads than query heads"


def _of_mamba(mixer: Mamba2Spec, spec: TowerSpec, architecture: Architecture) -> Iterator[str]:
    if mixer.time_step_limit != (0.0, math.inf):
        yield f"a time_step_limit of {list(mixer.time_step_limit)}"
    if mixer.norm != "after_gate" and not (architecture.folded and mixer.norm == "none"):
        yield "a gated norm in another place"
    if mixer.input_bias or mixer.output_bias:
        yield "biases of Mamba-2's projections"
    if mixer.factors is not None and not architecture.folded:
        yield "factors of Mamba-2's projections"
    if architecture.name == "mamba2" and not mixer.conv_bias:
        yield "convolutions without a bias"
    if architecture.name == "granitehybrid" and mixer.inner != 2 * spec.hidden_size:
        yield f"an inner width of {mixer.inner}, not twice the hidden size"


def _of_delta_net(mixer: DeltaNetSpec, spec: TowerSpec) -> Iterator[str]:
    if mixer.head_dim != mixer.state_size:
        yield f"value heads of width {mixer.head_dim} beside key heads of width {mixer.state_size}"
    if not math.isclose(spec.norm_eps, L2_EPS, rel_tol=1e-6):
        yield f"an epsilon of norms of {spec.norm_eps}, not that of DeltaNet's queries and keys, {L2_EPS}"


def _of_experts(mixer: MoESpec, architecture: Architecture) -> Iterator[str]:
    if architecture.normalise not in (None, mixer.normalise):
        yield f"expert weights {'' if mixer.normalise else 'not '}divided by their sum"
    if (mixer.scores == "sigmoid") != architecture.sigmoid or mixer.correction_bias != architecture.sigmoid:
        yield f"a router with {mixer.scores} scores"
    if mixer.factor != 1.0 and not architecture.sigmoid:
        yield f"a factor of the expert weights of {mixer.factor}"
    if mixer.num_groups != 1 and (not architecture.sigmoid or mixer.experts < 2 * mixer.num_groups):
        yield f"{mixer.num_groups} groups of experts"
    if (mixer.shared is not None and not architecture.shared) or mixer.shared_gate != architecture.shared_gate:
        yield "a shared expert" if mixer.shared is not None else "no shared expert"
    if mixer.latent is not None and (mixer.latent_bias or not architecture.sigmoid):
        yield "latent experts with biases" if mixer.latent_bias else "latent experts"
    experts = [mixer.expert] if mixer.shared is None else [mixer.expert, mixer.shared]
    for expert in experts:
        if expert.bias:
            yield "biases of experts"
        yield from _of_mlp(expert, architecture, " of experts")


def _of_mlp(mixer: MLPSpec, architecture: Architecture, where: str) -> Iterator[str]:
    if mixer.bias and not architecture.mlp_bias:
        yield f"biases of the MLP{where}"
    if (mixer.activation, mixer.gated) != (architecture.activation, architecture.gated):
        yield f"the activation {mixer.activation}{where}"
    if mixer.gate_factor != 1.0 and not architecture.folded:
        yield f"a factor of gates{where}"


def _of_rotation(spec: TowerSpec, architecture: Architecture) -> Iterator[str]:
    turned = [
        (layer.source, part.rope) for layer in spec.layers for part in layer.parts if isinstance(part, AttentionSpec)
    ]
    if not turned:
        return
    without = [source for source, rope in turned if rope is None]
    if architecture.rotation == "none":
        if len(without) < len(turned):
            yield "a rotary position embedding"
        return
    if without != _without_rope(turned, architecture) and not (architecture.factors and len(without) == len(turned)):
        yield f"no rotary position embedding in layers {without}"
    head_dim = spec.attention.head_dim if spec.attention is not None else 0
    for rope in spec.ropes:
        if rope.interleaved and architecture.rotation != "neighbours":
            yield "a rotary position embedding of neighbours"
        if 2 * len(rope.inverse_frequencies) != head_dim and not architecture.partial:
            yield "heads of which a part turns"
    if architecture.windows and len(spec.windows) > 1:
        yield "windows of different lengths"


def _without_rope(turned: Sequence[tuple[int, int | None]], architecture: Architecture) -> list[int]:
    if not architecture.every_nth:
        return []
    return [source for source, _ in turned if (source + 1) % architecture.every_nth == 0]
