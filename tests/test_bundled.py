"""The bundled model is trained, and has the figures of its card."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from twotower import TwoTowerForCausalLM, bundled_model
from twotower.assets import bundled_names
from twotower.decoding.presets import Setting, parse_setting
from twotower.evaluation.held_out import encode, measure_dialogues, measure_suite, read_documents
from twotower.evaluation.likelihood import ar_nats
from twotower.evaluation.ngram import KneserNey
from twotower.evaluation.tasks import SUITE
from twotower.recipes.card import tables

DATA = Path(os.environ.get("TWOTOWER_DATA", Path(__file__).parents[2] / "shared" / "data")) / "corpora/sgd_dialogues"


Figures = dict[str, Any]


@pytest.fixture(scope="module", params=bundled_names())
def directory(request: pytest.FixtureRequest) -> Path:
    """The directory of each bundled model."""
    return bundled_model(request.param)


@pytest.fixture(scope="module")
def model(directory: Path) -> TwoTowerForCausalLM:
    return TwoTowerForCausalLM.from_pretrained(directory, dtype="float32")


@pytest.fixture(scope="module")
def card(directory: Path) -> Figures:
    return json.loads((directory / "metrics.json").read_text())


@pytest.fixture(scope="module")
def settings(card: Figures) -> list[Setting]:
    """The settings of the card, without AR."""
    return [parse_setting(name) for name in card["dialogues"] if name.startswith(("diffusion", "verified"))]


@pytest.fixture(scope="module")
def held_out(golden_dir: Path) -> list[str]:
    return read_documents(golden_dir / "dialogues" / "held_out.jsonl")


def test_the_models_are_small_enough_for_the_package() -> None:
    assert sum(file.stat().st_size for name in bundled_names() for file in bundled_model(name).iterdir()) < 25e6


def test_the_card_says_what_was_measured(directory: Path, card: Figures) -> None:
    text = (directory / "README.md").read_text()
    assert f"{card['ar_bits_per_byte']:.3f}" in text
    assert f"{card['5gram_bits_per_byte']:.3f}" in text
    for title, lines in tables(directory).items():
        assert "\n".join(lines) in text, title


def test_the_context_tower_predicts_held_out_dialogues(
    model: TwoTowerForCausalLM, held_out: list[str], card: Figures
) -> None:
    documents = encode(model.tokenizer.backend_tokenizer, held_out)
    bits = ar_nats(model, documents) / math.log(2) / sum(len(text.encode()) for text in held_out)
    assert bits < card["5gram_bits_per_byte"]


def test_a_pass_brings_more_than_one_token_of_a_dialogue(
    model: TwoTowerForCausalLM, settings: list[Setting], held_out: list[str]
) -> None:
    figures = measure_dialogues(model, settings, held_out, count=12, limit=96)
    verified = figures["verified:draft_steps=1"]
    assert figures[settings[0].label]["tokens_per_pass"] > 1.2
    assert verified["tokens_per_pass"] > 1.2
    assert verified["nll_per_token"] == pytest.approx(figures["ar"]["nll_per_token"])


def test_the_model_solves_unseen_problems(model: TwoTowerForCausalLM, settings: list[Setting]) -> None:
    """In mode ar, and in mode diffusion with fewer passes."""
    figures = measure_suite(model, settings, 60, level=1)
    ar, diffusion, verified = (figures[name] for name in ("ar", settings[0].label, "verified:draft_steps=1"))
    assert ar["accuracy"]["overall"] > 0.7
    assert diffusion["accuracy"]["overall"] > 0.3
    assert verified["accuracy"] == ar["accuracy"]
    assert ar["tokens_per_pass"]["overall"] == 1
    assert diffusion["tokens_per_pass"]["overall"] > 2
    assert verified["tokens_per_pass"]["overall"] > 2


def test_kneser_ney_is_a_distribution() -> None:
    documents = [[0, 1, 2, 3, 1, 2, 4, 0], [0, 2, 2, 3, 1, 1, 4, 0], [0, 1, 4, 4, 3, 2, 1, 0]]
    ngram = KneserNey(documents, order=3, vocab_size=5)
    for history in ([0, 1], [0, 1, 2], [0, 4, 0]):
        before = ngram.nats([history])
        total = sum(math.exp(before - ngram.nats([[*history, word]])) for word in range(5))
        assert total == pytest.approx(1.0, abs=1e-12)


@pytest.mark.slow
def test_figures_of_the_card_are_reproduced(model: TwoTowerForCausalLM, settings: list[Setting], card: Figures) -> None:
    if not DATA.is_dir():
        pytest.skip(f"needs the dialogues in {DATA} (set TWOTOWER_DATA): the full held-out measurement is not run")
    texts = read_documents(DATA / "valid.jsonl.gz")
    names = ["ar", *(setting.label for setting in settings)]
    told = card["dialogues"]
    found = measure_dialogues(model, settings, texts, told["count"], told["max_new_tokens"])
    for name in names:  # another machine may resolve near ties differently, so the last digit may differ
        assert found[name]["tokens_per_pass"] == pytest.approx(told[name]["tokens_per_pass"], rel=0.02)
        assert found[name]["nll_per_token"] == pytest.approx(told[name]["nll_per_token"], rel=0.05)
    for kind, families in (("suite", SUITE), ("json", ("json",))):
        for level, told in card.get(kind, {}).items():
            found = measure_suite(model, settings, told["problems"], int(level.split("_")[1]), families)
            for name in names:
                assert found[name]["accuracy"]["overall"] == pytest.approx(told[name]["accuracy"]["overall"], abs=0.02)
                want = told[name]["tokens_per_pass"]["overall"]
                assert found[name]["tokens_per_pass"]["overall"] == pytest.approx(want, rel=0.02)
    documents = encode(model.tokenizer.backend_tokenizer, texts)
    bits = math.log(2) * sum(len(text.encode()) for text in texts)
    train = encode(model.tokenizer.backend_tokenizer, read_documents(DATA / "train.jsonl.gz"))
    assert ar_nats(model, documents) / bits == pytest.approx(card["ar_bits_per_byte"], rel=1e-3)
    ngram = KneserNey(train, order=5, vocab_size=model.config.vocab_size)
    assert ngram.nats(documents) / bits == pytest.approx(card["5gram_bits_per_byte"], rel=1e-6)
    assert card["ar_bits_per_byte"] < card["5gram_bits_per_byte"]
