"""The part of `twotower info` about the layers' numbers, the denoiser or each of several, and the sizes of weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from twotower.denoiser_shape import FeedForward
from twotower.specs import TowerSpec

if TYPE_CHECKING:
    from torch import nn

    from twotower.cli.info_facts import AdapterFacts, AllDenoiserFacts, BlockFacts, DenoiserFacts, NamedDenoiserFacts
    from twotower.modeling_twotower import TwoTowerForCausalLM

    ModelsByDtype = dict[str, tuple[TwoTowerForCausalLM, str]]  # a model, and the dtype of what is not quantised


def layer_numbers(spec: TowerSpec) -> dict[str, list[int]]:
    """The numbers of the autoregressive model's layers, by their kind: the letters of the tower's layers in each."""
    kinds: dict[int, str] = {}
    for layer in spec.layers:
        kinds[layer.source] = kinds.get(layer.source, "") + layer.kind
    return {kind: [number for number, own in kinds.items() if own == kind] for kind in dict.fromkeys(kinds.values())}


def denoiser_facts(model: TwoTowerForCausalLM, by_dtype: ModelsByDtype) -> AllDenoiserFacts:
    """The facts of what the denoiser is, or of each of several. by_dtype: the same model, quantised or not."""
    several = model.config.denoisers
    if several is None:
        own = model.config.denoiser
        blocks: BlockFacts = {
            "prediction_shift": own.prediction_shift,
            "block_attention": own.block_attention,
            "first_from_ar": own.first_from_ar,
            "draft_head_rank": None if own.draft_head is None else own.draft_head.rank,
        }
        adapters, tower = _adapters(model, by_dtype), _tower_facts(model)
        return {"adapters": adapters, "denoiser": tower, "blocks": blocks, "denoisers": None}
    each = [_named(model, by_dtype, name) for name in several.names]
    return {"adapters": None, "denoiser": None, "blocks": None, "denoisers": each}


def _named(model: TwoTowerForCausalLM, by_dtype: ModelsByDtype, name: str) -> NamedDenoiserFacts:
    several, view = model.config.denoisers, model.with_denoiser(name)
    assert several is not None
    views = {kind: (one.with_denoiser(name), dtype) for kind, (one, dtype) in by_dtype.items()}
    own = denoiser_facts(view, views)
    assert own["blocks"] is not None
    return {
        "name": name,
        "modes": several.modes_of(name),
        "block_size": several.by_name[name].block_size,
        "adapters": own["adapters"],
        "denoiser": own["denoiser"],
        "blocks": own["blocks"],
        "parameters": count_of(view) - count_of(view.context, adapters=False),
        "bytes": {kind: memory_of(*one)["denoiser"] for kind, one in views.items()},
        "read_bytes": {kind: read_bytes_of(*one) for kind, one in views.items()},
    }


def _tower_facts(model: TwoTowerForCausalLM) -> DenoiserFacts | None:
    """The facts of a denoiser tower that lacks layers or has another feed-forward; None for any other denoiser."""
    own, denoiser = model.config.denoiser, model.denoiser
    if denoiser is None or (own.denoiser_layers is None and own.denoiser_feed_forward is None):
        return None
    spec = model.spec
    return {
        "pattern": denoiser.spec.pattern,
        "layers": list(range(spec.layers[-1].source + 1) if own.denoiser_layers is None else own.denoiser_layers),
        "feed_forward": None if own.denoiser_feed_forward is None else _words(own.denoiser_feed_forward),
        "parameters": sum(p.numel() for p in [*denoiser.parameters(), *denoiser.buffers()]),
    }


def _words(feed_forward: FeedForward) -> str:
    """What stands in the place of the MoE layers, in words."""
    if feed_forward.kind == "experts":
        return f"the {feed_forward.size} most used experts of each MoE layer"
    return f"a dense MLP of width {feed_forward.size} in the place of each MoE layer"


def count_of(module: nn.Module, adapters: bool = True) -> int:
    named = [*module.named_parameters(), *module.named_buffers()]
    return sum(tensor.numel() for name, tensor in named if adapters or not _of_adapters(name))


def _of_adapters(name: str) -> bool:
    return any(part in name for part in ("adapter.", "mask_embedding.", "draft_head."))


def memory_of(model: TwoTowerForCausalLM, dtype: str) -> dict[str, int]:
    """Bytes of weights; weights that are not quantized are in `dtype`. Time conditioning and adapters count to the
    denoiser."""
    context = denoiser = 0
    for name, size in _sizes(model, dtype):
        if name.startswith("context.") and not _of_adapters(name):
            context += size
        else:
            denoiser += size
    return {"context": context, "denoiser": denoiser, "both": context + denoiser}


def _sizes(module: nn.Module, dtype: str) -> Iterator[tuple[str, int]]:
    """Names and bytes of tensors, of which those that are not quantized are in `dtype`."""
    import torch

    from twotower.model.fp32_tensors import target_dtype

    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        kept = target_dtype(name, getattr(torch, dtype)) if tensor.is_floating_point() else tensor.dtype
        yield name, tensor.numel() * kept.itemsize


def _adapters(model: TwoTowerForCausalLM, models_by_dtype: ModelsByDtype) -> AdapterFacts | None:
    if (adapters := model.config.denoiser.adapters) is None:
        return None
    return {
        "rank": adapters.rank,
        "gate": adapters.gate,
        "parameters": sum(tensor.numel() for name, tensor in model.named_parameters() if _of_adapters(name)),
        "bytes": {name: memory_of(*each)["denoiser"] for name, each in models_by_dtype.items()},
        "read_bytes": {name: read_bytes_of(*each) for name, each in models_by_dtype.items()},
    }


def read_bytes_of(model: TwoTowerForCausalLM, dtype: str) -> int:
    """Bytes of weights that a pass of the denoiser over one token reads: one row of the embedding, selected experts."""
    from twotower.model.moe import MoE

    def size_of(module: nn.Module) -> int:
        return sum(size for _, size in _sizes(module, dtype))

    tower = model.context if model.denoiser is None else model.denoiser
    table = size_of(tower.embeddings)
    size = size_of(tower) - (0 if tower.spec.tied_head else table - table // tower.spec.vocab_size)
    size += 0 if model.time is None else size_of(model.time)
    size -= 0 if (head := tower.draft_head) is None else size_of(head)  # a pass without masks does not read it
    if (moe := tower.spec.moe) is None:
        return size
    routed = sum(size_of(layer.mixer.experts) for layer in tower.all_layers() if isinstance(layer.mixer, MoE))
    return size - routed + routed * moe.top_k // moe.experts
