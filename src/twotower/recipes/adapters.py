"""Makes the bundled model with adapters: `python -m twotower.recipes.adapters DATA OUT` (`make bundled-model`).

    text           training problems, shape of the backbone                         → OUT/suite.jsonl, json.jsonl
    backbone       twotower pretrain on dialogues and problems                      → OUT/backbone/model
    start          twotower init: adapters on the backbone                          → OUT/start
    adapters       twotower train on dialogues, problems and the model's own drafts → OUT/adapters/model
    export         the model in bf16, with the losses of both training stages       → OUT/model
    figures        accuracy, tokens per pass and likelihoods on held-out text       → OUT/model/metrics.json

DATA is a folder with train.jsonl.gz and valid.jsonl.gz (field `text`). A stage whose result exists is skipped, and
training stages resume from their checkpoints: after an interruption, give the same command again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from twotower.file_writes import replace_text, replaced_file
from twotower.recipes.stages import RecipeStage, data_options, export_model, measure, recipe_command

SEED = 1
STAGES = ("text", "backbone", "start", "adapters", "export", "figures")
STEPS = {"backbone": 5600, "adapters": 2800}
PROBLEMS, JSON_PROBLEMS = 300_000, 60_000
DIFFICULTIES = (1, 2, 3)
PRACTISED_TWICE = ("edits", "recall")  # a small model learns these families last
# Attention and MLPs, which a pass over several tokens reads once; no experts, whose number grows with the tokens.
SHAPE = {
    "model_type": "nemotron_h",
    "hybrid_override_pattern": "M-M*-M*-M*-",
    "hidden_size": 256,
    "vocab_size": 1024,
    "max_position_embeddings": 4096,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "mamba_num_heads": 8,
    "mamba_head_dim": 64,
    "ssm_state_size": 32,
    "n_groups": 2,
    "chunk_size": 32,
    "intermediate_size": 1024,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 192,
    "moe_shared_expert_intermediate_size": 384,
    "routed_scaling_factor": 1.0,
}
RANK, HEAD_RANK = 32, 64
# A weight is a share of documents; a dialogue is about six times as long as a problem.
SHARES = {
    "backbone": {"dialogues": 0.09, "suite": 0.76, "json": 0.15},
    "adapters": {"dialogues": 0.12, "suite": 0.70, "json": 0.18},
}
COMMON = ["--batch-size", "6", "--row-length", "512", "--seed", str(SEED)]
PRETRAIN = ["--no-prompt-loss", "--split-digits", "--lr", "2e-3", "--decay", "0.285", "--validate-every", "400"]
# Every 8 steps the model of that step decodes 32 prompts; each of the following steps trains a row of these states.
TRAIN = ["--block-size", "16", "--recipe", "both", "--lr", "4e-3", "--weight-decay", "0", "--decay", "0.4"]
TRAIN += ["--on-policy-every", "8", "--on-policy-prompts", "32", "--validate-every", "1400"]
SETTINGS = ("diffusion:0.9", "diffusion:0.95", "diffusion:0.98", "verified:draft_steps=1")  # of the card


def write_text(out: Path) -> None:
    """Writes the training problems and the backbone's config."""
    from twotower.evaluation.tasks import SUITE, make_problems, write_jsonl

    replace_text(out / "shape.json", json.dumps(SHAPE, indent=2) + "\n")
    for name, count, families in (
        ("json.jsonl", JSON_PROBLEMS, ("json",)),
        ("suite.jsonl", PROBLEMS, (*SUITE, *PRACTISED_TWICE)),
    ):
        with replaced_file(out / name) as partial:
            write_jsonl(partial, make_problems("train", count, SEED, families, DIFFICULTIES))


def stages(data: Path, out: Path, steps: dict[str, int], processes: int) -> list[RecipeStage]:
    """The stages in order. steps: of each training stage."""

    files = {"dialogues": data / "train.jsonl.gz", "suite": out / "suite.jsonl", "json": out / "json.jsonl"}

    def trained(stage: str, options: Sequence[str], *words: str) -> RecipeStage:
        mixture = data_options({files[name]: share for name, share in SHARES[stage].items()})
        command = [*words, "-o", str(out / stage), "--steps", str(steps[stage]), *mixture, *options, *COMMON]
        return RecipeStage(stage, out / stage / "model", command, parallel=True)

    start, model = out / "start", out / "model"
    adapted = ["init", "--from", str(out / "backbone/model"), "-o", str(start), "--dtype", "float32"]
    adapted += ["--denoiser-lora", str(RANK), "--draft-head", str(HEAD_RANK)]
    runs = {stage: out / stage for stage in ("backbone", "adapters")}
    return [
        RecipeStage("text", out / "suite.jsonl", lambda: write_text(out)),
        trained("backbone", PRETRAIN, "pretrain", "--config", str(out / "shape.json")),
        RecipeStage("start", start, adapted),
        trained("adapters", TRAIN, "train", str(start)),
        RecipeStage("export", model, lambda: export_model(out / "adapters/model", model, runs)),
        RecipeStage(
            "figures", model / "metrics.json", lambda: measure(data, model, SETTINGS, "--json-problems", "200")
        ),
    ]


main = recipe_command("Makes the bundled model with adapters.", STAGES, STEPS, stages)


if __name__ == "__main__":
    main()
