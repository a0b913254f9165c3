"""The tensors of a context tower in a GGUF file: names, shapes, and the pieces that they are made of.

Names in a file are those of llama.cpp's `llama-arch.cpp`; values are changed as its converter changes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from twotower.checkpoint.gguf_export.architectures import Architecture
from twotower.checkpoint.gguf_export.delta_net import delta_net_tensors
from twotower.checkpoint.gguf_export.folding import Change, layer_changes, table_factors, times
from twotower.checkpoint.gguf_export.metadata import EMPTY_EXPERT, needs_empty_experts, shared_width
from twotower.specs import (
    AttentionSpec,
    DeltaNetSpec,
    LayerSpec,
    Mamba2Spec,
    MLPSpec,
    MoESpec,
    ParallelSpec,
    TowerSpec,
)

_ATTENTION = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
}
_MLP = {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
_EXPERTS = {
    "gate.weight": "ffn_gate_inp.weight",
    "gate.e_score_correction_bias": "exp_probs_b.bias",
    "shared_expert_gate.weight": "ffn_gate_inp_shexp.weight",
    "fc1_latent_proj.weight": "ffn_latent_down.weight",
    "fc2_latent_proj.weight": "ffn_latent_up.weight",
    **{f"experts.{part}": f"{name}_exps.weight" for part, name in _MLP.items()},
    **{f"shared_experts.{part}.weight": f"{name}_shexp.weight" for part, name in _MLP.items()},
}
_MAMBA = {
    "dt_bias": "ssm_dt.bias",
    "A_log": "ssm_a",
    "D": "ssm_d",
    "in_proj.weight": "ssm_in.weight",
    "conv1d.weight": "ssm_conv1d.weight",
    "conv1d.bias": "ssm_conv1d.bias",
    "norm.weight": "ssm_norm.weight",
    "out_proj.weight": "ssm_out.weight",
}
# Parts of names of tensors that are fp32 in every file, beside vectors; a decay rate and D have no suffix.
_EXACT = ("norm.weight", "ffn_gate_inp", "ssm_conv1d")
_EXACT_ENDS = (".ssm_a", ".ssm_d")


@dataclass(frozen=True)
class StoredPart:
    """A tensor in memory that is a part of one in the file, or `shape` of zeros if `source` is None.

    change: of its values, as a whole (one expert at a time).
    """

    source: str | None
    shape: tuple[int, ...] = ()
    change: Change | None = None


@dataclass(frozen=True)
class ExportedTensor:
    """A tensor in the file: its parts follow each other. exact: whether it is fp32 in every file."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[StoredPart, ...]
    exact: bool


def exported_tensors(
    spec: TowerSpec, architecture: Architecture, shapes: Mapping[str, tuple[int, ...]]
) -> list[ExportedTensor]:
    """All tensors of a file. shapes: of the tensors of the tower by name in memory, such as `layers.0.norm.weight`."""
    made: dict[str, ExportedTensor] = {}

    def add(name: str, shape: Sequence[int], *parts: StoredPart) -> None:
        exact = len(shape) == 1 or name.endswith(_EXACT_ENDS) or any(mark in name for mark in _EXACT)
        made[name] = ExportedTensor(name, tuple(shape), parts, exact)

    factors = table_factors(spec) if architecture.folded else {}

    def add_table(name: str, source: str, factor: str) -> None:
        change = times(factors[factor]) if factors else None
        add(name, shapes["embeddings.weight"], StoredPart(source, change=change))

    add_table("token_embd.weight", "embeddings.weight", "embeddings.weight")
    if not spec.tied_head or architecture.own_head:
        add_table("output.weight", "embeddings.weight" if spec.tied_head else "head.weight", "head.weight")
    add("output_norm.weight", shapes["norm_f.weight"], StoredPart("norm_f.weight", change=_shifted(spec)))
    for number, layer in enumerate(spec.layers):
        prefix = f"layers.{number}."
        own = {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
        changes = layer_changes(layer) if architecture.folded else {}
        for name, shape, parts in _of_layer(layer, spec, architecture, own):
            placed = (_placed(part, prefix, changes) for part in parts)
            add(f"blk.{layer.source}.{name}", shape, *placed)
    return list(made.values())


Placed = tuple[str, tuple[int, ...], tuple[StoredPart, ...]]


def _placed(part: StoredPart, prefix: str, changes: Mapping[str, Change]) -> StoredPart:
    """A part of a layer with its name in the tower, and with the change of its values that the layer needs."""
    if part.source is None:
        return part
    first, second = changes.get(part.source), part.change
    both = first if second is None else second if first is None else lambda weight: second(first(weight))
    return StoredPart(prefix + part.source, part.shape, both)


def _of_layer(
    layer: LayerSpec, spec: TowerSpec, architecture: Architecture, own: Mapping[str, tuple[int, ...]]
) -> Iterator[Placed]:
    feeds = layer.kind in "-E"
    shifted = _shifted(spec)
    before = architecture.feed_norm if feeds and architecture.merged else "attn_norm"
    behind = "post_ffw_norm" if feeds else "post_attention_norm"
    for leaf, name in (("norm", before), ("post_norm", behind)):
        if (shape := own.get(f"{leaf}.weight")) is not None:
            bare = name == "ffn_norm" and architecture.folded  # Falcon-H1's has no suffix
            yield name if bare else f"{name}.weight", shape, (StoredPart(f"{leaf}.weight", change=shifted),)
    inner = {name.removeprefix("mixer."): shape for name, shape in own.items() if name.startswith("mixer.")}
    mixer = layer.mixer
    if isinstance(mixer, ParallelSpec):
        placed = _of_parallel(mixer, spec, architecture, inner)
    elif isinstance(mixer, AttentionSpec):
        placed = _of_attention(mixer, spec, architecture, inner)
    elif isinstance(mixer, Mamba2Spec):
        placed = _of_mamba(mixer, inner)
    elif isinstance(mixer, DeltaNetSpec):
        found = delta_net_tensors(mixer, inner)
        placed = ((name, shape, (StoredPart(source, change=change),)) for name, shape, source, change in found)
    elif isinstance(mixer, MoESpec):
        placed = _of_experts(spec, inner)
    else:
        assert isinstance(mixer, MLPSpec)
        placed = _of_mlp(mixer, spec, architecture, inner)
    yield from _inside("mixer.", placed)


def _inside(module: str, placed: Iterable[Placed]) -> Iterator[Placed]:
    """Tensors of a module of a layer, by their names in the layer."""
    for name, shape, parts in placed:
        yield name, shape, tuple(_placed(part, module, {}) for part in parts)


def _of_parallel(
    mixer: ParallelSpec, spec: TowerSpec, architecture: Architecture, own: Mapping[str, tuple[int, ...]]
) -> Iterator[Placed]:
    halves: dict[str, dict[str, tuple[int, ...]]] = {"attention": {}, "mamba": {}}
    for name, shape in own.items():
        half, _, rest = name.partition(".")
        halves[half][rest] = shape
    yield from _inside("attention.", _of_attention(mixer.attention, spec, architecture, halves["attention"]))
    yield from _inside("mamba.", _of_mamba(mixer.mamba, halves["mamba"]))


def _of_attention(
    mixer: AttentionSpec, spec: TowerSpec, architecture: Architecture, own: Mapping[str, tuple[int, ...]]
) -> Iterator[Placed]:
    permuted: Change | None = None
    if architecture.rotation == "neighbours" and mixer.rope is not None and not spec.ropes[mixer.rope].interleaved:
        permuted = _neighbours(mixer.head_dim, 2 * len(spec.ropes[mixer.rope].inverse_frequencies))
    changes = {"q_proj": permuted, "k_proj": permuted, "q_norm": _shifted(spec), "k_norm": _shifted(spec)}
    if architecture.packed_qkv:
        rows = sum(own[f"{part}_proj.weight"][0] for part in "qkv")
        yield "attn_qkv.weight", (rows, spec.hidden_size), tuple(StoredPart(f"{part}_proj.weight") for part in "qkv")
    for source, shape in own.items():
        module, _, leaf = source.rpartition(".")
        if not (architecture.packed_qkv and module in ("q_proj", "k_proj", "v_proj")):
            yield f"{_ATTENTION[module]}.{leaf}", shape, (StoredPart(source, change=changes.get(module)),)


def _of_mamba(mixer: Mamba2Spec, own: Mapping[str, tuple[int, ...]]) -> Iterator[Placed]:
    for source, shape in own.items():
        change: Change | None = None
        if source == "A_log":
            change = _decay
        if source in ("A_log", "D"):
            shape = (*shape, 1)
        elif source == "conv1d.weight":
            shape = (shape[0], shape[2])
        elif source == "norm.weight":
            shape = (mixer.num_groups, mixer.inner // mixer.num_groups)
        yield _MAMBA[source], shape, (StoredPart(source, change=change),)


def _of_experts(spec: TowerSpec, own: Mapping[str, tuple[int, ...]]) -> Iterator[Placed]:
    for source, shape in own.items():
        if source.startswith("shared_experts."):
            yield _padded(_EXPERTS[source], source, shape, shared_width(spec))
        else:
            shape = shape[1:] if source == "shared_expert_gate.weight" else shape
            yield _EXPERTS[source], shape, (StoredPart(source),)


def _of_mlp(
    mixer: MLPSpec, spec: TowerSpec, architecture: Architecture, own: Mapping[str, tuple[int, ...]]
) -> Iterator[Placed]:
    if needs_empty_experts(spec, architecture):
        moe = spec.moe
        assert moe is not None
        hidden = spec.hidden_size if moe.latent is None else moe.latent
        zeros = {
            "ffn_gate_inp.weight": (moe.experts, spec.hidden_size),
            "exp_probs_b.bias": (moe.experts,),
            "ffn_up_exps.weight": (moe.experts, EMPTY_EXPERT, hidden),
            "ffn_down_exps.weight": (moe.experts, hidden, EMPTY_EXPERT),
        }
        yield from ((name, shape, (StoredPart(None, shape),)) for name, shape in zeros.items())
        if moe.latent is not None:
            yield "ffn_latent_down.weight", (hidden, spec.hidden_size), (StoredPart(None, (hidden, spec.hidden_size)),)
            yield "ffn_latent_up.weight", (spec.hidden_size, hidden), (StoredPart(None, (spec.hidden_size, hidden)),)
        for source, shape in own.items():
            yield _padded(_EXPERTS[f"shared_experts.{source}"], source, shape, shared_width(spec))
        return
    if architecture.packed_gate:
        yield (
            "ffn_up.weight",
            (2 * mixer.width, spec.hidden_size),
            (StoredPart("gate_proj.weight"), StoredPart("up_proj.weight")),
        )
    for source, shape in own.items():
        module, _, leaf = source.rpartition(".")
        if not (architecture.packed_gate and module != "down_proj"):
            yield f"{_MLP[module]}.{leaf}", shape, (StoredPart(source),)


def _padded(name: str, source: str, shape: tuple[int, ...], width: int) -> Placed:
    """A shared expert with units that are zero, up to a width: relu² of nothing is nothing."""
    rows, columns = shape
    if "down_proj" in source:
        return name, (rows, width), (StoredPart(source, change=_wider(width - columns)),)
    missing = width - rows
    parts = (StoredPart(source), StoredPart(None, (missing, columns))) if missing else (StoredPart(source),)
    return name, (width, columns), parts


# --- changes of values ----------------------------------------------------------------------------------------------


def _shifted(spec: TowerSpec) -> Change | None:
    """norm_offset + weight in fp32, which llama.cpp's norms multiply by."""
    return (lambda weight: weight.float() + spec.norm_offset) if spec.norm_offset else None


def _decay(logarithm: Tensor) -> Tensor:
    return -torch.exp(logarithm.float())


def _wider(columns: int) -> Change | None:
    return (lambda weight: torch.nn.functional.pad(weight, (0, columns))) if columns else None


def _neighbours(head_dim: int, turned: int) -> Change:
    """Rows of queries or keys whose halves turn together → rows whose neighbours turn together, in each head."""
    half = torch.arange(turned // 2)
    order = torch.cat([torch.stack([half, half + turned // 2], 1).flatten(), torch.arange(turned, head_dim)])

    def change(weight: Tensor) -> Tensor:
        heads: Tensor = weight.unflatten(0, (-1, head_dim))
        return heads[:, order].flatten(0, 1)

    return change
