"""Makes the bundled model with two full towers: `python -m twotower.recipes.small DATA OUT`.

    text           training problems of the suite, shape of the backbone            → OUT/suite.jsonl, OUT/shape.json
    backbone       twotower pretrain on dialogues and problems                      → OUT/backbone/model
    start          twotower init: two towers, copies of the backbone                → OUT/start
    continuations  greedy continuations of cut dialogues by the backbone            → OUT/continuations.jsonl
    denoiser       twotower train on continuations and problems                     → OUT/denoiser/model
    longer         twotower train again, with more of the hardest problems          → OUT/longer/model
    export         the model in bf16, with the losses of all training stages        → OUT/model
    figures        accuracy, tokens per pass and likelihoods on held-out text       → OUT/model/metrics.json

DATA is a folder with train.jsonl.gz and valid.jsonl.gz (field `text`). A stage whose result exists is skipped, and
training stages resume from their checkpoints: after an interruption, give the same command again.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from twotower.file_writes import replace_text, replaced_file
from twotower.process import configure_process
from twotower.recipes.stages import RecipeStage, data_options, export_model, measure, recipe_command
from twotower.tokenizer import require_tokenizer

if TYPE_CHECKING:
    from twotower.modeling_twotower import TwoTowerForCausalLM

SEED = 1
STAGES = ("text", "backbone", "start", "continuations", "denoiser", "longer", "export", "figures")
STEPS = {"backbone": 4800, "denoiser": 5000, "longer": 3600}
PROBLEMS, HARD_PROBLEMS = 180_000, 90_000
DIFFICULTIES = (1, 2, 3)
PRACTISED_TWICE = ("edits", "recall")  # a small model learns these families last, so they get twice the share
HARD_TO_DENOISE = ("arithmetic", "word")  # each of their steps depends on the step before
CONTINUATIONS = 5000
CONTINUATION_LENGTH = 320
# Few experts, so that a pass over a block reads little more weight memory than a pass over one token.
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
# Options of all training stages. A weight is a share of documents; a dialogue is about six times as long as a problem.
COMMON = ["--batch-size", "6", "--row-length", "512", "--seed", str(SEED), "--validate-every", "400"]
PRETRAIN = ["--no-prompt-loss", "--split-digits", "--lr", "2e-3", "--decay", "0.4"]
TRAIN = ["--block-size", "16", "--lr", "1.5e-3"]
LONGER = ["--block-size", "16", "--lr", "1e-3", "--decay", "0.6"]
DIALOGUE_SHARE = {"backbone": 0.09, "denoiser": 0.14, "longer": 0.09}
HARD_SHARE = 0.35
SETTINGS = ("diffusion:0.8", "diffusion:0.9", "verified:draft_steps=1")  # of the card


def write_text(out: Path) -> None:
    """Writes the training problems of the suite and the backbone's config."""
    from twotower.evaluation.tasks import SUITE, make_problems, write_jsonl

    families = (*SUITE, *PRACTISED_TWICE)
    replace_text(out / "shape.json", json.dumps(SHAPE, indent=2) + "\n")
    with replaced_file(out / "suite.jsonl") as partial:
        write_jsonl(partial, make_problems("train", PROBLEMS, SEED, families, DIFFICULTIES))
    with replaced_file(out / "hard.jsonl") as partial:
        write_jsonl(partial, make_problems("train", HARD_PROBLEMS, SEED + 1, HARD_TO_DENOISE, DIFFICULTIES))


def write_continuations(data: Path, out: Path, processes: int) -> None:
    """Writes training dialogues that are cut early and continued greedily by the backbone: {"prompt", "text"} a line.

    The denoiser should imitate the frozen context tower, not the corpus (sequence-level distillation, Kim & Rush
    2016). On such text a block has one right answer, so several positions can have high confidence at once. Dialogues
    are cut early because only the text after the prompt is trained.
    """
    from twotower.evaluation.held_out import cut_dialogue, read_documents

    rng = random.Random(SEED)
    texts = rng.choices(read_documents(data / "train.jsonl.gz"), k=CONTINUATIONS)
    cut = sorted(
        (cut_dialogue(text, rng, before=0.5) for text in texts), key=len
    )  # texts of similar length share a batch
    parts = [cut[start : start + 64] for start in range(0, len(cut), 64)]
    workers = multiprocessing.get_context("spawn").Pool(processes, _load, (out / "start",))
    with (
        workers as pool,
        replaced_file(out / "continuations.jsonl") as partial,
        partial.open("w", encoding="utf-8") as lines,
    ):
        for number, part in enumerate(pool.imap(_finish, parts), 1):
            lines.writelines(part)
            print(f"{number * 64}/{len(cut)} continuations", file=sys.stderr, flush=True)


_loaded: TwoTowerForCausalLM | None = None  # the model of a worker process


def _load(path: Path) -> None:
    global _loaded
    import torch

    from twotower.modeling_twotower import TwoTowerForCausalLM

    configure_process(threads=1)
    _loaded = TwoTowerForCausalLM.from_pretrained(path, towers="context", dtype=torch.float32)


def _finish(texts: list[str]) -> list[str]:
    """Lines of JSON. A continuation without EOS is left out, because it would teach a wrong ending."""
    from twotower.decoding.params import GenerationParams
    from twotower.engine.generation import generate

    assert _loaded is not None
    eos, tokenizer = _loaded.config.eos_token_id, require_tokenizer(_loaded.tokenizer)
    params = GenerationParams.of(mode="ar", max_new_tokens=CONTINUATION_LENGTH, eos_token_id=eos)
    results = generate(_loaded, [tokenizer(text)["input_ids"] for text in texts], params)
    return [
        json.dumps({"prompt": text, "text": result.text}) + "\n"
        for text, result in zip(texts, results, strict=True)
        if result.finish_reason == "eos" and result.text.strip()
    ]


def stages(data: Path, out: Path, steps: dict[str, int], processes: int) -> list[RecipeStage]:
    """The stages in order. steps: of each training stage."""

    def trained(stage: str, dialogues: Path, options: Sequence[str], *words: str) -> RecipeStage:
        share, hard = DIALOGUE_SHARE[stage], HARD_SHARE if stage == "longer" else 0.0
        shares = {dialogues: share, out / "suite.jsonl": 1 - share - hard}
        shares |= {out / "hard.jsonl": hard} if hard else {}
        command = [*words, "-o", str(out / stage), "--steps", str(steps[stage]), *data_options(shares)]
        return RecipeStage(stage, out / stage / "model", [*command, *options, *COMMON], parallel=True)

    continuations, model = out / "continuations.jsonl", out / "model"
    runs = {stage: out / stage for stage in ("backbone", "denoiser", "longer")}
    start = ["--from", str(out / "backbone/model"), "--denoiser", "tower"]
    return [
        RecipeStage("text", out / "hard.jsonl", lambda: write_text(out)),
        trained("backbone", data / "train.jsonl.gz", PRETRAIN, "pretrain", "--config", str(out / "shape.json")),
        RecipeStage("start", out / "start", ["init", *start, "-o", str(out / "start")]),
        RecipeStage("continuations", continuations, lambda: write_continuations(data, out, processes)),
        trained("denoiser", continuations, TRAIN, "train", str(out / "start")),
        trained("longer", continuations, LONGER, "train", str(out / "denoiser/model")),
        RecipeStage("export", model, lambda: export_model(out / "longer/model", model, runs)),
        RecipeStage("figures", model / "metrics.json", lambda: measure(data, model, SETTINGS)),
    ]


main = recipe_command(
    "Makes the bundled model with two full towers.",
    STAGES,
    {"backbone": 4800, "denoiser": 5000, "longer": 3600},
    stages,
)


if __name__ == "__main__":
    main()
