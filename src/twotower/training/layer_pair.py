"""The units of a training pass: a unit is sharded as a whole and, with activation checkpointing, recomputed as a whole.

A context layer and the denoiser layer that reads its cache form one unit. Its inputs are the two residual streams.
With activation checkpointing, only these inputs are kept. Keys, values and the Mamba states at block boundaries exist
only inside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from twotower.cache.layer_cache import LayerCache
from twotower.model.conditioning import Modulation
from twotower.model.packed_forward import denoise_layer, read_layer
from twotower.model.packed_layout import Layout
from twotower.model.tower import Layer, Tower
from twotower.specs import COUPLED_KINDS

Output = TypeVar("Output")


class AutoregressiveLayer(nn.Module):
    """One layer of an autoregressive model, over packed rows."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """x (B, S, H) → (B, S, H)."""
        return read_layer(self.layer, x, layout)[0]


class LayerPair(nn.Module):
    """A context layer and the denoiser layer that reads its cache.

    denoiser: None if the denoiser has no counterpart of the context layer. place: the number of its layer.
    runs_context: False for a context layer after the last one that a denoiser layer reads; it is not run.
    """

    def __init__(
        self,
        context: Layer,
        denoiser: Layer | None,
        *,
        train_context: bool,
        runs_context: bool,
        place: int | None = None,
    ) -> None:
        super().__init__()
        self.context = context
        self.denoiser = denoiser
        self.train_context, self.runs_context, self.place = train_context, runs_context, place

    def forward(
        self, clean: Tensor, noisy: Tensor | None, modulation: Modulation | None, layout: Layout
    ) -> tuple[Tensor | None, Tensor | None]:
        """clean (B, S, H), noisy (N, L, H) → both residual streams; None for the context's if its layer is not run.

        noisy: None without a denoiser layer.
        """
        past: LayerCache = None
        read = None
        if self.runs_context:
            with torch.set_grad_enabled(self.train_context and torch.is_grad_enabled()):
                read, past = read_layer(self.context, clean, layout)
        if self.denoiser is None or noisy is None:
            return read, noisy
        same = read if self.denoiser is self.context else None
        return read, denoise_layer(self.denoiser, noisy, past, modulation, layout, same)


def pair_layers(context: Tower, denoiser: Tower, *, train_context: bool, all_context_layers: bool) -> list[LayerPair]:
    """One unit for each context layer. all_context_layers: run every one, because its tower's output is needed."""
    own, counterparts = list(denoiser.all_layers()), denoiser.spec.context_layers
    place = {layer: i for i, layer in enumerate(counterparts)}
    last = max((i for i, layer in zip(counterparts, own, strict=True) if layer.kind in COUPLED_KINDS), default=-1)
    return [
        LayerPair(
            layer,
            own[place[i]] if i in place else None,
            train_context=train_context,
            runs_context=all_context_layers or i <= last,
            place=place.get(i),
        )
        for i, layer in enumerate(context.all_layers())
    ]


def run_pair(
    unit: LayerPair,
    activation_checkpointing: bool,
    streams: tuple[Tensor, Tensor],
    changes: Sequence[Modulation | None],
    layout: Layout,
) -> tuple[Tensor, Tensor]:
    """Both residual streams after a unit of `pair_layers`. changes: of each denoiser layer."""
    clean, noisy = streams
    if unit.place is None and not unit.runs_context:
        return clean, noisy
    inputs = (clean, None, None) if unit.place is None else (clean, noisy, changes[unit.place])
    read, written = run_unit(unit, activation_checkpointing, *inputs, layout)
    return clean if read is None else read, noisy if written is None else written


def run_unit(unit: Callable[..., Output], activation_checkpointing: bool, *inputs: object) -> Output:
    """The unit's output. With activation checkpointing it keeps only its inputs and runs again in the backward pass."""
    if activation_checkpointing and torch.is_grad_enabled():
        output: Output = checkpoint(unit, *inputs, use_reentrant=False, preserve_rng_state=False)
        return output
    return unit(*inputs)
