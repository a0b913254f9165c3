"""Variations of the design for ablations: their units, objective and model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from twotower.cache.layer_cache import LayerCache, MambaCache
from twotower.model import conditioning
from twotower.model.attention import Attention
from twotower.model.conditioning import TimeConditioning
from twotower.model.mamba2 import Mamba2
from twotower.model.packed_forward import denoise_layer, read_layer
from twotower.model.packed_layout import Layout
from twotower.model.tower import Layer
from twotower.modeling_twotower import TwoTowerForCausalLM
from twotower.specs import Mamba2Spec
from twotower.training.objective import DenoisingObjective, DenoisingOptions


@dataclass(frozen=True)
class Variation:
    """One change of the design. change: of the caches that a denoiser layer reads; options: of the objective."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    block_size: int = 16
    offset: str = "random"
    seeded: bool = True
    coupling: str = "layers"  # "last": every layer reads the context tower's final hidden state
    kept: str = ""  # "half": every other denoiser layer
    norm_first: bool = False
    gates: str = "one"
    tied: bool = False

    @property
    def generates(self) -> bool:
        """Whether the ordinary decoder can run the model that this variation trains."""
        return self.coupling == "layers" and not self.kept


VARIATIONS = (
    Variation("base"),
    Variation("no Mamba seeding", seeded=False),
    Variation("no time conditioning", options={"time": False}),
    Variation("modulate after norm everywhere", norm_first=True),
    Variation("gates near 0 (randn/√H)", gates="near zero"),
    Variation("one tied network", options={"train_context": True, "ar_weight": 1.0}, tied=True),
    Variation("coupling to the last hidden state", coupling="last"),
    Variation("training block 8", block_size=8),
    Variation("training block 32", block_size=32),
    Variation("t per block", options={"scope": "block"}),
    Variation("t per packed row (released)", options={"scope": "row"}),
    Variation("block offsets fixed", offset="fixed"),
    Variation("half the denoiser layers", kept="half"),
)


class Unit(nn.Module):
    """A context layer, and the denoiser layer of the same index, if it was kept."""

    def __init__(self, context: Layer, denoiser: Layer | None, seeded: bool, train_context: bool) -> None:
        super().__init__()
        self.context, self.denoiser, self.seeded, self.train_context = context, denoiser, seeded, train_context
        self.runs_context = True

    def forward(self, clean: Tensor, noisy: Tensor, modulation: Any, layout: Layout) -> tuple[Tensor, Tensor]:
        with torch.set_grad_enabled(self.train_context and torch.is_grad_enabled()):
            clean, past = read_layer(self.context, clean, layout)
        if self.denoiser is None:
            return clean, noisy
        return clean, denoise_layer(self.denoiser, noisy, past if self.seeded else unseeded(past), modulation, layout)


class LastStateUnit(Unit):
    """A denoiser layer that projects keys and values from the context's final hidden state; Mamba starts from zero.

    Without a noisy stream, the unit is the context layer; all context layers run first. Both run through `forward`,
    where FSDP2 gathers the parameters.
    """

    def forward(self, clean: Tensor, noisy: Tensor | None, modulation: Any, layout: Layout) -> tuple[Tensor, Any]:
        if noisy is None:
            return read_layer(self.context, clean, layout)[0], None
        assert self.denoiser is not None
        mixer: nn.Module = self.denoiser.mixer
        past: LayerCache = None
        if isinstance(mixer, Attention):
            past = mixer.project(clean, layout.rotation(mixer.rope, clean.dtype, chosen=False))[1]
        elif isinstance(mixer, Mamba2):
            past = _zeros(mixer.spec, clean, layout)
        return clean, denoise_layer(self.denoiser, noisy, past, modulation, layout)


def unseeded(past: LayerCache) -> LayerCache:
    """Replaces a Mamba layer's cache by zeros; keys and values stay."""
    if isinstance(past, MambaCache):
        return MambaCache(torch.zeros_like(past.conv_window), torch.zeros_like(past.ssm_state))
    return past


def _zeros(spec: Mamba2Spec, clean: Tensor, layout: Layout) -> MambaCache:
    rows = layout.document.shape[0] * layout.blocks
    state = (rows, spec.num_heads, spec.head_dim, spec.state_size)
    return MambaCache(clean.new_zeros(rows, spec.conv_kernel - 1, spec.conv_dim), clean.new_zeros(state))


class Varied(DenoisingObjective):
    """The denoising objective with other units."""

    def __init__(self, model: TwoTowerForCausalLM, variation: Variation, options: DenoisingOptions) -> None:
        assert model.denoiser is not None
        assert model.time is not None
        super().__init__(model.context, model.denoiser, model.time, options)
        contexts, denoisers = list(model.context.all_layers()), list(model.denoiser.all_layers())
        kept = set(range(0, len(denoisers), 2)) if variation.kept else set(range(len(denoisers)))
        self.variation, self.kept = variation, kept
        make = LastStateUnit if variation.coupling == "last" else Unit
        self.units = nn.ModuleList(
            make(context, denoiser if i in kept else None, variation.seeded, options.train_context)
            for i, (context, denoiser) in enumerate(zip(contexts, denoisers, strict=True))
        )
        for i, layer in enumerate(denoisers):
            layer.requires_grad_(i in kept)

    def _run_units(
        self, streams: tuple[Tensor, Tensor], changes: Any, layout: Layout, columns: Any
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        clean, noisy = streams
        if self.variation.coupling == "last":
            with torch.no_grad():
                for unit in self.units:
                    clean, _ = unit(clean, None, None, layout)
                clean = self.context_norm_f(clean)
        for unit, change in zip(self.units, changes, strict=True):
            clean, noisy = unit(clean, noisy, change, layout)
        return clean, noisy, []


@contextlib.contextmanager
def norm_order(variation: Variation) -> Iterator[None]:
    """Sets the order of norm and modulation while the variation trains and generates."""
    usual = conditioning.MODULATE_BEFORE_NORM
    if variation.norm_first:
        conditioning.MODULATE_BEFORE_NORM = frozenset()
    try:
        yield
    finally:
        conditioning.MODULATE_BEFORE_NORM = usual


class Blind(TwoTowerForCausalLM):
    """A model whose denoiser's Mamba layers start from zero."""

    def denoise(self, block: Tensor, t: Tensor | None, view: Any, *rest: Any, **options: Any) -> Tensor:
        return super().denoise(block, t, replace(view, past=[unseeded(past) for past in view.past]), *rest, **options)


def released_gates(time: TimeConditioning, hidden: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for table in time.scale_shift_tables:
            table.copy_(torch.randn(table.shape, generator=generator) / hidden**0.5)
