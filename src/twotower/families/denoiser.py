"""The layers of a denoiser tower that lacks layers of the context tower, or has another feed-forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from twotower.config import TwoTowerConfig
from twotower.denoiser_shape import FeedForward, FeedForwardKind
from twotower.errors import ConfigError
from twotower.specs import COUPLED_KINDS, LayerSpec, MLPSpec, MoESpec, TowerSpec


def denoiser_of(config: TwoTowerConfig, context: TowerSpec) -> TowerSpec:
    """The denoiser tower of a configuration, given its context tower; see `denoiser_spec`."""
    own = config.denoiser
    return denoiser_spec(context, own.denoiser_layers, own.denoiser_feed_forward)


def denoiser_spec(
    context: TowerSpec, layers: Sequence[int] | None = None, feed_forward: FeedForward | None = None
) -> TowerSpec:
    """The denoiser of a context tower.

    layers: increasing numbers of the autoregressive model's layers (`LayerSpec.source`) that it has a counterpart for;
    None: all. Its own layers are numbered from 0. feed_forward: in the place of MoE layers; None: as they are.

    Raises:
        ConfigError: a layer does not exist, no layer reads a cache, or the feed-forward does not fit the MoE layers.
    """
    if layers is None and feed_forward is None:
        return context
    count = num_sources(context)
    chosen = range(count) if layers is None else layers
    if chosen[-1] >= count:
        raise ConfigError(
            f"config: denoiser_layers has {chosen[-1]}; the autoregressive model has layers 0 to {count - 1}"
        )
    number = {source: i for i, source in enumerate(chosen)}
    places = [i for i, layer in enumerate(context.layers) if layer.source in number]
    kept = [replace(context.layers[i], source=number[context.layers[i].source]) for i in places]
    if not any(layer.kind in COUPLED_KINDS for layer in kept):
        raise ConfigError(
            f"config: denoiser_layers is {list(chosen)}, of which no layer reads the context; add a layer with "
            "attention or a recurrent state"
        )
    if feed_forward is not None:
        kept = _with_feed_forward(kept, feed_forward)
    return replace(context, layers=tuple(kept), counterparts=tuple(places))


def num_sources(context: TowerSpec) -> int:
    """The number of layers of the autoregressive model, which may consist of two of the tower's."""
    return context.layers[-1].source + 1


def _with_feed_forward(layers: list[LayerSpec], feed_forward: FeedForward) -> list[LayerSpec]:
    if not any(isinstance(layer.mixer, MoESpec) for layer in layers):
        raise ConfigError(
            f"config: denoiser_feed_forward is {str(feed_forward)!r}, and the denoiser has no MoE layers; leave it out"
        )
    change = _CHANGES[feed_forward.kind]
    return [
        replace(layer, mixer=change(layer.mixer, feed_forward.size)) if isinstance(layer.mixer, MoESpec) else layer
        for layer in layers
    ]


def _fewer_experts(moe: MoESpec, count: int) -> MoESpec:
    def wrong(reason: str) -> ConfigError:
        return ConfigError(f"config: denoiser_feed_forward keeps {count} experts, and {reason}")

    if count > moe.experts:
        raise wrong(f"a MoE layer has {moe.experts}; keep at most that")
    if count < moe.top_k:
        raise wrong(f"{moe.top_k} are selected for a token; keep at least that")
    if moe.num_groups == 1:
        return replace(moe, experts=count)
    each = moe.experts // moe.num_groups
    if count % each:
        raise wrong(f"groups of {each} are kept whole; give a multiple")
    if count // each < moe.top_groups:
        raise wrong(
            f"{moe.top_groups} groups of {each} are selected for a token; keep at least {moe.top_groups * each}"
        )
    return replace(moe, experts=count, num_groups=count // each)


def _dense(moe: MoESpec, width: int) -> MLPSpec:
    units = moe.experts * moe.expert.width + (0 if moe.shared is None else moe.shared.width)
    if width > units:
        raise ConfigError(
            f"config: denoiser_feed_forward has a width of {width}, and the experts of a layer have {units} units "
            "together; give at most that"
        )
    shared = moe.shared or moe.expert
    if (shared.activation, shared.gated) != (moe.expert.activation, moe.expert.gated):
        raise ConfigError(
            "config: denoiser_feed_forward is dense, and the shared expert has another activation than the routed "
            "ones; keep the experts"
        )
    return replace(moe.expert, width=width, bias=(moe.latent is not None and moe.latent_bias) or shared.bias)


_CHANGES: dict[FeedForwardKind, Callable[[MoESpec, int], MoESpec | MLPSpec]] = {
    "experts": _fewer_experts,
    "dense": _dense,
}
