"""The part of `twotower info` about the layers' numbers, and about a denoiser tower that is not the context tower's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from twotower.denoiser_shape import FeedForward
from twotower.specs import TowerSpec

if TYPE_CHECKING:
    from twotower.cli.info_facts import DenoiserFacts
    from twotower.modeling_twotower import TwoTowerForCausalLM


def layer_numbers(spec: TowerSpec) -> dict[str, list[int]]:
    """The numbers of the autoregressive model's layers, by their kind: the letters of the tower's layers in each."""
    kinds: dict[int, str] = {}
    for layer in spec.layers:
        kinds[layer.source] = kinds.get(layer.source, "") + layer.kind
    return {kind: [number for number, own in kinds.items() if own == kind] for kind in dict.fromkeys(kinds.values())}


def denoiser_facts(model: TwoTowerForCausalLM) -> DenoiserFacts | None:
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
