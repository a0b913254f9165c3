"""How much of a MoE layer's output does a smaller feed-forward give, by the choice of its units?

    python benchmarks/feed_forward.py [--model DIR] --text FILE [--sizes 576,768] [--experts 2,3]

The MoE layers of a checkpoint's context tower read the text. For each size, a dense MLP is made from them:

- ranked: the shared expert's units, then the best units of the routed experts, output weights fitted (`twotower init`);
- random: random units of the routed experts instead of the best ones, output weights fitted;
- average: the mean of all routed experts beside the shared expert, as it is. Its width is that of an expert;
- average, fitted: the same with fitted output weights.

The most used experts are measured too. Figures are ‖new − old‖ / ‖old‖ over text that was not fitted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import click
import torch
from common import program
from common.program import DIRECTORY, JSON, THREADS
from rich.table import Table
from torch import Tensor

from twotower import TwoTowerForCausalLM, bundled_model
from twotower.denoiser_shape import FeedForward
from twotower.evaluation import dense_units
from twotower.evaluation.feed_forward import made_feed_forward, relative_error, split_inputs
from twotower.evaluation.text_batches import BLOCK_SIZE, text_batches
from twotower.families.denoiser import denoiser_spec
from twotower.model.conditioning import modulated_norm
from twotower.model.moe import MLP, MoE
from twotower.model.packed_forward import read_layer
from twotower.model.packed_layout import Layout
from twotower.specs import MLPSpec
from twotower.training.run_tokenizer import encoder_for


def random_units(moe: MoE, spec: MLPSpec, inputs: Sequence[Tensor]) -> MLP:
    shared = 0 if moe.spec.shared is None else moe.spec.shared.width
    every = shared + moe.spec.experts * moe.spec.expert.width
    chosen = torch.randperm(every - shared, generator=torch.Generator().manual_seed(0))[: spec.width - shared] + shared
    places = torch.cat([torch.arange(shared), chosen])
    return dense_units.fitted(moe, dense_units.mlp_of(dense_units.picked(moe, places), spec), inputs)


def average(moe: MoE) -> MLP:
    """The mean of the routed experts, times the sum of the weights of a token, beside the shared expert."""
    groups = list(dense_units.all_units(moe))
    shared = groups[: moe.spec.shared is not None]
    routed = groups[len(shared) :]
    mean = [torch.stack([getattr(units, name) for units in routed]).mean(0) for name in ("up", "down")]
    gate = torch.stack([u.gate for u in routed if u.gate is not None]).mean(0) if routed[0].gate is not None else None
    own = dense_units.Units(gate, mean[0], None, None, mean[1] * moe.spec.factor)
    parts = [*shared, own]
    whole = dense_units.Units(
        None if gate is None else torch.cat([u.gate for u in parts if u.gate is not None]),
        torch.cat([u.up for u in parts]), None, None, torch.cat([u.down for u in parts], 1),
    )  # fmt: skip
    return dense_units.mlp_of(whole, replace(moe.spec.expert, width=whole.up.shape[0], bias=False))


def errors_of_layer(
    moe: MoE, inputs: Sequence[Tensor], sizes: tuple[int, ...], experts: tuple[int, ...]
) -> dict[str, Any]:
    """The error of each rule, by size."""
    fitted, apart = split_inputs(inputs)
    found: dict[str, Any] = {}
    for width in sizes:
        spec = replace(moe.spec.expert, width=width, bias=False)
        found[f"ranked {width}"] = made_feed_forward(moe, spec, inputs)[2]
        found[f"random {width}"] = relative_error(moe, random_units(moe, spec, fitted), apart)
    plain = average(moe)
    found[f"average {plain.spec.width}"] = relative_error(moe, plain, apart)
    found[f"average, fitted {plain.spec.width}"] = relative_error(moe, dense_units.fitted(moe, plain, fitted), apart)
    for count in experts:
        found[f"{count} experts"] = made_feed_forward(moe, replace(moe.spec, experts=count), inputs)[2]
    return found


@click.command()
@click.option("--model", "path", type=DIRECTORY, default=None, help="A checkpoint directory. [default: bundled/small]")
@click.option("--text", multiple=True, help="Text, as `twotower train --data`; problems of the suite without it.")
@click.option("--tokens", default=65_536, show_default=True)
@click.option("--sizes", default="480,576,768,960", show_default=True, callback=program.numbers, help="Widths of MLPs.")
@click.option("--experts", default="2,3", show_default=True, callback=program.numbers, help="Numbers of experts.")
@THREADS
@JSON
@torch.no_grad()
def main(
    path: Any, text: tuple[str, ...], tokens: int, sizes: tuple[int, ...], experts: tuple[int, ...],
    threads: int | None, as_json: bool,
) -> None:  # fmt: skip
    """Measures smaller feed-forwards in the place of the MoE layers of a context tower."""
    program.start(threads)
    model = TwoTowerForCausalLM.from_pretrained(path or bundled_model("small"), dtype="float32").requires_grad_(False)
    for count in experts:
        denoiser_spec(model.spec, None, FeedForward("experts", count))  # raises for a count that cannot be kept
    batches = text_batches(text, encoder_for(model.tokenizer, model.config), tokens, 512)
    layouts = [Layout(batch.document, BLOCK_SIZE) for batch in batches]
    streams = [model.context.embed(batch.tokens) for batch in batches]
    rows: dict[int, dict[str, float]] = {}
    for layer in model.context.all_layers():
        if isinstance(layer.mixer, MoE):
            inputs = [
                modulated_norm(x, layer.norm, layer.kind, None)[layout.token_mask]
                for x, layout in zip(streams, layouts, strict=True)
            ]
            rows[layer.spec.source] = errors_of_layer(layer.mixer, inputs, sizes, experts)
        streams = [read_layer(layer, x, layout)[0] for x, layout in zip(streams, layouts, strict=True)]
    table = Table("feed-forward", *(f"layer {number}" for number in rows))
    for name in next(iter(rows.values())):
        table.add_row(name, *(f"{found[name]:.3f}" for found in rows.values()))
    moe = model.spec.moe
    assert moe is not None
    shown = f"{moe.experts} experts of width {moe.expert.width}, {moe.top_k} a token; {tokens} tokens"
    program.publish("feed_forward", {"errors": {str(n): e for n, e in rows.items()}}, [shown, table], as_json)


if __name__ == "__main__":
    main()
