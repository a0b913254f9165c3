"""What verified decoding costs where drafts are worth little, against AR on the same texts.

    python benchmarks/worst_case.py [--model DIR] [--texts 8] [--tokens 256] [--rounds 5] [--threads 1] [--json]

Three kinds of text, from bad to good: random prompts continued at temperature 1.5 (nobody can guess those), random
prompts continued greedily, and problems of the suite continued past their answers. AR and verified decoding with an
adaptive number of passes take turns, text by text, now one first and now the other; the same seeds, so both write the
same text. Ratios of a round's seconds, medians. A model's rounds share what was learned, as its requests do.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
from pathlib import Path

import click

from twotower.allocator import keep_large_blocks

keep_large_blocks()

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from twotower import TwoTowerForCausalLM, bundled_model  # noqa: E402
from twotower.decoding.output import Generation  # noqa: E402
from twotower.decoding.params import GenerationParams  # noqa: E402
from twotower.engine import Request  # noqa: E402
from twotower.evaluation.machine import machine  # noqa: E402
from twotower.evaluation.running import run  # noqa: E402
from twotower.evaluation.tasks import problems  # noqa: E402

PROMPT = 24  # random tokens


def kinds(model: TwoTowerForCausalLM, texts: int) -> dict[str, tuple[list[list[int]], float]]:
    """Prompts and temperature of each kind of text."""
    rng = random.Random(0)
    noise = [[rng.randrange(4, model.config.vocab_size) for _ in range(PROMPT)] for _ in range(texts)]
    solved = [model.tokenizer(problem.prompt)["input_ids"] for problem in problems("test", texts, 0)]
    return {"noise, temperature 1.5": (noise, 1.5), "noise, greedy": (noise, 0.0), "suite, greedy": (solved, 0.0)}


def written(
    model: TwoTowerForCausalLM, mode: str, number: int, prompt: list[int], tokens: int, warm: float
) -> Generation:
    """A text alone; no end of text, so that all are equally long."""
    params = GenerationParams.of(
        mode=mode, max_new_tokens=tokens, temperature=warm, seed=number, mask_token_id=model.config.mask_token
    )
    (output,) = run(model, [Request(prompt, params)], rows=1)
    return output


@click.command()
@click.option("--model", "path", type=click.Path(exists=True, file_okay=False, path_type=Path), default=None)
@click.option("--texts", default=8, show_default=True)
@click.option("--tokens", default=256, show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--dtype", default="float32", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="No table.")
def main(path: Path | None, texts: int, tokens: int, rounds: int, threads: int, dtype: str, as_json: bool) -> None:
    """Measures it."""
    torch.set_num_threads(threads)
    model = TwoTowerForCausalLM.from_pretrained(path or bundled_model(), dtype=dtype)
    table = Table("text", "verified ÷ AR, seconds", "lowest … highest", "drafts", "kept a draft", "texts that differ")
    found = []
    for name, (prompts, warm) in kinds(model, texts).items():
        ratios: list[float] = []
        for number in range(rounds + 1):
            print(f"{name}: round {number} of {rounds}", file=sys.stderr)
            outputs: dict[str, list[Generation]] = {"ar": [], "verified": []}
            for i, prompt in enumerate(prompts):
                for mode in sorted(outputs, reverse=(i + number) % 2 == 0):
                    outputs[mode].append(written(model, mode, i, prompt, tokens, warm))
            ar, verified = outputs["ar"], outputs["verified"]
            if number:
                ratios.append(sum(o.decode_seconds for o in verified) / sum(o.decode_seconds for o in ar))
        drafts, kept = sum(o.drafts for o in verified), sum(o.accepted for o in verified)
        differ = sum(a.tokens != b.tokens for a, b in zip(ar, verified, strict=True))
        middle = statistics.median(ratios)
        table.add_row(
            name, f"{middle:.3f}", f"{min(ratios):.3f} … {max(ratios):.3f}", str(drafts),
            f"{kept / max(drafts, 1):.2f}", f"{differ} of {texts}",
        )  # fmt: skip
        found.append(
            {"text": name, "ratio": middle, "ratios": ratios, "drafts": drafts, "kept": kept, "differ": differ}
        )
    if not as_json:
        Console(stderr=True, width=120).print(table)
    print(json.dumps({"machine": machine(model), "texts": texts, "tokens": tokens, "measured": found}))


if __name__ == "__main__":
    main()
