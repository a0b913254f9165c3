"""The tensors of a denoiser tower of `twotower init`, which lacks layers of its source or has another feed-forward."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from twotower.checkpoint.names import TensorEntry
from twotower.checkpoint.one_tower import OneTowerCheckpoint
from twotower.denoiser_fields import DenoiserConfig
from twotower.denoiser_shape import FeedForward, parse_layers
from twotower.errors import ArgumentError
from twotower.families.denoiser import num_sources
from twotower.specs import MoESpec, TowerSpec


@dataclass(frozen=True, kw_only=True)
class MadeFeedForward:
    """What a `FeedForwardMaker` has made.

    kept: the numbers of the experts of each denoiser layer with fewer. files: of the weights of dense MLPs, by their
    names in memory. errors: by the number of the autoregressive model's layer, the relative error of the new output:
    ‖new − old‖ / ‖old‖ over text that was not fitted, if there is enough text.
    """

    kept: dict[int, Tensor] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)
    errors: dict[int, float] = field(default_factory=dict)


class FeedForwardMaker(Protocol):
    """Chooses experts, or fits dense MLPs, with inputs that a text gives the MoE layers."""

    def __call__(self, source: OneTowerCheckpoint, origin: Path, folder: Path) -> MadeFeedForward:
        """source: with the model of the conversion. origin: its path. Weights go into safetensors files of `folder`."""


def shape_of(
    tower: OneTowerCheckpoint, layers: str | None, feed_forward: str | None, maker: FeedForwardMaker | None
) -> DenoiserConfig | None:
    """The denoiser that the texts `denoiser_layers` and `denoiser_feed_forward` describe; None: that of the release.

    Raises:
        ArgumentError: a text is not of its form, or a feed-forward has no text for calibration, or the reverse.
    """
    if feed_forward is None and maker is not None:
        raise ArgumentError(
            "calibration text is for a denoiser_feed_forward, and none is given; leave out --calibrate, or give "
            "--denoiser-feed-forward",
            param="calibration",
        )
    if feed_forward is not None and maker is None:
        raise ArgumentError(
            f"denoiser_feed_forward is {feed_forward!r}, and experts are chosen and MLPs fitted with text; give text "
            "with --calibrate DATA",
            param="calibration",
        )
    count = num_sources(tower.model.spec)
    chosen = None if layers is None else parse_layers(layers, count)
    if chosen is not None and len(chosen) == count:
        chosen = None
    kind = None if feed_forward is None else FeedForward.parse(feed_forward)
    made = DenoiserConfig(denoiser_layers=chosen, denoiser_feed_forward=kind)
    return None if made == DenoiserConfig() else made


class DenoiserTensors:
    """Reads the tensors of a denoiser tower from its source. made: set before the first tensor is read."""

    def __init__(self, tower: OneTowerCheckpoint) -> None:
        self.tower, self.made = tower, MadeFeedForward()
        denoiser = tower.model.denoiser
        self.spec: TowerSpec = tower.model.spec if denoiser is None else denoiser.spec

    def read(self, entry: TensorEntry) -> Tensor:
        """The piece of an entry of the denoiser."""
        if self._is_fitted(entry):
            with safe_open(self.made.files[entry.memory], framework="pt") as file:
                fitted: Tensor = file.get_tensor(entry.memory)
            return fitted
        kept = self._kept(entry)
        if kept is None or entry.expert is not None:
            return self.tower.weights.read(self.place(entry))
        return self.tower.weights.read(self.place(entry)).index_select(0, kept)

    def dtype(self, entry: TensorEntry) -> torch.dtype:
        """The dtype of the source's tensor."""
        return self.tower.weights.dtype(self.place(entry))

    def place(self, entry: TensorEntry) -> TensorEntry:
        """Where an entry of the denoiser is in the source; for the weights of a dense MLP, that of the router."""
        name = entry.memory.removeprefix("denoiser.")
        if not name.startswith("layers."):
            return self.tower.places[name, entry.expert]
        _, number, part = name.split(".", 2)
        source = f"layers.{self.spec.context_layers[int(number)]}"
        if self._is_fitted(entry):
            return self.tower.places[f"{source}.mixer.gate.weight", None]
        kept, expert = self._kept(entry), entry.expert
        if kept is not None and expert is not None:
            expert = int(kept[expert])
        return self.tower.places[f"{source}.{part}", expert]

    def _is_fitted(self, entry: TensorEntry) -> bool:
        """Whether the tensor is of an MLP that stands in the place of a MoE layer."""
        number = _layer_of(entry)
        if number is None or ".mixer." not in entry.memory:
            return False
        context = self.tower.model.spec.layers[self.spec.context_layers[number]]
        return context.kind == "E" and self.spec.layers[number].kind != "E"

    def _kept(self, entry: TensorEntry) -> Tensor | None:
        """The kept experts of the layer of a tensor with a row or an entry for each expert; None for other tensors."""
        number = _layer_of(entry)
        if number not in self.made.kept or not any(part in entry.memory for part in (".mixer.gate.", ".experts.")):
            return None
        return self.made.kept[number]


def changed_layers(model_spec: TowerSpec, denoiser: TowerSpec) -> dict[int, int]:
    """The MoE layers of the context tower that the denoiser has in another form → the denoiser's layers."""
    return {
        layer: place
        for place, layer in enumerate(denoiser.context_layers)
        if isinstance(model_spec.layers[layer].mixer, MoESpec)
        and model_spec.layers[layer].mixer != denoiser.layers[place].mixer
    }


def _layer_of(entry: TensorEntry) -> int | None:
    parts = entry.memory.split(".")
    return int(parts[2]) if parts[:2] == ["denoiser", "layers"] else None
