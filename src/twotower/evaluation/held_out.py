"""The bundled model's figures, for its model card: `python -m twotower.evaluation.held_out DATA [--model DIR]`.

DATA holds train.jsonl.gz (for the n-gram baseline) and valid.jsonl.gz. Prints one JSON object.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from tokenizers import Tokenizer

from twotower.allocator import keep_large_blocks
from twotower.assets import bundled_model
from twotower.evaluation.ngram import KneserNey
from twotower.evaluation.running import Request, run
from twotower.evaluation.suite import problems
from twotower.evaluation.suite.measure import measure_suite
from twotower.generation import Generation, GenerationParams
from twotower.model.two_tower import TwoTowerForCausalLM
from twotower.training.corpus import EOS, Batch, Piece, Source, lay_out
from twotower.training.corpus.packing import whole
from twotower.training.corpus.reading import whole_pass
from twotower.training.objective import AutoregressiveObjective

SEED = 7


def read_documents(path: Path) -> list[str]:
    """The texts of a data file (`text` of each line)."""
    return [record.text for record in whole_pass(Source(str(path)))]


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """<bos> text <eos> for each document."""
    return [[*item.ids, EOS] for item in tokenizer.encode_batch(list(texts))]


def cut_dialogue(text: str, rng: random.Random, before: float = 1.0) -> str:
    """A prompt: the turns (lines) before a random one of its first part `before`, and that one's speaker (`User:`)."""
    turns = text.split("\n")
    at = rng.randrange(1, max(int(before * len(turns)), 2))
    return "\n".join([*turns[:at], turns[at].split(":")[0] + ":"])


def ar_nats(model: TwoTowerForCausalLM, documents: Sequence[Sequence[int]]) -> float:
    """Summed −ln P of the context tower over every token after each document's first (its EOS included)."""
    chunk = model.config.backbone.chunk_size
    objective = AutoregressiveObjective(model.context)
    with torch.no_grad():
        return sum(objective(batch, None, chunk).item() for batch in _batches(documents, 16, chunk))


def _batches(documents: Sequence[Sequence[int]], rows: int, chunk: int) -> Iterator[Batch]:
    """Like lengths together, a document a row."""
    ordered = sorted(documents, key=len)
    for start in range(0, len(ordered), rows):
        pieces = [[Piece(np.array(d, dtype=np.int32), 0, 0, False)] for d in ordered[start : start + rows]]
        length = whole(len(ordered[min(start + rows, len(ordered)) - 1]), chunk)
        yield lay_out(pieces, range(len(pieces)), length, chunk, eos=EOS, pad=0)


def continuation_nats(
    model: TwoTowerForCausalLM, prompts: Sequence[list[int]], results: Sequence[Generation]
) -> tuple[float, int]:
    """−ln P of the context tower, summed over the new tokens only, and their number."""
    whole = ar_nats(model, [[*prompt, *result.tokens] for prompt, result in zip(prompts, results, strict=True)])
    return whole - ar_nats(model, prompts), sum(len(result.tokens) for result in results)


def repeated_share(results: Sequence[Generation], size: int = 4) -> float:
    """Share of n-grams that occurred before in the same text."""
    grams = repeats = 0
    for result in results:
        seen = set()
        for gram in zip(*(result.tokens[k:] for k in range(size)), strict=False):
            grams, repeats = grams + 1, repeats + (gram in seen)
            seen.add(gram)
    return repeats / max(grams, 1)


def cut_dialogues(texts: Sequence[str], count: int) -> list[str]:
    """Random dialogues, each cut at a random turn."""
    rng = random.Random(SEED)
    return [cut_dialogue(text, rng) for text in rng.sample(list(texts), count)]


def measure_generation(
    model: TwoTowerForCausalLM, texts: Sequence[str], count: int, limit: int, block_sizes: Sequence[int]
) -> dict[str, Any]:
    """Greedy continuation of cut dialogues to their end, by AR and by diffusion at γ 0.8 with each block size."""
    prompts = [model.tokenizer(text)["input_ids"] for text in cut_dialogues(texts, count)]
    prompts.sort(key=len)  # like lengths share a batch
    runs: dict[str, dict[str, Any]] = {"ar": {"mode": "ar"}}
    for size in block_sizes:
        runs[f"diffusion_block_{size}"] = {"mode": "diffusion", "confidence_threshold": 0.8, "block_size": size}
    figures: dict[str, Any] = {"dialogues": count, "max_new_tokens": limit}
    for name, settings in runs.items():
        params = GenerationParams.of(max_new_tokens=limit, eos_token_id=EOS, **settings)
        results = run(model, [Request(prompt, params) for prompt in prompts], rows=40)
        nats, tokens = continuation_nats(model, prompts, results)
        passes = sum(r.passes for r in results)
        figures[name] = {
            "tokens": tokens,
            "passes": passes,
            "context_passes": sum(r.context_passes for r in results),
            "tokens_per_pass": tokens / passes,
            "nll_per_token": nats / tokens,
            "nll_ratio": nats / tokens / figures["ar"]["nll_per_token"] if name != "ar" else 1.0,
            "repeated_4grams": repeated_share(results),
            "ended_by_eos": sum(r.finish_reason == "eos" for r in results) / count,
        }
    return figures


@click.command()
@click.argument("data", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--model", "path", type=click.Path(exists=True, file_okay=False, path_type=Path), default=None)
@click.option("--dialogues", default=200, show_default=True, help="Held-out dialogues to continue.")
@click.option("--limit", default=400, show_default=True, help="New tokens for each, at most.")
@click.option("--block-size", "block_sizes", default=(16,), multiple=True, show_default=True)
@click.option("--problems", "problem_count", default=600, show_default=True, help="Of the suite's test split; 0: none.")
@click.option("--likelihood/--no-likelihood", default=True, help="Also bits per byte against a 5-gram model.")
@click.option("--dtype", default="float32", show_default=True)
def main(
    data: Path,
    path: Path | None,
    dialogues: int,
    limit: int,
    block_sizes: tuple[int, ...],
    problem_count: int,
    likelihood: bool,
    dtype: str,
) -> None:
    """Measures a model on held-out dialogues and the suite."""
    keep_large_blocks()
    model = TwoTowerForCausalLM.from_pretrained(path or bundled_model(), dtype=dtype)
    tokenizer = model.tokenizer.backend_tokenizer
    texts = read_documents(data / "valid.jsonl.gz")
    figures: dict[str, Any] = {"dtype": dtype, "seed": SEED}
    if likelihood:
        documents = encode(tokenizer, texts)
        bits = math.log(2) * sum(len(text.encode()) for text in texts)
        figures["held_out_documents"] = len(documents)
        figures["ar_bits_per_byte"] = ar_nats(model, documents) / bits
        train = encode(tokenizer, read_documents(data / "train.jsonl.gz"))
        ngram = KneserNey(train, order=5, vocab_size=model.config.backbone.vocab_size)
        figures["5gram_bits_per_byte"] = ngram.nats(documents) / bits
    figures |= measure_generation(model, texts, dialogues, limit, block_sizes)
    if problem_count:
        figures["suite"] = {
            f"difficulty_{level}": measure_suite(model, problems("test", problem_count, SEED, difficulties=(level,)))
            for level in (1, 2)
        }
    click.echo(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
