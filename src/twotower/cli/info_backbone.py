"""The part of `twotower info` about the backbone: its family, the options of its layers, and what it became."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from twotower.checkpoint import gguf_file, one_tower_config
from twotower.config import GENERIC_MODEL_TYPE, MODEL_TYPE, GenericTwoTowerConfig, TwoTowerConfig, read_object
from twotower.errors import ConfigError
from twotower.specs import AttentionSpec, MLPSpec, TowerSpec

if TYPE_CHECKING:
    from twotower.cli.info_facts import BackboneFacts

_QK_NORM = {"head": "each head", "width": "all heads together"}


def refuse_one_tower(path: Path) -> None:
    """Raises ConfigError for a source of `twotower init`, with the command, or with the reason why it is none."""
    command = f"twotower init --from {shlex.quote(str(path))} -o DIR"
    if path.suffix == gguf_file.SUFFIX:
        raise ConfigError(f"{path}: an autoregressive model in GGUF, not two towers; make them with {command}")
    directory = path if path.is_dir() else path.parent
    one_tower_config.check_not_adapter(directory)
    file = path / "config.json" if path.is_dir() else path
    kind = read_object(file, "give a checkpoint directory or its config.json").get("model_type", MODEL_TYPE)
    if kind in (GENERIC_MODEL_TYPE, MODEL_TYPE):
        return
    if path.is_dir():
        one_tower_config.read_config(path)
    raise ConfigError(f"{file}: an autoregressive model ({kind}), not two towers; make them with {command}")


def backbone_facts(config: TwoTowerConfig, spec: TowerSpec) -> BackboneFacts:
    """The facts of a two-tower configuration."""
    generic = isinstance(config, GenericTwoTowerConfig)
    source = config.autoregressive if generic else config
    return {
        "model_type": source.model_type,
        "layers": spec.layers[-1].source + 1,
        "tied_head": spec.tied_head,
        "options": [*_attention(config, spec), *_widths(spec), *_norms(spec), *_factors(spec)],
    }


def _attention(config: TwoTowerConfig, spec: TowerSpec) -> Iterator[str]:
    mixers = [part for layer in spec.layers for part in layer.parts if isinstance(part, AttentionSpec)]
    if not mixers:
        return
    turned = sum(mixer.rope is not None for mixer in mixers)
    if turned:
        parameters = config.autoregressive.rope_parameters if isinstance(config, GenericTwoTowerConfig) else {}
        yield f"RoPE in {turned} of {len(mixers)} attention layers: {_rope(parameters)}"
    else:
        yield "attention without position embedding"
    for window in spec.windows:
        count = sum(mixer.window == window for mixer in mixers)
        yield f"window of {window} keys in {count} of {len(mixers)} attention layers"
    first = mixers[0]
    words = {
        f"norms of queries and keys over {_QK_NORM.get(first.qk_norm)}": first.qk_norm != "none",
        "biases of q, k and v": first.qkv_bias,
        "bias of o": first.output_bias,
        f"scores × {first.scale}": first.scale is not None,
        f"scores capped at {first.softcap}": first.softcap is not None,
        f"q, k and v clipped at {first.clip}": first.clip is not None,
        "a gate of the output": first.output_gate,
    }
    if any(words.values()):
        yield "attention: " + ", ".join(word for word, there in words.items() if there)


def _rope(parameters: dict[str, object]) -> str:
    """The parameters of transformers in words; of each layer type if they differ."""
    nested = {name: part for name, part in parameters.items() if isinstance(part, dict)}
    if nested:
        return "; ".join(f"{name} {_rope(part)}" for name, part in nested.items())
    shown = ("rope_theta", "factor", "original_max_position_embeddings", "partial_rotary_factor")
    numbers = [f"{name.removeprefix('rope_')} {parameters[name]:g}" for name in shown if _is_number(parameters, name)]
    return ", ".join([str(parameters.get("rope_type", "default")), *numbers])


def _is_number(parameters: dict[str, object], name: str) -> bool:
    return isinstance(parameters.get(name), int | float)


def _widths(spec: TowerSpec) -> Iterator[str]:
    mlp = next((layer.mixer for layer in spec.layers if isinstance(layer.mixer, MLPSpec)), None)
    if mlp is not None:
        yield f"MLP: {_activation(mlp)}{', with biases' if mlp.bias else ''}"
    moe = spec.moe
    if moe is not None:
        shared = "" if moe.shared is None else ", a shared expert" + (" with a gate" if moe.shared_gate else "")
        normalised = ", normalised" if moe.normalise else ""
        latent = "" if moe.latent is None else f", latent width {moe.latent}"
        yield f"MoE: {moe.scores} scores{normalised}; experts {_activation(moe.expert)}{shared}{latent}"


def _activation(mlp: MLPSpec) -> str:
    return f"{'gated ' if mlp.gated else ''}{mlp.activation}"


def _norms(spec: TowerSpec) -> Iterator[str]:
    places = {(layer.pre_norm, layer.post_norm) for layer in spec.layers}
    if (True, True) in places:
        yield "norms before and after mixers"
    elif (False, True) in places:
        yield "norms after mixers"


def _factors(spec: TowerSpec) -> Iterator[str]:
    residual = sorted({layer.residual_factor for layer in spec.layers} - {1.0})
    words = {
        f"embeddings × {spec.embedding_factor:g}": spec.embedding_factor != 1.0,
        f"residual branches × {', '.join(f'{factor:g}' for factor in residual)}": bool(residual),
        f"logits × {spec.logit_factor:g}": spec.logit_factor != 1.0,
        f"logits capped at {spec.logit_softcap}": spec.logit_softcap is not None,
    }
    if any(words.values()):
        yield ", ".join(word for word, there in words.items() if there)
