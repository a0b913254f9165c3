"""The units of a training pass: a unit is sharded as a whole and, with activation checkpointing, recomputed as a whole.

Context layer i and denoiser layer i form one unit. Its inputs are the two residual streams. With activation
checkpointing, only these inputs are kept. Keys, values and the Mamba states at block boundaries exist only inside it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from twotower.cache.layer_cache import LayerCache
from twotower.model.conditioning import Modulation
from twotower.model.packed_forward import Layout, denoise_layer, read_layer
from twotower.model.tower import Layer
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
    """Context layer i and denoiser layer i.

    runs_context: False for a context layer after the last one that a denoiser layer reads; it is not run.
    """

    def __init__(self, context: Layer, denoiser: Layer, *, train_context: bool, runs_context: bool) -> None:
        super().__init__()
        self.context = context
        self.denoiser = denoiser
        self.train_context, self.runs_context = train_context, runs_context

    def forward(
        self, clean: Tensor, noisy: Tensor, modulation: Modulation | None, layout: Layout
    ) -> tuple[Tensor | None, Tensor]:
        """clean (B, S, H), noisy (N, L, H) → both residual streams; None for the context's if its layer is not run."""
        past: LayerCache = None
        read = None
        if self.runs_context:
            with torch.set_grad_enabled(self.train_context and torch.is_grad_enabled()):
                read, past = read_layer(self.context, clean, layout)
        same = read if self.denoiser is self.context else None
        return read, denoise_layer(self.denoiser, noisy, past, modulation, layout, same)


def pair_layers(
    context: list[Layer], denoiser: list[Layer], *, train_context: bool, all_context_layers: bool
) -> list[LayerPair]:
    """One unit for each layer. all_context_layers: run every context layer, because its tower's output is needed."""
    last = max((i for i, layer in enumerate(denoiser) if layer.kind in COUPLED_KINDS), default=-1)
    return [
        LayerPair(reader, writer, train_context=train_context, runs_context=all_context_layers or i <= last)
        for i, (reader, writer) in enumerate(zip(context, denoiser, strict=True))
    ]


def run_unit(unit: Callable[..., Output], activation_checkpointing: bool, *inputs: object) -> Output:
    """The unit's output. With activation checkpointing it keeps only its inputs and runs again in the backward pass."""
    if activation_checkpointing and torch.is_grad_enabled():
        output: Output = checkpoint(unit, *inputs, use_reentrant=False, preserve_rng_state=False)
        return output
    return unit(*inputs)
