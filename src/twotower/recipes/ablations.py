"""Trains variants of the denoiser alike and compares them: `python -m twotower.recipes.ablations DATA OUT`.

The context tower is that of `bundled/small`. Each variant of VARIANTS is made by `twotower init`, trained by `twotower
train` on the same rows, and measured by `twotower eval` on test problems of the suite: OUT/NAME/start, run, eval.json.
The table of all measured variants is OUT/table.md. What exists is kept, and training resumes: after an interruption,
give the same command again.

DATA is a folder with train.jsonl.gz (field `text`).
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click

from twotower.assets import bundled_model
from twotower.file_writes import replace_text, replaced_file
from twotower.process import configure_process
from twotower.recipes.stages import RecipeStage, data_options, run_stages

PROBLEMS, SEED = 60_000, 1
STEPS = 800  # of 6 rows of 512 tokens: 2.46 million
DIALOGUES = 0.14  # share of the documents
COMMON = ["--batch-size", "6", "--row-length", "512", "--validate-every", "0", "--no-tensorboard", "--decay", "0.5"]
ADAPTERS = ("--denoiser-lora", "32")
GATED_RATES = ("--lr", "4e-3", "--weight-decay", "0")
TOWER_RATES = ("--lr", "1.5e-3")
MEASURED = ("verified:draft_steps=1,block_size=16", "diffusion:0.95,block_size=16")


@dataclass(frozen=True)
class Variant:
    """What differs: options of `twotower init` and of `twotower train`. blocks: block sizes of equal parts of a run."""

    init: tuple[str, ...] = ADAPTERS
    train: tuple[str, ...] = ("--recipe", "both")
    rates: tuple[str, ...] = GATED_RATES
    seed: int = SEED
    blocks: tuple[int, ...] = (16,)


def tower(*init: str, train: tuple[str, ...] = ("--recipe", "both"), seed: int = SEED) -> Variant:
    """A second tower as the denoiser."""
    return Variant(("--denoiser", "tower", *init), train, TOWER_RATES, seed)


SHIFTED = ("--prediction-shift", "1", "--block-attention", "prefix_causal")
ON_POLICY = ("--recipe", "both", "--on-policy-every", "8", "--on-policy-prompts", "32")
EVERYWHERE = (*ADAPTERS, "--adapter-gate", "everywhere")
VARIANTS = {
    "adapters": Variant(),
    "adapters, another seed": Variant(seed=2),
    "draft head 64": Variant((*ADAPTERS, "--draft-head", "64")),
    "on-policy": Variant(train=ON_POLICY),
    "rank 8": Variant(("--denoiser-lora", "8")),
    "rank 128": Variant(("--denoiser-lora", "128")),
    "everywhere, shift 1": Variant((*EVERYWHERE, "--prediction-shift", "1")),
    "everywhere, shift 0": Variant(EVERYWHERE),
    "tokens alone": Variant(train=("--recipe", "both", "--targets", "tokens:1")),
    "KL alone": Variant(train=("--recipe", "both", "--targets", "kl:1")),
    "total variation 0.7": Variant(train=("--recipe", "both", "--targets", "tv:0.7+tokens:0.3")),
    "acceptance 0.7": Variant(train=("--recipe", "both", "--targets", "acceptance:0.7+tokens:0.3")),
    "drafts alone": Variant(train=("--recipe", "both", "--patterns", "draft:1")),
    "prefixes alone": Variant(train=("--recipe", "both", "--patterns", "prefix:1")),
    "recipe draft": Variant(train=("--recipe", "draft")),
    "curriculum 4, 8, 16": Variant(blocks=(4, 8, 16)),
    "tower as released": tower(train=()),
    "tower, recipe both": tower(),
    "tower, shift 1": tower(*SHIFTED),
    "tower, shift 1, draft head 64": tower(*SHIFTED, "--draft-head", "64"),
    "tower, shift 1, full attention": tower("--prediction-shift", "1"),
    "tower, shift 1, on-policy": tower(*SHIFTED, train=(*ON_POLICY, "--on-policy-setting", "verified")),
    "tower of 5 layers, shift 1": tower(*SHIFTED, "--denoiser-layers", "every:2"),
    "tower of 5 layers, another seed": tower(*SHIFTED, "--denoiser-layers", "every:2", seed=2),
    "tower of 3 layers, shift 1": tower(*SHIFTED, "--denoiser-layers", "every:4"),
    "tower of 3 layers, another seed": tower(*SHIFTED, "--denoiser-layers", "every:4", seed=2),
}


def folder(out: Path, name: str) -> Path:
    """The folder of a variant."""
    return out / name.replace(", ", "_").replace(" ", "-")


def write_problems(path: Path) -> None:
    """Writes the training problems of the suite."""
    from twotower.evaluation.tasks import SUITE, make_problems, write_jsonl

    with replaced_file(path) as unfinished:
        write_jsonl(unfinished, make_problems("train", PROBLEMS, SEED, SUITE, (1, 2, 3)))


def evaluate(model: Path, problems: int, result: Path) -> None:
    """Writes what `twotower eval --json` prints."""
    command = [sys.executable, "-m", "twotower", "eval", "--json", "-m", str(model), "-n", str(problems)]
    command += ["--dtype", "float32", "--threads", "1"]
    command += [word for setting in MEASURED for word in ("-s", setting)]
    replace_text(result, subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def stages(data: Path, out: Path, steps: int, problems: int) -> Iterator[RecipeStage]:
    """The stages of all variants, under the names of the variants, and first those that all need."""
    one, suite = out / "context", out / "suite.jsonl"
    yield RecipeStage("", suite, partial(write_problems, suite))
    yield RecipeStage("", one, ["export", str(bundled_model("small")), "--to", "one-tower", "-o", str(one)])
    mixture = data_options({data / "train.jsonl.gz": DIALOGUES, suite: 1 - DIALOGUES})
    for name, variant in VARIANTS.items():
        own = folder(out, name)
        start, run, result = own / "start", own / "run", own / "eval.json"
        init = ["init", "--from", str(one), "-o", str(start), "--dtype", "float32", *variant.init]
        part = steps // len(variant.blocks)
        blocks = ",".join(f"{size}:{part}" for size in variant.blocks)
        train = ["train", str(start), "-o", str(run), "--stages", blocks, "--seed", str(variant.seed), *mixture]
        yield RecipeStage(name, start, init)
        yield RecipeStage(name, run / "model", [*train, *variant.train, *variant.rates, *COMMON])
        yield RecipeStage(name, result, partial(evaluate, run / "model", problems, result))


def table(out: Path) -> Iterator[str]:
    """Lines of Markdown: tokens per pass of the variants that are measured, and the accuracy of threshold 0.95."""
    yield "| variant | trained parameters | verified | threshold 0.95 | AR's accuracy kept |"
    yield "|---|---|---|---|---|"
    for name in VARIANTS:
        own = folder(out, name)
        if not (own / "eval.json").exists():
            continue
        found = json.loads((own / "eval.json").read_text(encoding="utf-8"))
        verified, diffusion = (
            [item for item in found["settings"] if item["setting"] == setting] for setting in MEASURED
        )
        cells = [f"{_trained(own / 'run/model') / 1e6:.2f} M"]
        cells += [f"{item['tokens_per_pass']['overall']:.2f}" for item in (*verified, *diffusion)]
        cells += [f"{item['against_ar']['overall']['kept'][0]:.1%}" for item in diffusion]
        yield f"| {name} | " + " | ".join(cells) + " |"


def _trained(model: Path) -> int:
    """Values that training changed: those of the denoiser."""
    command = [sys.executable, "-m", "twotower", "info", str(model), "--json"]
    facts = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return int(facts["parameters"]["both_towers"] - facts["parameters"]["per_tower"])


@click.command()
@click.argument("data", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--variant", "chosen", type=click.Choice(list(VARIANTS)), multiple=True, help="Variant to train. [default: all]"
)
@click.option("--steps", default=STEPS, show_default=True, help="Optimizer steps of each variant.")
@click.option("--problems", default=100, show_default=True, help="Test problems of each family.")
def main(data: Path, out: Path, chosen: tuple[str, ...], steps: int, problems: int) -> None:
    """Trains variants of the denoiser alike and compares them."""
    configure_process()
    out.mkdir(parents=True, exist_ok=True)
    run_stages(
        [stage for stage in stages(data, out, steps, problems) if not chosen or stage.name in ("", *chosen)], (), 1
    )
    replace_text(out / "table.md", "\n".join(table(out)) + "\n")
    click.echo((out / "table.md").read_text(encoding="utf-8"), nl=False)


if __name__ == "__main__":
    main()
