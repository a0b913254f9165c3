"""What each part of the design is worth, at a scale a laptop trains in minutes: one table, whichever way it comes out.

    python benchmarks/ablations.py DATA OUT [--steps 1200] [--seed 1 --seed 2] [--only NAME …]

A backbone of about a million parameters is trained once on dialogues and the suite's problems. Each variation then
trains a denoiser from it for the same number of steps, and is measured on the same held-out text: masked NLL in nats by
noise level, and, where generation knows the variation, tokens per pass and the suite's exact-match accuracy at γ 0.8.
Runs that are done are kept in OUT and not repeated; the table is of those that are there.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click

from twotower.allocator import keep_large_blocks

keep_large_blocks()

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from twotower.cache.layer_cache import MambaPast, Past  # noqa: E402
from twotower.config import BackboneConfig, TwoTowerConfig  # noqa: E402
from twotower.decoding.presets import parse_setting  # noqa: E402
from twotower.evaluation.accuracy import evaluate  # noqa: E402
from twotower.evaluation.tasks import problems, write_jsonl  # noqa: E402
from twotower.evaluation.tasks.scoring import OVERALL  # noqa: E402
from twotower.model import conditioning  # noqa: E402
from twotower.model.conditioning import TimeConditioning  # noqa: E402
from twotower.model.packed_forward import Layout, denoise_layer, read_layer  # noqa: E402
from twotower.model.tower import Layer, Tower  # noqa: E402
from twotower.modeling_twotower import TwoTowerForCausalLM  # noqa: E402
from twotower.recipes.bundled import SHAPE  # noqa: E402
from twotower.training import fsdp, weights  # noqa: E402
from twotower.training.data import EOS, MASK, Batch, Source, held_out_batches  # noqa: E402
from twotower.training.noise import Corruption  # noqa: E402
from twotower.training.objective import (  # noqa: E402
    AutoregressiveObjective,
    DenoisingObjective,
    DenoisingOptions,
    blocks_with_masks,
)
from twotower.training.runs import Rows, encoder_for, load_tokenizer  # noqa: E402
from twotower.training.settings import Settings  # noqa: E402
from twotower.training.trainer import Run, Stage, train  # noqa: E402

SMALL = {
    "hidden_size": 128, "hybrid_override_pattern": "M-M*M-M*-", "num_attention_heads": 4, "num_key_value_heads": 2,
    "mamba_num_heads": 4, "intermediate_size": 384,
}  # fmt: skip
LEVELS = (0.3, 0.6, 1.0)
ROWS, LENGTH, ALIGN = 5, 512, 32
DIALOGUE_SHARE = 0.14
RATE = 2e-3


# --- variations -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variation:
    """One departure from the base. change: of the pasts a denoiser layer reads; options: of the objective."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    block_size: int = 16
    offset: str = "random"
    seeded: bool = True
    coupling: str = "layers"  # or "last": every layer reads the context's final hidden state
    kept: str = ""  # "half": every other denoiser layer
    norm_first: bool = False
    gates: str = "one"
    tied: bool = False

    @property
    def generates(self) -> bool:
        """Whether the ordinary generation loop runs the model that this one trains."""
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
    """A context layer, and the denoiser layer that goes with it if it was kept."""

    def __init__(self, context: Layer, denoiser: Layer | None, seeded: bool, train_context: bool) -> None:
        super().__init__()
        self.context, self.denoiser, self.seeded, self.train_context = context, denoiser, seeded, train_context
        self.reads = True

    def forward(self, clean: Tensor, noisy: Tensor, modulation: Any, layout: Layout) -> tuple[Tensor, Tensor]:
        with torch.set_grad_enabled(self.train_context and torch.is_grad_enabled()):
            clean, past = read_layer(self.context, clean, layout)
        if self.denoiser is None:
            return clean, noisy
        return clean, denoise_layer(self.denoiser, noisy, past if self.seeded else unseeded(past), modulation, layout)


class LastStateUnit(Unit):
    """A denoiser layer that projects keys and values from the context's final hidden state; Mamba starts from zero.
    Without a noisy stream it is the context layer: all of those run first. (Both through `forward`, where FSDP2 gathers
    the parameters.)"""

    def forward(self, clean: Tensor, noisy: Tensor | None, modulation: Any, layout: Layout) -> tuple[Tensor, Any]:
        if noisy is None:
            return read_layer(self.context, clean, layout)[0], None
        assert self.denoiser is not None
        mixer, past = self.denoiser.mixer, None
        if self.denoiser.kind == "*":
            past = mixer.project(clean)[1]  # type: ignore[operator]
        elif self.denoiser.kind == "M":
            past = _zeros(mixer.config, clean, layout)
        return clean, denoise_layer(self.denoiser, noisy, past, modulation, layout)


def unseeded(past: Past) -> Past:
    """A Mamba layer's past forgotten; keys and values as they are."""
    if isinstance(past, MambaPast):
        return MambaPast(torch.zeros_like(past.conv_window), torch.zeros_like(past.ssm_state))
    return past


def _zeros(config: BackboneConfig, clean: Tensor, layout: Layout) -> MambaPast:
    rows = layout.document.shape[0] * layout.blocks
    state = (rows, config.mamba_num_heads, config.mamba_head_dim, config.ssm_state_size)
    return MambaPast(clean.new_zeros(rows, config.conv_kernel - 1, config.conv_dim), clean.new_zeros(state))


class Varied(DenoisingObjective):
    """The objective with other units."""

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

    def hidden(self, batch: Batch, noise: Corruption, block_size: int) -> tuple[Tensor, Tensor]:
        if self.variation.coupling != "last":
            return super().hidden(batch, noise, block_size)
        layout = Layout(batch.document, block_size, chosen=blocks_with_masks(noise, block_size))
        with torch.no_grad():
            clean = self._embed_clean(batch.tokens)
            for unit in self.units:
                clean, _ = unit(clean, None, None, layout)
            clean = self.context_norm_f(clean)
        noisy = self._embed_corrupted(batch, noise, layout)
        for unit, change in zip(self.units, self._modulations(noise, layout), strict=True):
            clean, noisy = unit(clean, noisy, change, layout)
        return layout.to_rows(self.norm_f(noisy)), clean


@contextlib.contextmanager
def norm_order(variation: Variation) -> Iterator[None]:
    """Where modulation goes while the variation trains and generates."""
    usual = conditioning.MODULATE_BEFORE_NORM
    if variation.norm_first:
        conditioning.MODULATE_BEFORE_NORM = frozenset()
    try:
        yield
    finally:
        conditioning.MODULATE_BEFORE_NORM = usual


# --- one run ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Material:
    """What all runs share."""

    config: TwoTowerConfig
    tokenizer: Any
    data: tuple[str, ...]
    backbone: dict[str, Tensor]
    world: fsdp.World

    def sources(self, part: str) -> list[Source]:
        return [Source(item, part=part, held_out_fraction=0.005) for item in self.data]  # type: ignore[arg-type]


def run(material: Material, variation: Variation, seed: int, steps: int, folder: Path) -> dict[str, Any]:
    """Trains and measures one variation → its figures."""
    world = material.world
    torch.manual_seed(seed)
    model = TwoTowerForCausalLM(material.config)
    model.tokenizer = material.tokenizer
    if variation.tied:
        model.denoiser = model.context
    assert model.denoiser is not None
    assert model.time is not None
    for tower in (model.context, model.denoiser):
        tower.load_state_dict(material.backbone)
    if variation.gates == "near zero":
        _released_gates(model.time, material.config.hidden_size, seed)
    options = DenoisingOptions(mask_token_id=MASK, seed=seed, **variation.options)
    objective = Varied(model, variation, options)
    fsdp.shard(objective, objective.units, world, torch.float32)
    encoder = encoder_for(material.tokenizer, material.config)
    rows = Rows(
        material.sources("train"), encoder, rows=ROWS, row_length=LENGTH, block_size=variation.block_size, seed=seed,
        offset=variation.offset,  # type: ignore[arg-type]
    )  # fmt: skip
    settings = Settings(data=material.data, rate=RATE, stages=(Stage(variation.block_size, steps),))
    started = time.perf_counter()
    plan = Run(
        directory=folder, schedule=settings.schedule(), stages=settings.stages, checkpoint_every=steps,
        validate_every=0, tensorboard=False,
    )  # fmt: skip
    with norm_order(variation):
        train(plan, objective, rows, world)
        figures = {"seconds": time.perf_counter() - started, "nll": nll(material, objective, seed)}
        whole = weights.gather(model, torch.float32, world)
        if variation.generates:
            figures |= generate(material, variation, whole)
    return figures


def nll(material: Material, objective: DenoisingObjective, seed: int) -> dict[str, float]:
    """Masked NLL in nats at each level, on the same masks for every variation, in blocks of 16."""
    encoder = encoder_for(material.tokenizer, material.config)
    batches = held_out_batches(
        material.sources("valid"), encoder, rows=ROWS, row_length=LENGTH, block_size=16, documents=150
    )
    sums = {level: [0.0, 0.0] for level in LEVELS}
    for number, batch in enumerate(batches):
        uniform = torch.rand(batch.tokens.shape, generator=torch.Generator().manual_seed(number))
        for level in LEVELS:
            masked = batch.denoised & (uniform < level)
            noise = Corruption(torch.full((len(batch), LENGTH // 16), level), masked)
            with torch.no_grad():
                sums[level][0] += float(objective(batch, noise, 16))
            sums[level][1] += int(masked.sum())
    return {str(level): nats / count for level, (nats, count) in sums.items()}


def generate(material: Material, variation: Variation, whole: dict[str, Tensor]) -> dict[str, Any]:
    """Tokens per pass and accuracy on the suite at γ 0.8, and AR's accuracy."""
    model = Blind(material.config) if not variation.seeded else TwoTowerForCausalLM(material.config)
    if variation.tied:
        own = {name: tensor for name, tensor in whole.items() if name.startswith("context.")}
        whole = whole | {name.replace("context.", "denoiser.", 1): tensor for name, tensor in own.items()}
    model.load_state_dict(whole)
    if not variation.options.get("time", True):
        model.time = None
    model.tokenizer = material.tokenizer
    size = min(variation.block_size, 16)
    asked = problems("test", 180, seed=11, difficulties=(1,))
    ar, found = evaluate(model.eval(), [parse_setting(f"diffusion:0.8,block_size={size}")], asked, likelihood=False)
    return {
        "tokens_per_pass": found.tokens[OVERALL] / found.denoiser_passes[OVERALL],
        "accuracy": found.accuracy[OVERALL],
        "ar_accuracy": ar.accuracy[OVERALL],
    }


class Blind(TwoTowerForCausalLM):
    """Its denoiser's Mamba layers always start from zero."""

    def denoise(self, block: Tensor, t: Tensor | None, view: Any, *rest: Any, **options: Any) -> Tensor:
        return super().denoise(block, t, replace(view, past=[unseeded(past) for past in view.past]), *rest, **options)


def _released_gates(time: TimeConditioning, hidden: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for table in time.scale_shift_tables:
            table.copy_(torch.randn(table.shape, generator=generator) / hidden**0.5)


# --- all of them --------------------------------------------------------------------------------------------------


def prepare(data: Path, out: Path, steps: int, world: fsdp.World) -> Material:
    """Text, tokenizer and backbone, made once."""
    from twotower.evaluation.held_out import read_documents
    from twotower.training.data import train_tokenizer

    suite, tokens, saved = out / "suite.jsonl", out / "tokenizer.json", out / "backbone.pt"
    if not suite.exists():
        write_jsonl(suite, problems("train", 60_000, seed=1, difficulties=(1,)))
    if not tokens.exists():
        lines = [json.loads(line) for line in suite.read_text().splitlines()[:20_000]]
        texts = [line["prompt"] + line["text"] for line in lines]
        train_tokenizer(texts + read_documents(data / "train.jsonl.gz")[:4000], 1024, split_digits=True).save(
            str(tokens)
        )
    tokenizer = load_tokenizer(tokens)
    values = {key: value for key, value in SHAPE.items() if key != "model_type"} | SMALL
    ids = {"bos_token_id": 1, "eos_token_id": EOS, "pad_token_id": 0, "mask_token_id": MASK}
    config = TwoTowerConfig(**values, **ids)
    items = (f"{data / 'train.jsonl.gz'}={DIALOGUE_SHARE:g}", f"{suite}={1 - DIALOGUE_SHARE:g}")
    if not saved.exists():
        torch.manual_seed(0)
        tower = Tower(config.backbone)
        tower.reset_parameters()
        objective = AutoregressiveObjective(tower, prompt_loss=False)
        fsdp.shard(objective, objective.units, world, torch.float32)
        sources = [Source(item, held_out_fraction=0.005) for item in items]
        rows = Rows(sources, encoder_for(tokenizer, config), rows=ROWS, row_length=LENGTH, block_size=ALIGN)
        settings = Settings(data=items, rate=RATE, stages=(Stage(ALIGN, steps),))
        plan = Run(
            directory=out / "backbone", schedule=settings.schedule(), stages=settings.stages, tensorboard=False,
            validate_every=0,
        )  # fmt: skip
        train(plan, objective, rows, world)
        torch.save(weights.gather(tower, torch.float32, world), saved)
    return Material(config, tokenizer, items, torch.load(saved, weights_only=True), world)


def table(out: Path, seeds: tuple[int, ...]) -> list[str]:
    """Markdown: means over seeds, spread (largest − smallest) after ±."""
    head = "| variation | masked NLL t 0.3 | t 0.6 | t 1.0 | tokens/pass γ 0.8 | suite exact | seeds |"
    lines = [head, "|---|---|---|---|---|---|---|"]
    for variation in VARIATIONS:
        files = [out / f"{slug(variation)}-{seed}.json" for seed in seeds]
        found = [json.loads(file.read_text()) for file in files if file.exists()]
        if not found:
            lines.append(f"| {variation.name} | not run | | | | | 0 |")
            continue
        cells = [_spread([one["nll"][str(level)] for one in found], "{:.3f}") for level in LEVELS]
        for name, form in (("tokens_per_pass", "{:.2f}"), ("accuracy", "{:.1%}")):
            cells.append(_spread([one[name] for one in found], form) if name in found[0] else "—")
        lines.append(f"| {variation.name} | " + " | ".join(cells) + f" | {len(found)} |")
    return lines


def _spread(values: list[float], form: str) -> str:
    mean = form.format(statistics.mean(values))
    return mean if len(values) < 2 else f"{mean} ± {form.format(max(values) - min(values))}"


def slug(variation: Variation) -> str:
    """Its file's name."""
    return "".join(c if c.isalnum() else "-" for c in variation.name.lower()).strip("-")


@click.command()
@click.argument("data", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--steps", default=1200, show_default=True, help="Of each denoiser.")
@click.option("--backbone-steps", default=2500, show_default=True)
@click.option("--seed", "seeds", type=int, multiple=True, default=(1, 2), show_default=True)
@click.option("--only", multiple=True, type=click.Choice([variation.name for variation in VARIATIONS]))
@click.option("--device", type=click.Choice(("cpu", "cuda")), default="cpu", show_default=True)
@click.option("--threads", type=int, default=None)
def main(
    data: Path, out: Path, steps: int, backbone_steps: int, seeds: tuple[int, ...], only: tuple[str, ...], device: str,
    threads: int | None,
) -> None:  # fmt: skip
    """Runs what is not done yet, then prints the table."""
    if threads:
        torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    world = fsdp.start(device)
    material = prepare(data, out, backbone_steps, world)
    for seed in seeds:
        for variation in VARIATIONS:
            result = out / f"{slug(variation)}-{seed}.json"
            if result.exists() or (only and variation.name not in only):
                continue
            print(f"— {variation.name}, seed {seed}", file=sys.stderr, flush=True)
            figures = run(material, variation, seed, steps, out / f"{slug(variation)}-{seed}")
            result.write_text(json.dumps(figures))
    print("\n".join(table(out, seeds)))
    fsdp.stop()


if __name__ == "__main__":
    main()
