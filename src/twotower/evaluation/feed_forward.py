"""Makes the feed-forward of a new denoiser from the MoE layers of an autoregressive model, with calibration text.

The model reads the text layer by layer, so that only one layer's weights are in memory. The inputs of a MoE layer are
those that the model's own layers before it give. The most used experts are kept (groups of experts whole), or a dense
MLP is made (`dense_units.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from twotower.checkpoint.denoiser_tensors import MadeFeedForward, changed_layers
from twotower.checkpoint.layer_reader import LayerReader
from twotower.checkpoint.one_tower import OneTowerCheckpoint
from twotower.errors import ArgumentError
from twotower.evaluation.dense_units import dense_mlp
from twotower.evaluation.text_batches import BLOCK_SIZE, row_length, text_batches
from twotower.model.conditioning import modulated_norm
from twotower.model.moe import MoE
from twotower.model.packed_forward import read_layer
from twotower.model.packed_layout import Layout
from twotower.model.tower import Layer
from twotower.specs import MLPSpec, MoESpec
from twotower.training.run_tokenizer import encoder_for

MEASURED = 8  # every eighth batch of text is not fitted, and measures the error


@dataclass(frozen=True, kw_only=True)
class TextFeedForward:
    """A `checkpoint.denoiser_tensors.FeedForwardMaker` with text.

    data: items as in `twotower train --data`. tokens: how many tokens to read. progress: called with a line for each
    layer.
    """

    data: Sequence[str]
    tokens: int = 65_536
    device: str = "cpu"
    progress: Callable[[str], object] | None = None

    @torch.no_grad()
    def __call__(self, source: OneTowerCheckpoint, origin: Path, folder: Path) -> MadeFeedForward:
        """See `FeedForwardMaker`.

        Raises:
            ArgumentError: there is no tokenizer, the data cannot be read, or an input is not finite.
        """
        model = source.model
        assert model.denoiser is not None
        if source.tokenizer is None:
            raise ArgumentError(f"{origin}: contains no tokenizer, which calibration needs; add its tokenizer.json")
        encoder = encoder_for(source.tokenizer, model.config, source.defaults)
        batches = text_batches(self.data, encoder, self.tokens, row_length(model.spec.max_position_embeddings))
        stored = source.weights.dtype(source.places["embeddings.weight", None])
        dtype, device = torch.promote_types(stored, torch.float32), torch.device(self.device)
        weights = LayerReader.of_one_tower(source, dtype, device)
        here = [batch.to(device) for batch in batches]
        layouts = [Layout(batch.document, BLOCK_SIZE, filler=batch.filler) for batch in here]
        weights.load("context.embeddings")
        streams = [model.context.embed(batch.tokens.to(device)) for batch in batches]
        weights.unload("context.embeddings")
        changed = changed_layers(model.spec, model.denoiser.spec)
        found = MadeFeedForward(kept={}, files={}, errors={})
        for i in range(max(changed) + 1):
            if self.progress is not None:
                self.progress(f"calibrating layer {i + 1} of {max(changed) + 1}")
            layer = weights.load(f"context.layers.{i}")
            assert isinstance(layer, Layer)
            if (place := changed.get(i)) is not None:
                spec = model.denoiser.spec.layers[place].mixer
                _add_layer(found, place, layer, spec, _inputs_of(layer, streams, layouts), folder)
            streams = [read_layer(layer, x, layout)[0] for x, layout in zip(streams, layouts, strict=True)]
            weights.unload(f"context.layers.{i}")
        return found


def _add_layer(
    found: MadeFeedForward, place: int, layer: Layer, spec: object, inputs: Sequence[Tensor], folder: Path
) -> None:
    """Adds what the denoiser's layer `place` gets in the place of a MoE layer."""
    made, chosen, error = made_feed_forward(layer.mixer, spec, inputs)
    found.errors[layer.spec.source] = error
    if chosen is not None:
        found.kept[place] = chosen.cpu()
        return
    start, file = f"denoiser.layers.{place}.mixer.", folder / f"layer-{place}.safetensors"
    own = {start + name: tensor.cpu().contiguous() for name, tensor in made.state_dict().items()}
    save_file(own, file)
    found.files.update(dict.fromkeys(own, file))


@torch.no_grad()
def made_feed_forward(
    moe: nn.Module, spec: object, inputs: Sequence[Tensor]
) -> tuple[MoE | nn.Module, Tensor | None, float]:
    """The mixer of `spec` for inputs (T, H) of a MoE layer → the mixer, the experts that it keeps, its relative error.

    Every eighth of the inputs is not fitted and measures the error; fewer than eight are fitted and measured all.
    """
    assert isinstance(moe, MoE)
    fitted, apart = split_inputs(inputs)
    chosen = None
    made: nn.Module
    if isinstance(spec, MoESpec):
        chosen = most_used(moe, spec, fitted)
        made = with_experts(moe, spec, chosen)
    else:
        assert isinstance(spec, MLPSpec)
        made = dense_mlp(moe, spec, fitted)
    return made, chosen, relative_error(moe, made, apart)


def split_inputs(inputs: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """The inputs that are fitted, and every eighth, which measures the error; of fewer than eight, all are both."""
    apart = [x for i, x in enumerate(inputs) if i % MEASURED == MEASURED - 1]
    fitted = [x for i, x in enumerate(inputs) if i % MEASURED != MEASURED - 1]
    return (fitted, apart) if apart else (inputs, inputs)


def relative_error(moe: nn.Module, made: nn.Module, inputs: Sequence[Tensor]) -> float:
    """‖made(x) − moe(x)‖ / ‖moe(x)‖ over all inputs."""
    sums = torch.zeros(2, dtype=torch.float64)
    for x in inputs:
        wanted = moe(x).double()
        sums += torch.stack([(made(x).double() - wanted).square().sum(), wanted.square().sum()]).cpu()
    return float((sums[0] / sums[1]).sqrt())


def most_used(moe: MoE, spec: MoESpec, inputs: Sequence[Tensor]) -> Tensor:
    """The numbers (K,) of the experts that tokens select most often, in order; of whole groups if there are groups."""
    count = moe.spec.experts
    uses = torch.zeros(count, dtype=torch.long, device=inputs[0].device)
    for x in inputs:
        uses += moe.gate(x)[0].flatten().bincount(minlength=count)
    each = count // moe.spec.num_groups if moe.spec.num_groups > 1 else 1
    groups = uses.view(-1, each).sum(1).argsort(descending=True, stable=True)[: spec.experts // each].sort().values
    return (groups[:, None] * each + torch.arange(each, device=uses.device)).flatten()


def with_experts(moe: MoE, spec: MoESpec, kept: Tensor) -> MoE:
    """A MoE layer with these experts of another one; the other weights are shared."""
    with torch.device("meta"):
        made = MoE(spec, moe.gate.weight.shape[1])
    of_experts = ("gate.", "experts.")
    state = {name: tensor[kept] if name.startswith(of_experts) else tensor for name, tensor in moe.state_dict().items()}
    made.load_state_dict(state, strict=True, assign=True)
    return made


def _inputs_of(layer: Layer, streams: Sequence[Tensor], layouts: Sequence[Layout]) -> list[Tensor]:
    """The inputs (T, H) of a layer's mixer at the positions of text, without padding.

    Raises:
        ArgumentError: one is not finite.
    """
    pairs = zip(streams, layouts, strict=True)
    inputs = [modulated_norm(x, layer.norm, layer.kind, None)[layout.token_mask] for x, layout in pairs]
    if not all(bool(part.isfinite().all()) for part in inputs):
        raise ArgumentError(
            f"calibration: layer {layer.spec.source} reads values that are not finite for this text; give other text"
        )
    return inputs
