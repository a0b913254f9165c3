"""The bundled model, from text to weights: `python -m twotower.recipes.bundled DATA OUT` (`make bundled-model`).

    text           the suite's training problems and the backbone's shape           → OUT/suite.jsonl, OUT/shape.json
    backbone       twotower pretrain: dialogues and problems                        → OUT/backbone/model
    start          twotower init: both towers its copies                            → OUT/start
    continuations  the backbone's own greedy continuations of cut dialogues         → OUT/continuations.jsonl
    denoiser       twotower train: continuations and problems                       → OUT/denoiser/model
    figures        accuracy, tokens a pass and likelihoods on held-out text         → OUT/metrics.json

DATA is a folder with train.jsonl.gz and valid.jsonl.gz (`text` per line). A stage whose result is there is passed
over, and training stages continue from their checkpoints: after an interruption give the same command again.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import click

from twotower.allocator import keep_large_blocks

SEED = 1
STAGES = ("text", "backbone", "start", "continuations", "denoiser", "figures")
PROBLEMS = 180_000
DIFFICULTIES = (1, 2, 3)
CONTINUATIONS = 6000
CONTINUATION_LENGTH = 250
# Few experts, so that a pass over a block reads little more than a pass over one token.
SHAPE = {
    "model_type": "nemotron_h",
    "hybrid_override_pattern": "M-M*MEM*-",
    "hidden_size": 192,
    "vocab_size": 1024,
    "max_position_embeddings": 4096,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "mamba_num_heads": 6,
    "mamba_head_dim": 64,
    "ssm_state_size": 32,
    "n_groups": 2,
    "chunk_size": 32,
    "intermediate_size": 576,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 192,
    "moe_shared_expert_intermediate_size": 384,
    "routed_scaling_factor": 1.0,
}
# The same for both trainings. A weight is a share of documents; a dialogue is about six times as long as a problem.
COMMON = ["--rows", "6", "--row-length", "512", "--seed", str(SEED), "--validate-every", "400"]
PRETRAIN = ["--no-prompt-loss", "--split-digits", "--rate", "2e-3"]
TRAIN = ["--block-size", "16", "--rate", "1.5e-3"]
DIALOGUE_SHARE = 0.14


def write_text(data: Path, out: Path) -> None:
    """The suite's training problems and the backbone's config."""
    from twotower.evaluation.suite import problems, write_jsonl

    (out / "shape.json").write_text(json.dumps(SHAPE, indent=2) + "\n")
    partial = out / "suite.partial"
    write_jsonl(partial, problems("train", PROBLEMS, seed=SEED, difficulties=DIFFICULTIES))
    partial.rename(out / "suite.jsonl")


def write_continuations(data: Path, out: Path) -> None:
    """Training dialogues cut at a random turn and finished greedily by the backbone: {"prompt", "text"} a line.

    What the denoiser is to imitate is the frozen context tower, not the corpus: on such text a block has one right
    answer, so several positions can be sure at once (sequence-level distillation, Kim & Rush 2016).
    """
    import torch

    from twotower.evaluation.held_out import cut_dialogue, read_documents
    from twotower.generation import GenerationParams, generate
    from twotower.model.two_tower import TwoTowerForCausalLM

    model = TwoTowerForCausalLM.from_pretrained(out / "start", towers="context", dtype=torch.float32)
    rng = random.Random(SEED)
    texts = rng.choices(read_documents(data / "train.jsonl.gz"), k=CONTINUATIONS)
    cut = sorted((cut_dialogue(text, rng) for text in texts), key=len)  # like lengths share a batch
    params = GenerationParams.of(mode="ar", max_new_tokens=CONTINUATION_LENGTH, eos_token_id=model.config.eos_token_id)
    partial = out / "continuations.partial"
    with partial.open("w") as lines:
        for start in range(0, len(cut), 128):
            part = cut[start : start + 128]
            prompts = [model.tokenizer(text)["input_ids"] for text in part]
            for prompt, result in zip(part, generate(model, prompts, params), strict=True):
                if result.finish_reason == "eos" and result.text.strip():  # one cut short would teach a wrong ending
                    lines.write(json.dumps({"prompt": prompt, "text": result.text}) + "\n")
            print(f"{start + len(part)}/{len(cut)} continuations", file=sys.stderr, flush=True)
    partial.rename(out / "continuations.jsonl")


def commands(data: Path, out: Path, backbone_steps: int, denoiser_steps: int) -> dict[str, list[str]]:
    """The stages that are commands of `twotower`."""
    suite = f"{out / 'suite.jsonl'}={1 - DIALOGUE_SHARE:g}"
    return {
        "backbone": [
            "pretrain", "--config", f"{out / 'shape.json'}", "-o", f"{out / 'backbone'}",
            "--data", f"{data / 'train.jsonl.gz'}={DIALOGUE_SHARE:g}", "--data", suite, "--steps", str(backbone_steps),
            *PRETRAIN, *COMMON,
        ],
        "start": ["init", "--from", f"{out / 'backbone' / 'model'}", "-o", f"{out / 'start'}"],
        "denoiser": [
            "train", f"{out / 'start'}", "--steps", f"{denoiser_steps}", "-o", f"{out / 'denoiser'}",
            "--data", f"{out / 'continuations.jsonl'}={DIALOGUE_SHARE:g}", "--data", suite, *TRAIN, *COMMON,
        ],
    }  # fmt: skip


def measure(data: Path, out: Path) -> None:
    """The figures of the model card, by `evaluation.held_out`."""
    command = [sys.executable, "-m", "twotower.evaluation.held_out", str(data), "--model", str(out / "denoiser/model")]
    text = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    (out / "metrics.json").write_text(text)


@click.command()
@click.argument("data", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--stage", "stages", type=click.Choice(STAGES), multiple=True, help="[default: all that are not done]")
@click.option("--backbone-steps", type=int, default=4500, show_default=True)
@click.option("--denoiser-steps", type=int, default=4000, show_default=True)
@click.option(
    "--processes", type=int, default=1, show_default=True, help="That train; 2 or 3 divide the batch's 6 rows."
)
def main(
    data: Path, out: Path, stages: tuple[str, ...], backbone_steps: int, denoiser_steps: int, processes: int
) -> None:
    """Makes the bundled model."""
    keep_large_blocks()
    out.mkdir(parents=True, exist_ok=True)
    results = {
        "text": "suite.jsonl", "backbone": "backbone/model", "start": "start", "continuations": "continuations.jsonl",
        "denoiser": "denoiser/model", "figures": "metrics.json",
    }  # fmt: skip
    programs = commands(data, out, backbone_steps, denoiser_steps)
    functions = {"text": write_text, "continuations": write_continuations, "figures": measure}
    for stage in stages or STAGES:
        if not stages and (out / results[stage]).exists():
            continue
        print(f"— {stage}", file=sys.stderr, flush=True)
        if stage in functions:
            functions[stage](data, out)
        else:
            print("twotower " + " ".join(programs[stage]), file=sys.stderr, flush=True)
            launch = [sys.executable]
            if processes > 1 and stage != "start":
                launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
            code = subprocess.run([*launch, "-m", "twotower", *programs[stage]]).returncode
            if code:
                sys.exit(code)


if __name__ == "__main__":
    main()
