"""`twotower bench`: counts of tokens and passes, and the timing of passes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command import Result, assert_one_line_error
from conftest import build_random_model

from twotower import TwoTowerForCausalLM, bundled_model
from twotower.decoding.presets import parse_setting
from twotower.engine import LLM, Request
from twotower.engine.generation import generate
from twotower.evaluation import speed as measuring
from twotower.evaluation.timed_towers import TimedTowers
from twotower.evaluation.workloads import few_shot_prompts, few_shot_workloads

FP32 = ("--dtype", "float32")


@pytest.fixture(scope="module")
def model() -> TwoTowerForCausalLM:
    return TwoTowerForCausalLM.from_pretrained(bundled_model("small"), dtype="float32")


def test_every_setting_is_measured_at_every_size_with_ar(model: TwoTowerForCausalLM) -> None:
    told: list[str] = []
    settings = [parse_setting(text) for text in ("diffusion:0.5", "verified:draft_steps=1", "ar")]
    found = measuring.measure_speed(
        model, settings, few_shot_workloads(model, (1, 3), (20, 40), 2), new_tokens=12, rounds=2,
        ignore_eos=True, progress=told.append,
    )  # fmt: skip
    assert len(told) == 4 * 3 * 3  # sizes, settings, rounds and the warm-up round
    assert [(one.rows, one.context) for one in found[::3]] == [(1, 20), (3, 20), (1, 40), (3, 40)]
    assert [one.setting for one in found[:3]] == ["ar", "diffusion:0.5", "verified:draft_steps=1"]
    for ar, diffusion, verified in zip(found[::3], found[1::3], found[2::3], strict=True):
        assert ar.times_ar == ar.tokens_per_pass == ar.pass_cost["context"] == 1
        assert ar.pass_seconds["denoiser"] == 0
        assert ar.equal == verified.equal == 1 > diffusion.equal
        assert ar.tokens == diffusion.tokens == verified.tokens == 12 * ar.rows * 2
        assert diffusion.tokens_per_pass > 1
        for one in (ar, diffusion, verified):
            assert one.spread[0] <= one.seconds <= one.spread[1]
            assert one.times_ar_spread[0] <= one.times_ar <= one.times_ar_spread[1]
            assert one.tokens / one.spread[1] <= one.tokens_per_second <= one.tokens / one.spread[0]
            assert one.first_seconds > one.prefill_seconds > 0
        assert diffusion.pass_cost["denoiser"] == diffusion.pass_seconds["denoiser"] / ar.pass_seconds["context"]


def test_prompts_have_the_requested_length(model: TwoTowerForCausalLM) -> None:
    for context in (2, 33, 200):
        texts = few_shot_prompts(model, 5, context)
        assert [len(text) for text in texts] == [context] * 5
        assert model.tokenizer.decode(texts[0]).endswith("=>")
    assert texts == few_shot_prompts(model, 5, 200)
    assert len({tuple(text) for text in texts}) == 5


def test_tokens_after_the_end_are_not_counted() -> None:
    model = build_random_model("M*", dtype=torch.float64)
    texts = [[5, 6, 7], [8, 9, 10]]
    setting = parse_setting("ar")
    shared = {"max_new_tokens": 20, "seed": 0}
    whole = measuring.run_round(model, texts, 2, setting, shared)
    assert whole.tokens == 40
    (first, _) = generate(model, texts, setting.params(**shared))
    cut = measuring.run_round(model, texts, 2, setting, shared | {"eos_token_id": first.tokens[4]})
    assert cut.tokens < 40
    passes = measuring.pass_seconds(model, texts, 2, setting, shared)
    assert passes["context"] > 0
    assert passes["denoiser"] == 0


@pytest.mark.parametrize("setting", ["ar", "diffusion:0.5", "verified:draft_steps=1"])
def test_timed_passes_are_the_passes_of_the_request(model: TwoTowerForCausalLM, setting: str) -> None:
    """The context tower has one pass more, which reads the prompt. Text and model object are unchanged."""
    params = parse_setting(setting).params(max_new_tokens=32, mask_token_id=model.config.mask_token)
    request, before = Request(few_shot_prompts(model, 1, 40)[0], params), dict(vars(model))
    (plain,) = LLM.fitting(model, [request], 1).generate([request])
    timed = TimedTowers(model)
    (found,) = LLM.fitting(timed, [request], 1).generate([request])
    assert found.tokens == plain.tokens
    assert timed.times.passes == {"context": found.context_passes + 1, "denoiser": found.denoiser_passes}
    assert {tower for tower, seconds in timed.times.means().items() if seconds > 0} == (
        {"context"} if setting == "ar" else {"context", "denoiser"}
    )
    assert vars(model) == before


def test_auto_is_timed_in_the_mode_that_it_chooses(model: TwoTowerForCausalLM) -> None:
    shared = {"max_new_tokens": 8, "mask_token_id": model.config.mask_token, "seed": 0}
    passes = measuring.pass_seconds(model, few_shot_prompts(model, 2, 20), 2, parse_setting("auto"), shared)
    assert passes["context"] > 0


def test_the_verb_prints_tables_and_one_line_of_json(cli: Callable[..., Result]) -> None:
    result = cli("bench", "-n", "8", "--rounds", "1", "-c", "16", "-b", "1", "-b", "2", "-s", "diffusion:0.8", *FP32)
    assert result.code == 0
    facts = json.loads(result.out)
    assert [(one["setting"], one["rows"]) for one in facts["measured"]] == [
        ("ar", 1), ("diffusion:0.8", 1), ("ar", 2), ("diffusion:0.8", 2),
    ]  # fmt: skip
    assert facts["machine"]["dtype"] == "float32"
    assert {"device", "threads", "dtype", "torch", "commit", "weights_bytes", "peak_bytes"} <= set(facts["machine"])
    for words in ("× AR", "tokens/s", "denoiser", "1 row after 16 tokens", "2 rows after 16 tokens"):
        assert words in result.err


def test_prompts_of_files_are_measured(cli: Callable[..., Result], tmp_path: Path) -> None:
    """The first prompts of each file, one table for each; conversations are rendered with the chat template."""
    conversation = {"messages": [{"role": "user", "content": "Add: 12 + 34 =>"}]}
    names = {"sums": [{"prompt": f"Add: 1{i} + 23 =>"} for i in range(3)], "chat": [conversation] * 2}
    for name, lines in names.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    files = [word for name in names for word in ("--prompts", str(tmp_path / f"{name}.jsonl"))]
    shared = ["bench", "-n", "8", "--rounds", "1", "--batches", "2", "-s", "verified:draft_steps=1", *FP32]
    result = cli(*shared, *files[:2])
    measured = json.loads(result.out)["measured"]
    assert [(one["prompts"], one["rows"], one["equal"]) for one in measured] == [("sums", 1, 1.0)] * 2
    assert measured[0]["context"] == len(TwoTowerForCausalLM.from_pretrained(bundled_model()).tokenizer(
        "Add: 10 + 23 =>")["input_ids"])  # fmt: skip
    assert "sums: 1 row" in result.err
    assert_one_line_error(cli(*shared, *files[:2], "-b", "2"), "has 3 prompts, and --batches 2 of --rows 2 need 4")
    assert_one_line_error(cli(*shared, *files[2:]), "chat template")
    (tmp_path / "sums.jsonl").write_text('{"prompt": "Add"}\n{"prompt": 7}\n')
    assert_one_line_error(cli(*shared, *files[:2]), "line 2")


def test_bad_input_is_a_one_line_error(cli: Callable[..., Result]) -> None:
    assert_one_line_error(cli("bench", "-s", "quick"), "mode is 'quick'")
    assert_one_line_error(cli("bench", "-c", "100000", "-s", "ar", *FP32), "context window")
