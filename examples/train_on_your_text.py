"""Train the denoiser tower of a bundled model on your text, then generate. The same as a command: twotower train.

Run: python examples/train_on_your_text.py [CORPUS.jsonl [RUN]]. A line of the corpus: {"text": "…"}.
"""

import json
import sys
from pathlib import Path

from twotower import GenerationParams, TwoTowerForCausalLM, bundled_model, generate
from twotower.training import fsdp
from twotower.training.run_settings import DenoiserSettings
from twotower.training.runs import train_denoiser
from twotower.training.trainer import Stage

PROMPT = "User: Which tower reads the prompt?\nAssistant:"
LINE = json.dumps({"text": f"{PROMPT} The context tower reads the prompt.\n" * 4})

run = Path(sys.argv[2] if len(sys.argv) > 2 else "runs/your-text")
corpus = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/your-text.jsonl")
if not corpus.exists():
    corpus.parent.mkdir(parents=True, exist_ok=True)
    corpus.write_text(f"{LINE}\n" * 4, encoding="utf-8")

settings = DenoiserSettings(
    model=str(bundled_model("small")),
    data=(str(corpus),),
    held_out=0.0,  # of so little text, nothing is kept for validation
    stages=(Stage(block_size=16, steps=40),),
    batch_size=2,
    row_length=128,
    warmup=4,
    lr=1e-3,
    tensorboard=False,
)
checkpoint = train_denoiser(settings, run, fsdp.start("cpu"))  # RUN/log.jsonl is the log
fsdp.stop()
model = TwoTowerForCausalLM.from_pretrained(checkpoint, dtype="float32")
(output,) = generate(model, [PROMPT], GenerationParams.of(mode="diffusion", max_new_tokens=16))
print(output.text)
