"""Figures of the bundled model's card: `python -m twotower.evaluation.held_out DATA [--model DIR]`.

DATA is a folder with train.jsonl.gz (for the n-gram baseline) and valid.jsonl.gz. The output is one JSON object.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path

import click
from tokenizers import Tokenizer

from twotower.assets import bundled_model
from twotower.decoding.modes import COMPARED_SETTINGS
from twotower.decoding.presets import AR, Setting, parse_setting, with_ar
from twotower.engine import Request
from twotower.evaluation.accuracy import measure_accuracy, repeated_share
from twotower.evaluation.likelihood import ar_nats, continuation_nats
from twotower.evaluation.ngram import KneserNey
from twotower.evaluation.running import generate_all
from twotower.evaluation.tasks import SUITE, make_problems
from twotower.modeling_twotower import TwoTowerForCausalLM
from twotower.process import configure_process
from twotower.tokenizer import require_tokenizer
from twotower.training.data import EOS, Source
from twotower.training.data.readers import one_epoch

SEED = 7


def read_documents(path: Path) -> list[str]:
    """Texts of a data file: the field `text` of each line."""
    return [record.text for record in one_epoch(Source(str(path)))]


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each document: <bos> text <eos>."""
    return [[*item.ids, EOS] for item in tokenizer.encode_batch(list(texts))]


def cut_dialogue(text: str, rng: random.Random, before: float = 1.0) -> str:
    """A prompt: the turns (lines) before a random turn in the first share `before`, and its speaker (`User:`)."""
    turns = text.split("\n")
    at = rng.randrange(1, max(int(before * len(turns)), 2))
    return "\n".join([*turns[:at], turns[at].split(":")[0] + ":"])


def cut_dialogues(texts: Sequence[str], count: int) -> list[str]:
    """`count` random dialogues, each cut at a random turn."""
    rng = random.Random(SEED)
    return [cut_dialogue(text, rng) for text in rng.sample(list(texts), count)]


def measure_dialogues(
    model: TwoTowerForCausalLM, settings: Sequence[Setting], texts: Sequence[str], count: int, limit: int
) -> dict[str, object]:
    """Greedy continuations of cut dialogues in AR and each setting, with at most `limit` new tokens."""
    tokenizer = require_tokenizer(model.tokenizer)
    prompts = [tokenizer(text)["input_ids"] for text in cut_dialogues(texts, count)]
    prompts.sort(key=len)  # prompts of similar length share a batch
    figures: dict[str, object] = {}
    nats_of_ar = math.nan  # per token; AR comes first
    shared = {"max_new_tokens": limit, "eos_token_id": EOS, "mask_token_id": model.config.mask_token, "seed": 0}
    for setting in with_ar(settings):
        params = setting.params(**shared)
        results = generate_all(model, [Request(prompt, params) for prompt in prompts], rows=40)
        nats, tokens = continuation_nats(model, prompts, results)
        passes = {name: sum(getattr(r, name) for r in results) for name in ("denoiser_passes", "context_passes")}
        if setting is AR:
            nats_of_ar = nats / tokens
        figures[setting.label] = {
            "tokens": tokens,
            **passes,
            "tokens_per_pass": tokens / sum(passes.values()),
            "nll_per_token": nats / tokens,
            "nll_ratio": nats / tokens / nats_of_ar,
            "repeated_4grams": repeated_share(results),
            "ended_by_eos": sum(r.finish_reason == "eos" for r in results) / count,
        }
    return figures | {"count": count, "max_new_tokens": limit}


def measure_suite(
    model: TwoTowerForCausalLM, settings: Sequence[Setting], count: int, level: int, families: Sequence[str] = SUITE
) -> dict[str, object]:
    """Accuracy on `count` test problems of the families in AR and each setting."""
    chosen = make_problems("test", count, SEED, families, difficulties=(level,))
    lines = measure_accuracy(model, settings, chosen, likelihood=False)
    return {line.setting: line.to_dict() for line in lines} | {"problems": count}


@click.command()
@click.argument("data", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("-m", "--model", "path", type=click.Path(exists=True, file_okay=False, path_type=Path), default=None)
@click.option("--dialogues", default=200, show_default=True, help="Held-out dialogues to continue.")
@click.option("--limit", default=400, show_default=True, help="Maximum number of new tokens for each dialogue.")
@click.option(
    "--problems",
    "problem_count",
    default=600,
    show_default=True,
    help="Problems of the suite's test split; 0 for none.",
)
@click.option(
    "--json-problems", default=0, show_default=True, help="Problems of the family json, at each level; 0 for none."
)
@click.option(
    "-s",
    "--setting",
    "settings",
    multiple=True,
    default=COMPARED_SETTINGS,
    show_default=True,
    metavar="MODE[:VALUE,NAME=X…]",
    help="Decoding setting to compare with AR. Can be repeated.",
)
@click.option("--likelihood/--no-likelihood", default=True, help="Measure bits per byte, and those of a 5-gram model.")
@click.option("--dtype", default="float32", show_default=True)
def main(
    data: Path,
    path: Path | None,
    dialogues: int,
    limit: int,
    problem_count: int,
    json_problems: int,
    settings: tuple[str, ...],
    likelihood: bool,
    dtype: str,
) -> None:
    """Measure a model on held-out dialogues and on the procedural suite."""
    configure_process()
    compared = [parse_setting(text) for text in settings]
    model = TwoTowerForCausalLM.from_pretrained(path or bundled_model(), dtype=dtype)
    tokenizer = require_tokenizer(model.tokenizer).backend_tokenizer
    texts = read_documents(data / "valid.jsonl.gz")
    figures: dict[str, object] = {"dtype": dtype, "seed": SEED}
    if likelihood:
        documents = encode(tokenizer, texts)
        bits = math.log(2) * sum(len(text.encode()) for text in texts)
        figures["held_out_documents"] = len(documents)
        figures["ar_bits_per_byte"] = ar_nats(model, documents) / bits
        train = encode(tokenizer, read_documents(data / "train.jsonl.gz"))
        ngram = KneserNey(train, order=5, vocab_size=model.spec.vocab_size)
        figures["5gram_bits_per_byte"] = ngram.nats(documents) / bits
    figures["dialogues"] = measure_dialogues(model, compared, texts, dialogues, limit)
    for name, count, families in (("suite", problem_count, SUITE), ("json", json_problems, ("json",))):
        if count:
            figures[name] = {
                f"difficulty_{level}": measure_suite(model, compared, count, level, families) for level in (1, 2)
            }
    click.echo(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
