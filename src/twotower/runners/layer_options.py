"""The options of a tower and its layers as C structures for the C++ pass (ops/cpu/layers.h), filled from the specs."""

from __future__ import annotations

import ctypes
from functools import lru_cache

from twotower.ops.cpu.kernels import ACTIVATIONS, GATE_NORMS
from twotower.ops.cpu.moe_kernels import ROUTER_SCORES
from twotower.specs import (
    KIND_NAMES,
    AttentionSpec,
    LayerKind,
    LayerSpec,
    Mamba2Spec,
    MixerSpec,
    MLPSpec,
    MoESpec,
    ParallelSpec,
    QKNorm,
    TowerSpec,
)

KINDS: dict[LayerKind, int] = {"M": 0, "*": 1, "E": 2, "-": 3, "P": 4}  # enum Kind
QK_NORMS: dict[QKNorm, int] = {"none": 0, "head": 1, "width": 2}  # enum QKNorm
_INT, _FLOAT = ctypes.c_int64, ctypes.c_float


class LayerOptions(ctypes.Structure):
    """`LayerOptions` in layers.h. An option that a layer lacks is 0, and a factor is 1."""

    _fields_ = [
        *((name, _INT) for name in ("kind", "heads", "rope", "window", "qk_norm")),
        *((name, _INT) for name in ("width", "activation", "shared_width", "shared_activation")),
        *((name, _INT) for name in ("experts", "groups", "kept", "top", "normalise", "scores", "latent")),
        *((name, _INT) for name in ("gate_norm", "scaled")),
        *((name, _FLOAT) for name in ("scale", "softcap", "clip", "gate_factor", "shared_gate_factor")),
        *((name, _FLOAT) for name in ("expert_factor", "residual_factor", "dt_low", "dt_high")),
        ("parts", _FLOAT * 5),
        *((name, _FLOAT) for name in ("attention_input", "attention_output", "mamba_input", "mamba_output")),
    ]


class PassOptions(ctypes.Structure):
    """`PassOptions` in layers.h: what all layers of a pass share."""

    _fields_ = [
        *((name, _INT) for name in ("rows", "length", "hidden", "layers", "modulation_stride", "wide")),
        ("int8_activations", _INT),
        *((name, _INT) for name in ("mamba_heads", "mamba_head_dim", "mamba_groups", "state_size", "taps")),
        *((name, _INT) for name in ("kv_heads", "head_dim")),
        ("eps", _FLOAT),
        ("offset", _FLOAT),
    ]


class RotationTable(ctypes.Structure):
    """`Rotation` in rope.h: addresses of cosines, sines and first positions, or null."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("cos", "sin", "start")),
        *((name, _INT) for name in ("length", "pairs", "interleaved")),
    ]


def layer_options(spec: TowerSpec) -> ctypes.Array[LayerOptions]:
    """The options of each layer."""
    return (LayerOptions * spec.num_layers)(*map(_options, spec.layers))


def _options(layer: LayerSpec) -> LayerOptions:
    out = LayerOptions(
        kind=KINDS[layer.kind],
        rope=-1,
        residual_factor=layer.residual_factor,
        **dict.fromkeys(("gate_factor", "shared_gate_factor", "expert_factor"), 1.0),
        **dict.fromkeys(("attention_input", "attention_output", "mamba_input", "mamba_output"), 1.0),
    )
    _add_mixer(out, layer.mixer)
    return out


def _add_mixer(out: LayerOptions, mixer: MixerSpec) -> None:
    match mixer:
        case AttentionSpec():
            out.heads, out.qk_norm, out.window = mixer.num_heads, QK_NORMS[mixer.qk_norm], mixer.window or 0
            out.rope = -1 if mixer.rope is None else mixer.rope
            out.scale, out.softcap, out.clip = mixer.scale or 0.0, mixer.softcap or 0.0, mixer.clip or 0.0
        case Mamba2Spec():
            out.gate_norm, out.scaled = GATE_NORMS[mixer.norm], mixer.factors is not None
            out.dt_low, out.dt_high = mixer.time_step_limit
            out.parts = (_FLOAT * 5)(*(mixer.factors or [1.0] * 5))
        case MoESpec():
            out.width, out.activation = mixer.expert.width, ACTIVATIONS[mixer.expert.activation]
            if mixer.shared is not None:
                out.shared_width, out.shared_activation = mixer.shared.width, ACTIVATIONS[mixer.shared.activation]
                out.shared_gate_factor = mixer.shared.gate_factor
            out.experts, out.groups, out.kept = mixer.experts, mixer.num_groups, mixer.top_groups
            out.top, out.normalise, out.scores = mixer.top_k, mixer.normalise, ROUTER_SCORES[mixer.scores]
            out.latent, out.expert_factor = mixer.latent or 0, mixer.factor
        case MLPSpec():
            out.width, out.activation, out.gate_factor = mixer.width, ACTIVATIONS[mixer.activation], mixer.gate_factor
        case ParallelSpec():
            _add_mixer(out, mixer.attention)
            _add_mixer(out, mixer.mamba)
            out.attention_input, out.attention_output = mixer.attention_input_factor, mixer.attention_factor
            out.mamba_input, out.mamba_output = mixer.mamba_input_factor, mixer.mamba_factor


def pass_options(spec: TowerSpec, rows: int, length: int, wide: bool) -> PassOptions:
    """The options of a pass over `rows` rows of `length` tokens. wide: a residual stream in fp32 with bf16 weights."""
    out = PassOptions(rows=rows, length=length, hidden=spec.hidden_size, layers=spec.num_layers, wide=wide)
    out.eps, out.offset = spec.norm_eps, spec.norm_offset
    if spec.mamba is not None:
        mamba = spec.mamba
        out.mamba_heads, out.mamba_head_dim, out.mamba_groups = mamba.num_heads, mamba.head_dim, mamba.num_groups
        out.state_size, out.taps = mamba.state_size, mamba.conv_kernel
    if spec.attention is not None:
        out.kv_heads, out.head_dim = spec.attention.num_kv_heads, spec.attention.head_dim
    return out


@lru_cache(maxsize=32)
def spec_unsupported_reason(spec: TowerSpec) -> str | None:
    """Why the C++ pass cannot run towers of this spec; None if it can."""
    unknown = next((layer.kind for layer in spec.layers if layer.kind not in KINDS), None)
    if unknown is not None:
        return f"the C++ pass has no {KIND_NAMES[unknown]} layers"
    for layer in spec.layers:
        if spec.residual_in_fp32 and not layer.pre_norm:
            return "the C++ pass has no residual stream in fp32 for layers without a norm of their input"
        mixer = layer.mixer
        if isinstance(mixer, AttentionSpec) and mixer.output_gate:
            return "the C++ pass has no attention with an output gate"
        if isinstance(mixer, MoESpec) and mixer.expert.bias:
            return "the C++ pass has no experts with biases"
    return None
