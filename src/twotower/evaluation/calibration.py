"""Calibration: rounds int4 weights for the inputs that a text gives them, one layer of both towers at a time.

Layer i reads what the rounded layers before it compute. The context tower reads whole texts. The denoiser reads blocks
with masks, and the caches of the rounded context tower. The rule of rounding is `checkpoint/calibrated_rounding.py`.
Only one layer's weights, and one layer's inputs, are in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from twotower.checkpoint import tokenizer_files
from twotower.checkpoint.generation_config import GenerationDefaults
from twotower.checkpoint.layer_reader import LayerReader
from twotower.checkpoint.quantize import large_weights, scheme_of
from twotower.errors import ArgumentError
from twotower.evaluation.layer_rounding import recorded, round_weights
from twotower.evaluation.text_batches import BLOCK_SIZE, check_towers, row_length, text_batches
from twotower.model.packed_forward import denoise_layer, read_layer
from twotower.model.packed_layout import Layout
from twotower.model.tower import Layer
from twotower.model.towers import TwoTowerModel
from twotower.quantization import Scheme
from twotower.training.columns import tower_layout
from twotower.training.data import Batch
from twotower.training.noise import Corruption
from twotower.training.patterns import ONLY_LEVELS, draw_masks
from twotower.training.run_tokenizer import encoder_for


@dataclass(frozen=True, kw_only=True)
class TextCalibration:
    """A `checkpoint.quantized_copy.Calibration` with text.

    data: items as in `twotower train --data`. tokens: how many tokens to read. seed: of the masks. progress: called
    with a line for each layer.
    """

    data: Sequence[str]
    tokens: int = 65_536
    seed: int = 0
    device: str = "cpu"
    progress: Callable[[str], object] | None = None

    @torch.no_grad()
    def __call__(self, origin: Path, made: TwoTowerModel, folder: Path) -> Mapping[str, Path]:
        """See `Calibration`.

        Raises:
            ArgumentError: there is no tokenizer or no second tower, the data cannot be read, or an input is not finite.
        """
        config = made.config
        check_towers(config, "--calibrate")
        tokenizer = tokenizer_files.load_tokenizer(origin)
        if tokenizer is None:
            raise ArgumentError(f"{origin}: contains no tokenizer, which calibration needs; add its tokenizer.json")
        encoder = encoder_for(tokenizer, config, GenerationDefaults.read(origin, config.vocab_size))
        batches = text_batches(self.data, encoder, self.tokens, row_length(made.spec.max_position_embeddings))
        with torch.device("meta"):
            model = TwoTowerModel(config)
        streams = _Streams(
            LayerReader.of_two_towers(model, origin, torch.float32, torch.device(self.device)), batches, self.seed
        )
        schemes = {path: scheme_of(module) for path, module in large_weights(made)}
        found: dict[str, Path] = {}
        for i in range(model.spec.num_layers):
            if self.progress is not None:
                self.progress(f"calibrating layer {i + 1} of {model.spec.num_layers}")
            rounded = streams.round_layer(i, schemes)
            file = folder / f"layer-{i}.safetensors"
            if rounded:
                save_file(rounded, file)
            found |= dict.fromkeys(rounded, file)
        return found


class _Streams:
    """The residual streams of both towers after the layers that are rounded already, for every batch."""

    def __init__(self, weights: LayerReader, batches: Sequence[Batch], seed: int) -> None:
        self.weights, self.model = weights, weights.model
        self.layouts: list[Layout] = []
        self.times: list[Tensor] = []
        self.clean: list[Tensor] = []
        self.noisy: list[Tensor] = []
        assert self.model.denoiser is not None
        self.places = {layer: place for place, layer in enumerate(self.model.denoiser.spec.context_layers)}
        for path in ("context.embeddings", "denoiser.embeddings", "time"):
            weights.load(path)
        for batch in batches:
            shift = self.model.config.denoiser.prediction_shift
            noise = draw_masks(batch, BLOCK_SIZE, ONLY_LEVELS, seed=seed, scope="block", shift=shift)
            self._add(batch.to(weights.device), noise.to(weights.device))
        for path in ("context.embeddings", "denoiser.embeddings"):
            weights.unload(path)

    def _add(self, batch: Batch, noise: Corruption) -> None:
        assert self.model.denoiser is not None
        layout = tower_layout(batch, noise, BLOCK_SIZE, self.model.config.denoiser)
        corrupted = batch.tokens.masked_fill(noise.masked, self.model.config.mask_token)
        self.layouts.append(layout)
        self.times.append(layout.select_blocks(noise.t.flatten()))
        self.clean.append(self.model.context.embed(batch.tokens))
        self.noisy.append(self.model.denoiser.embed(layout.to_blocks(corrupted)))

    def round_layer(self, i: int, schemes: Mapping[str, Scheme]) -> dict[str, Tensor]:
        """Rounds context layer i and the denoiser layer that reads its cache, and moves the streams past them.

        Returns int4 data of their weights, by name.
        """
        paths = [f"context.layers.{i}"]
        place = self.places.get(i)
        if place is not None:
            paths.append(f"denoiser.layers.{place}")
        layers = [self._layer(path) for path in paths]
        passes: list[Callable[[int], Tensor]] = [partial(self._read, layers[0])]
        if place is not None:
            passes.append(partial(self._denoise, layers[0], layers[1], place))
        found: dict[str, Tensor] = {}
        for path, layer, run in zip(paths, layers, passes, strict=True):
            start = f"{path}."
            own = {name.removeprefix(start): scheme for name, scheme in schemes.items() if name.startswith(start)}
            with recorded(layer, own) as inputs:
                for number in range(len(self.layouts) if "int4" in own.values() else 0):
                    run(number)
            found |= {start + name: data for name, data in round_weights(layer, own, inputs, path).items()}
        for number in range(len(self.layouts)):
            if place is not None:
                self.noisy[number] = passes[1](number)
            self.clean[number] = passes[0](number)
        for path in paths:
            self.weights.unload(path)
        return found

    def _layer(self, path: str) -> Layer:
        layer = self.weights.load(path)
        assert isinstance(layer, Layer)
        return layer

    def _read(self, layer: Layer, number: int) -> Tensor:
        return read_layer(layer, self.clean[number], self.layouts[number])[0]

    def _denoise(self, context: Layer, denoiser: Layer, i: int, number: int) -> Tensor:
        layout = self.layouts[number]
        _, past = read_layer(context, self.clean[number], layout)
        assert self.model.time is not None
        change = self.model.time.of_layer(self.times[number], i)
        return denoise_layer(denoiser, self.noisy[number], past, change, layout)
