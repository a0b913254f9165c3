"""Settings as text, generation in batches, paired comparisons, and `twotower eval`."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from command import Result, assert_one_line_error
from conftest import build_random_model

from twotower import TwoTowerForCausalLM, bundled_model
from twotower.decoding.presets import parse_setting
from twotower.engine import Request
from twotower.engine.generation import generate
from twotower.errors import ArgumentError
from twotower.evaluation.accuracy import chosen_problems, measure_accuracy
from twotower.evaluation.comparison import PairedComparison, compare
from twotower.evaluation.running import generate_all
from twotower.evaluation.tasks import SUITE

# --- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("ar", {"mode": "ar"}),
        ("diffusion", {"mode": "diffusion"}),
        ("diffusion:0.8", {"mode": "diffusion", "policy": "threshold", "policy_value": 0.8}),
        (
            "diffusion:factor=1.2,block_size=32,steps_per_block=8",
            {"mode": "diffusion", "policy": "factor", "policy_value": 1.2, "block_size": 32, "steps_per_block": 8},
        ),
        ("verified:draft_steps=2,acceptance=0.5", {"mode": "verified", "draft_steps": 2, "acceptance": 0.5}),
        ("ar:temperature=0.7,top_k=5", {"mode": "ar", "temperature": 0.7, "top_k": 5}),
    ],
)
def test_a_setting_is_parsed(text: str, values: dict[str, Any]) -> None:
    setting = parse_setting(text)
    assert setting.values == values
    assert setting.label == text
    params = setting.params(max_new_tokens=9, block_size=4)
    assert params.max_new_tokens == 9
    assert params.block_size == values.get("block_size", 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fast", "mode is 'fast'; choose one of diffusion"),
        ("diffusion:boldness=3", "unknown parameter or policy 'boldness'; known are block_size"),
        ("diffusion:block_size=2.5", "'block_size=2.5' needs a whole number"),
        ("diffusion:high", "'high' needs a number"),
        ("diffusion:1.5", "policy_value (threshold: confidence) is 1.5"),
        ("verified:acceptance=2", "acceptance is 2.0"),
    ],
)
def test_a_wrong_setting_is_an_error(text: str, message: str) -> None:
    with pytest.raises(ArgumentError) as error:
        parse_setting(text)
    assert message in str(error.value)


# --- generation -----------------------------------------------------------------------------------------------------


def test_outputs_of_a_batch_equal_those_of_single_requests() -> None:
    model = build_random_model("M*E", dtype=torch.float64)
    rng = random.Random(0)
    settings = [parse_setting(text) for text in ("ar", "diffusion:0.1", "verified:draft_steps=1", "ar:temperature=1")]
    requests = [
        Request(
            [rng.randrange(4, 64) for _ in range(rng.randint(1, 20))],
            rng.choice(settings).params(max_new_tokens=rng.choice((5, 12)), seed=rng.randrange(2), block_size=4),
        )
        for _ in range(30)
    ]
    told: list[int] = []
    outputs = generate_all(model, requests, rows=4, progress=told.append)
    assert told == sorted(told)
    assert told[-1] == 30
    for request, output in zip(requests, outputs, strict=True):
        (alone,) = generate(model, [list(request.prompt)], request.params)
        assert output.tokens == alone.tokens
        assert output.mode == request.params.mode
    assert generate_all(model, []) == []


# --- paired comparisons ---------------------------------------------------------------------------------------------


def test_pairs_are_counted() -> None:
    pair = compare([True, True, True, False, False], [True, False, False, True, False])
    assert pair == PairedComparison(count=5, both=1, lost=2, gained=1)
    assert pair.difference == pytest.approx(-0.2)
    assert pair.kept[0] == pytest.approx(2 / 3)
    low, high = pair.interval
    assert low < pair.difference < high
    assert pair.kept[1] < pair.kept[0] < pair.kept[2]
    with pytest.raises(ArgumentError, match="1 and 2 answers"):
        compare([True], [True, False])


def test_equal_answers_have_no_difference_but_an_interval() -> None:
    few, many = (compare([True] * n, [True] * n) for n in (20, 2000))
    assert few.difference == many.difference == 0
    assert few.interval[0] < many.interval[0] < 0 < many.interval[1] < few.interval[1]
    assert math.isnan(compare([False], [True]).kept[0])


def test_the_interval_covers_the_true_difference() -> None:
    """In 95 % of cases, with few and with many changed answers."""
    rng = random.Random(0)
    for lost, gained, count in ((0.02, 0.01, 400), (0.1, 0.02, 100), (0.2, 0.2, 60)):
        covered = 0
        for _ in range(1500):
            draws = [rng.random() for _ in range(count)]
            a, b = sum(d < lost for d in draws), sum(lost <= d < lost + gained for d in draws)
            low, high = PairedComparison(count, count - a - b, a, b).interval
            covered += low <= gained - lost <= high
        assert 0.93 <= covered / 1500 <= 0.985


# --- accuracy -------------------------------------------------------------------------------------------------------


def test_problems_are_spread_over_families_and_difficulties() -> None:
    problems = chosen_problems((), 6, (1, 3), seed=0)
    assert len(problems) == 6 * len(SUITE)
    for family in SUITE:
        own = [problem.difficulty for problem in problems if problem.family == family]
        assert sorted(own) == [1, 1, 1, 3, 3, 3]
    assert {problem.family for problem in chosen_problems(("edits",), 3, (1,), seed=0)} == {"edits"}


def test_lossless_decoding_keeps_the_quality_of_ar() -> None:
    model = TwoTowerForCausalLM.from_pretrained(bundled_model("small"), dtype="float64")
    problems = chosen_problems(("sorting", "recall"), 3, (1,), seed=0)
    settings = [parse_setting(text) for text in ("ar", "verified:draft_steps=1", "diffusion:0.5")]
    ar, verified, diffusion = measure_accuracy(model, settings, problems, max_new_tokens=24, rows=4)
    assert (ar.setting, verified.setting, diffusion.setting) == ("ar", "verified:draft_steps=1", "diffusion:0.5")
    assert ar.accuracy == verified.accuracy
    assert ar.nll == pytest.approx(verified.nll, abs=1e-9)
    assert verified.against_ar["overall"].lost == verified.against_ar["overall"].gained == 0
    assert set(ar.tokens_per_pass.values()) == {1.0}
    assert verified.tokens == ar.tokens
    for name, tokens in verified.tokens.items():
        passes = verified.denoiser_passes[name] + verified.context_passes[name]
        assert verified.tokens_per_pass[name] == tokens / passes
    assert verified.tokens["overall"] == verified.tokens["sorting"] + verified.tokens["recall"]
    assert set(ar.accuracy) == {"sorting", "recall", "overall"}
    assert json.loads(json.dumps(diffusion.to_dict()))["against_ar"]["overall"]["count"] == 6


def test_the_verb_prints_a_table_and_one_line_of_json(cli: Callable[..., Result]) -> None:
    result = cli(
        "eval", "-n", "1", "--family", "sorting", "--difficulty", "1", "--max-new-tokens", "12", "-s", "diffusion:0.8",
        "--dtype", "float32",
    )  # fmt: skip
    assert result.code == 0
    facts = json.loads(result.out)
    assert [line["setting"] for line in facts["settings"]] == ["ar", "diffusion:0.8"]
    for words in ("setting", "tokens/pass", "sorting", "diffusion:0.8", "95 %"):
        assert words in result.err
    assert "\x1b" not in result.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("-s", "diffusion:9"), ("policy_value", "9")),
        (("--family", "poetry"), ("poetry", "addition")),
        (("--difficulty", "9"), ("difficulty is 9",)),
    ],
)
def test_bad_input_is_a_one_line_error(
    cli: Callable[..., Result], arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    assert_one_line_error(cli("eval", *arguments), *words)
