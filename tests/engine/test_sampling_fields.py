"""vLLM's sampling fields in the engine: equal to the oracle in float64, alone, in pairs and in mixed batches."""

from __future__ import annotations

import itertools
from typing import Any

import oracle
import pytest
import torch
from decoding_models import decoding_model
from tiny_backbones import two_tower

from twotower import LLM, GenerationParams, Request, TwoTowerForCausalLM, generate
from twotower.decoding.output import Generation
from twotower.errors import ArgumentError

EOS, NEW = 2, 11
PROMPTS = [[5], [6, 7, 8, 9, 5], [9, 10, 11, 12, 13, 14, 5, 5]]
FIELDS: dict[str, dict[str, Any]] = {
    "repetition_penalty": {"repetition_penalty": 1.7},
    "frequency_penalty": {"frequency_penalty": 1.1},
    "presence_penalty": {"presence_penalty": 1.6},
    "logit_bias": {"logit_bias": {5: 3.0, 6: -100, 4: 2.5}},
    "min_p": {"min_p": 0.2},
    "bad_words": {"bad_words": ["e", "ta", " the"]},
    "stop_token_ids": {"stop_token_ids": [7, 20]},
    "min_tokens": {"min_tokens": 9, "logit_bias": {EOS: 4.0}},
    "ignore_eos": {"ignore_eos": True, "logit_bias": {EOS: 4.0}},
    "stop": {"stop": ["e", "in"], "min_tokens": 6},
    "sampled": {"temperature": 0.9, "seed": 3, "top_k": 12},
}


def pairs() -> list[dict[str, Any]]:
    """Every field, and every pair of fields."""
    found = list(FIELDS.values())
    return found + [{**one, **other} for one, other in itertools.combinations(FIELDS.values(), 2)]


def params_of(mode: str, fields: dict[str, Any]) -> GenerationParams:
    shared: dict[str, Any] = {"max_new_tokens": NEW, "eos_token_id": EOS, "seed": 8, "block_size": 5}
    own = {"draft_steps": 1} if mode == "verified" else {}
    policy = {"policy": "top-k", "policy_value": 2} if mode in ("diffusion", "verified") else {}
    return GenerationParams.from_mapping({"mode": mode, **shared, **own, **policy, **fields})


def run(model: TwoTowerForCausalLM, params: list[GenerationParams]) -> list[Generation]:
    """Runs requests with these parameters together, with the prompts in turn."""
    requests = [Request(PROMPTS[place % 3], own) for place, own in enumerate(params)]
    return LLM(model, rows=8, length=48).generate(requests)


def facts(result: Any) -> tuple[Any, ...]:
    return result.tokens, result.text, result.finish_reason


@pytest.mark.parametrize("mode", ["ar", "mock_ar"])
@torch.no_grad()
def test_every_field_and_pair_is_that_of_a_plain_loop(mode: str) -> None:
    """Verified text is AR's, whatever its drafts, in the same batch."""
    model = decoding_model("agreeing", torch.float64)
    every = pairs() if mode == "ar" else pairs()[:24]
    params = [params_of(mode, fields) for fields in every]
    plain = [oracle.decode(model, PROMPTS[place % 3], own) for place, own in enumerate(params)]
    expected = [facts(result) for result in plain]
    others = [params_of("verified", fields) for fields in pairs()] if mode == "ar" else []
    found = run(model, params + others)
    assert [facts(result) for result in found[: len(params)]] == expected
    if others:
        # The prompts in turn, as for AR: the number of requests is a multiple of 3.
        assert len(params) % 3 == 0
        assert [facts(result) for result in found[len(params) :]] == expected
        assert sum(result.accepted for result in found[len(params) :]) > 20
        free = [facts(result) for result in run(model, [params_of(mode, {})] * len(FIELDS))]
        same = [name for name, text, own in zip(FIELDS, free, expected, strict=False) if text == own]
        assert same == ["min_p"]  # at temperature 0 it has no effect; every other field changes the text


@pytest.mark.parametrize("name", ["agreeing", "biased+shift", "biased+first"])
@torch.no_grad()
def test_diffusion_counts_committed_tokens(name: str) -> None:
    """Tokens of the text and of the open block. Stop tokens, min_tokens and ignore_eos hold by position."""
    model = decoding_model(name, torch.float64)
    every = [fields for fields in pairs() if "bad_words" not in fields]
    every = every if name == "agreeing" else every[:10]
    params = [params_of("diffusion", {"temperature": 0.7, **fields}) for fields in every]
    plain = [oracle.decode(model, PROMPTS[place % 3], own) for place, own in enumerate(params)]
    for own, result, row in zip(params, run(model, params), plain, strict=True):
        assert facts(result) == facts(row), own
        assert result.confidence == pytest.approx(row.confidence, abs=2e-6), own


@torch.no_grad()
def test_drafts_are_made_with_the_rules_too() -> None:
    """The counts of verified decoding, and texts with relaxed acceptance, are the oracle's."""
    model = decoding_model("agreeing", torch.float64)
    params = [
        params_of("verified", {**fields, "acceptance": acceptance})
        for fields in FIELDS.values()
        for acceptance in (1.0, 0.0)
        if not ("bad_words" in fields and acceptance == 0)  # drafts are made without the words
    ]
    plain = [oracle.decode(model, PROMPTS[place % 3], own) for place, own in enumerate(params)]
    for own, result, row in zip(params, run(model, params), plain, strict=True):
        assert facts(result) == facts(row), own
        assert (result.drafted, result.accepted) == (row.drafted, row.accepted), own


@pytest.mark.parametrize("draft_rank", [None, 2])
@torch.no_grad()
def test_rounds_of_one_pass_with_adapters(draft_rank: int | None) -> None:
    model = two_tower("llama", torch.float64, rank=3, draft_rank=draft_rank)
    model.tokenizer = None
    every = [fields for fields in pairs() if "bad_words" not in fields and "stop" not in fields]
    every = every[: len(every) if draft_rank is None else 12]
    expected = run(model, [params_of("ar", fields) for fields in every])
    alone = generate(model, [PROMPTS[1]], params_of("ar", every[1]))
    assert facts(alone[0]) == facts(expected[1])
    verified = run(model, [params_of("verified", {**fields, "draft_steps": 1}) for fields in every])
    assert [facts(result) for result in verified] == [facts(result) for result in expected]
    # With the threshold 1 no drafted token is final, so diffusion is AR.
    strict = {"policy": "threshold", "policy_value": 1.0}
    diffusion = run(model, [params_of("diffusion", {**fields, **strict}) for fields in every])
    assert [facts(result) for result in diffusion] == [facts(result) for result in expected]
    loose = {"policy": "threshold", "policy_value": 0.0, "logit_bias": {EOS: 60.0, 9: -100.0}, "min_tokens": 6}
    for result in run(model, [params_of("diffusion", loose)] * 3):
        assert result.tokens[6] == EOS
        assert EOS not in result.tokens[:6]
        assert 9 not in result.tokens


@torch.no_grad()
def test_logprobs_are_those_before_the_rules() -> None:
    model = decoding_model("agreeing", torch.float64)
    fields = {"repetition_penalty": 2.0, "logit_bias": {5: 3.0}, "bad_words": ["e"]}
    for mode in ("ar", "verified"):
        (result,) = LLM(model, rows=1, length=48).generate([Request(PROMPTS[1], params_of(mode, fields), logprobs=2)])
        text = [*PROMPTS[1], *result.tokens]
        logits, _ = oracle.read(model.context, text)
        exact = logits.log_softmax(-1)
        for place, one in enumerate(result.logprobs):
            at = len(PROMPTS[1]) - 1 + place
            assert one.logprob == pytest.approx(float(exact[at, one.token]), abs=1e-8)
            assert one.top[0][1] == pytest.approx(float(exact[at].max()), abs=1e-8)
        mean = sum(one.logprob for one in result.logprobs) / len(result.tokens)
        assert result.mean_logprob == pytest.approx(mean)


def test_requests_without_fields_keep_the_compiled_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a row whose rules are active takes the other passes; min_tokens, only at the beginning."""
    from twotower.engine import changed_logits

    model = decoding_model("agreeing", torch.float32)
    calls = []
    monkeypatch.setattr(changed_logits, "upcast", lambda logits: calls.append(len(logits)) or logits)
    for fields in ({}, {"ignore_eos": True}, {"stop_token_ids": [7]}, {"min_p": 0.3}, {"skip_special_tokens": False}):
        run(model, [params_of("ar", fields), params_of("diffusion", fields), params_of("verified", fields)])
    assert not calls
    run(model, [params_of("ar", {"min_tokens": 4, "max_new_tokens": 12, "logit_bias": {}})])
    assert len(calls) == 4


def test_special_tokens_and_stop_tokens_in_the_text() -> None:
    model = decoding_model("agreeing", torch.float64)
    biased = {"logit_bias": {EOS: 100.0, 1: 99.0}, "max_new_tokens": 3}
    texts = {}
    for name, fields in {
        "eos": {},
        "ignored": {"ignore_eos": True},
        "shown": {"ignore_eos": True, "skip_special_tokens": False},
        "stopped": {"ignore_eos": True, "skip_special_tokens": False, "stop_token_ids": [EOS]},
    }.items():
        (result,) = run(model, [params_of("ar", {**biased, **fields})])
        texts[name] = result.finish_reason, result.text, len(result.tokens)
    assert texts == {
        "eos": ("eos", "", 1),
        "ignored": ("length", "", 3),
        "shown": ("length", "</s></s></s>", 3),
        "stopped": ("stop", "", 1),
    }


def test_a_grammar_counts_before_min_tokens_and_bad_words() -> None:
    pytest.importorskip("llguidance")
    from twotower import Constraint

    model = decoding_model("agreeing", torch.float64)
    constraint = Constraint(model.tokenizer, regex="(e|t)ain")
    for mode in ("ar", "verified"):
        params = params_of(mode, {"min_tokens": 10, "bad_words": ["e", "n"], "repetition_penalty": 1.3})
        (result,) = LLM(model, rows=1, length=48).generate([Request(PROMPTS[1], params, constraint=constraint)])
        assert (result.text, result.finish_reason) in {("tain", "stop"), ("tain", "eos")}, result


@pytest.mark.parametrize(("mode", "word"), [("diffusion", "e"), ("auto", "e"), ("ar", "\x00")])
def test_bad_words_that_cannot_be_forbidden(mode: str, word: str) -> None:
    """In diffusion and auto; or no token of this tokenizer has a part of the word."""
    with pytest.raises(ArgumentError, match="bad_words") as caught:
        generate(decoding_model("agreeing", torch.float64), [[5]], params_of("ar", {"bad_words": [word], "mode": mode}))
    assert caught.value.param == "bad_words"
