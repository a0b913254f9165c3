"""Trains the variations of the design (`common/variations.py`) on the same text, and measures them."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.variations import VARIATIONS, Blind, Variation, Varied, norm_order, released_gates
from twotower.config import TwoTowerConfig
from twotower.decoding.presets import parse_setting
from twotower.evaluation.accuracy import measure_accuracy
from twotower.evaluation.held_out import read_documents
from twotower.evaluation.tasks import make_problems, write_jsonl
from twotower.evaluation.tasks.scoring import OVERALL
from twotower.families import tower_spec
from twotower.model.tower import Tower
from twotower.modeling_twotower import TwoTowerForCausalLM
from twotower.recipes.small import SHAPE
from twotower.training import fsdp, weights
from twotower.training.data import EOS, MASK, RowLoader, Source, held_out_batches, train_tokenizer
from twotower.training.noise import Corruption
from twotower.training.objective import AutoregressiveObjective, DenoisingObjective, DenoisingOptions
from twotower.training.run_settings import RunSettings
from twotower.training.run_tokenizer import encoder_for, load_tokenizer
from twotower.training.trainer import Stage, TrainerOptions, train

SMALL = {
    "hidden_size": 128, "hybrid_override_pattern": "M-M*M-M*-", "num_attention_heads": 4, "num_key_value_heads": 2,
    "mamba_num_heads": 4, "intermediate_size": 384,
}  # fmt: skip
LEVELS = (0.3, 0.6, 1.0)
ROWS, LENGTH, ALIGN = 5, 512, 32
DIALOGUE_SHARE = 0.14
RATE = 2e-3


@dataclass(frozen=True)
class Material:
    """Data and models that all runs share."""

    config: TwoTowerConfig
    tokenizer: Any
    data: tuple[str, ...]
    backbone: dict[str, Tensor]
    world: fsdp.World

    def sources(self, part: str) -> list[Source]:
        return [Source(item, part=part, held_out_fraction=0.005) for item in self.data]  # type: ignore[arg-type]


def run_once(material: Material, variation: Variation, seed: int, steps: int, out: Path) -> None:
    """Trains and measures one variation, unless OUT has its figures."""
    folder = out / f"{slug(variation)}-{seed}"
    result = folder.with_suffix(".json")
    if not result.exists():
        print(f"{variation.name}, seed {seed}", file=sys.stderr, flush=True)
        result.write_text(json.dumps(run_variation(material, variation, seed, steps, folder)), encoding="utf-8")


def run_variation(material: Material, variation: Variation, seed: int, steps: int, folder: Path) -> dict[str, Any]:
    """Trains and measures one variation. Returns its figures."""
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
        released_gates(model.time, material.config.hidden_size, seed)
    options = DenoisingOptions(mask_token_id=MASK, seed=seed, **variation.options)
    objective = Varied(model, variation, options)
    fsdp.shard(objective, objective.units, world, torch.float32)
    encoder = encoder_for(material.tokenizer, material.config)
    loader = RowLoader(
        material.sources("train"), encoder, batch_size=ROWS, row_length=LENGTH, block_size=variation.block_size,
        seed=seed, offset=variation.offset,  # type: ignore[arg-type]
    )  # fmt: skip
    settings = RunSettings(data=material.data, lr=RATE, stages=(Stage(variation.block_size, steps),))
    started = time.perf_counter()
    plan = TrainerOptions(
        directory=folder, schedule=settings.schedule(), stages=settings.stages, checkpoint_every=steps,
        validate_every=0, tensorboard=False,
    )  # fmt: skip
    with norm_order(variation):
        train(plan, objective, loader, world)
        figures = {"seconds": time.perf_counter() - started, "nll": nll(material, objective, seed)}
        whole = weights.gather_weights(model, torch.float32, world)
        if variation.generates:
            figures |= generate(material, variation, whole)
    return figures


def nll(material: Material, objective: DenoisingObjective, seed: int) -> dict[str, float]:
    """Masked NLL in nats at each level, on the same masks for every variation, in blocks of 16."""
    encoder = encoder_for(material.tokenizer, material.config)
    batches = held_out_batches(
        material.sources("valid"), encoder, batch_size=ROWS, row_length=LENGTH, block_size=16, documents=150
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
    """Tokens per pass and accuracy on the suite at threshold 0.8, and AR's accuracy."""
    model = Blind(material.config) if not variation.seeded else TwoTowerForCausalLM(material.config)
    if variation.tied:
        own = {name: tensor for name, tensor in whole.items() if name.startswith("context.")}
        whole = whole | {name.replace("context.", "denoiser.", 1): tensor for name, tensor in own.items()}
    model.load_state_dict(whole)
    if not variation.options.get("time", True):
        model.time = None
    model.tokenizer = material.tokenizer
    size = min(variation.block_size, 16)
    asked = make_problems("test", 180, seed=11, difficulties=(1,))
    ar, found = measure_accuracy(
        model.eval(), [parse_setting(f"diffusion:0.8,block_size={size}")], asked, likelihood=False
    )
    return {
        "tokens_per_pass": found.tokens[OVERALL] / found.denoiser_passes[OVERALL],
        "accuracy": found.accuracy[OVERALL],
        "ar_accuracy": ar.accuracy[OVERALL],
    }


def prepare(data: Path, out: Path, steps: int, world: fsdp.World) -> Material:
    """Makes text, tokenizer and backbone, unless OUT has them."""
    suite, tokens, saved = out / "suite.jsonl", out / "tokenizer.json", out / "backbone.pt"
    if not suite.exists():
        write_jsonl(suite, make_problems("train", 60_000, seed=1, difficulties=(1,)))
    if not tokens.exists():
        lines = [json.loads(line) for line in suite.read_text(encoding="utf-8").splitlines()[:20_000]]
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
        tower = Tower(tower_spec(config))
        tower.reset_parameters()
        objective = AutoregressiveObjective(tower, prompt_loss=False)
        fsdp.shard(objective, objective.units, world, torch.float32)
        sources = [Source(item, held_out_fraction=0.005) for item in items]
        loader = RowLoader(
            sources, encoder_for(tokenizer, config), batch_size=ROWS, row_length=LENGTH, block_size=ALIGN
        )
        settings = RunSettings(data=items, lr=RATE, stages=(Stage(ALIGN, steps),))
        plan = TrainerOptions(
            directory=out / "backbone", schedule=settings.schedule(), stages=settings.stages, tensorboard=False,
            validate_every=0,
        )  # fmt: skip
        train(plan, objective, loader, world)
        torch.save(weights.gather_weights(tower, torch.float32, world), saved)
    return Material(config, tokenizer, items, torch.load(saved, weights_only=True), world)


def table(out: Path, seeds: Sequence[int]) -> list[str]:
    """Markdown: means over seeds, spread (largest − smallest) after ±."""
    head = "| variation | masked NLL t 0.3 | t 0.6 | t 1.0 | tokens/pass, threshold 0.8 | suite exact | seeds |"
    lines = [head, "|---|---|---|---|---|---|---|"]
    for variation in VARIATIONS:
        files = [out / f"{slug(variation)}-{seed}.json" for seed in seeds]
        found = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.exists()]
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
    """The variation's name for file names."""
    return "".join(c if c.isalnum() else "-" for c in variation.name.lower()).strip("-")
