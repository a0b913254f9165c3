"""Any drafts through the engine's `drafter`: the text equals AR's, and the accepted tokens are known."""

from __future__ import annotations

import copy
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import oracle
import pytest
import torch
from conftest import EVERY_KIND, build_random_model
from decoding_goldens import row_matches, row_of
from decoding_models import decoding_model
from test_verified import FULL, SAMPLINGS, _texts, full_prompts, lead, prompts

from twotower import LLM, Generation, GenerationParams, Request, TwoTowerForCausalLM, bundled_model, generate
from twotower.engine.drafting import Draft, Drafter, DraftRequest
from twotower.engine.engine_options import EngineOptions
from twotower.errors import ArgumentError


def run(
    model: TwoTowerForCausalLM,
    texts: Sequence[Sequence[int]],
    drafter: Drafter | None = None,
    mode: str = "verified",
    rows: int = 4,
    **asked: Any,
) -> list[Generation]:
    """Results of a new engine, which numbers the requests from 0. `seed`: one for all or one for each."""
    params = GenerationParams.of(mode=mode, **asked)
    seeds = params.row_seeds(len(texts)) if params.seed is not None else [None] * len(texts)
    requests = [Request(text, replace(params, seed=seed)) for text, seed in zip(texts, seeds, strict=True)]
    length = max(map(len, texts)) + params.max_new_tokens
    llm = LLM(model, rows=rows, length=length, block_size=params.block_size, options=EngineOptions(drafter=drafter))
    return llm.generate(requests)


@dataclass
class Spoilt:
    """A drafter with the AR model's continuations, except for one token of each draft."""

    texts: Sequence[Sequence[int]]  # prompt and continuation of each request
    limits: Sequence[int]  # tokens of each text, at most
    wrong: Callable[[int, int], int]  # (round, request) → the index of the wrong token
    strict: bool = True  # whether to check the text so far
    rounds: Counter[int] = field(default_factory=Counter)
    kept: list[int] = field(default_factory=list)  # expected numbers of accepted tokens

    def __call__(self, requests: Sequence[DraftRequest]) -> list[Draft]:
        return [self._draft(request) for request in requests]

    def _draft(self, request: DraftRequest) -> Draft:
        row, at = request.number, len(request.tokens)
        text = list(self.texts[row])
        assert not self.strict or list(request.tokens) == text[:at]
        right = (text[at : at + request.size] + [5] * request.size)[: request.size]
        wrong = self.wrong(self.rounds[row], row)
        self.rounds[row] += 1
        self.kept.append(min(wrong, request.size, self.limits[row] - at - 1))
        return Draft([(token + 1) % 64 if i == wrong else token for i, token in enumerate(right)], passes=request.steps)


def spoilt(texts: Sequence[Sequence[int]], whole: Sequence[Generation], new: int, wrong: Any, **given: Any) -> Spoilt:
    """Makes a Spoilt drafter of prompts, AR's continuations and the requested lengths."""
    right = [[*text, *result.tokens] for text, result in zip(texts, whole, strict=True)]
    return Spoilt(right, [len(text) + new for text in texts], wrong, **given)


SHORT = {("M", "sampled"), ("*", "filtered"), ("ME*-", "greedy"), *((EVERY_KIND, name) for name in SAMPLINGS)}


@pytest.mark.parametrize(
    ("pattern", "sampling"),
    [
        pytest.param(*case, marks=() if case in SHORT else pytest.mark.slow)
        for case in product(["M", "*", "ME*-", EVERY_KIND], SAMPLINGS)
    ],
)
def test_equal_to_ar_whatever_the_draft(pattern: str, sampling: str) -> None:
    """In float64, with rows of different lengths, the denoiser's drafts, and drafts right up to any token."""
    model = build_random_model(pattern, dtype=torch.float64)
    texts = prompts(10, 30)
    whole = run(model, texts, mode="ar", max_new_tokens=40, **SAMPLINGS[sampling])
    asked = SAMPLINGS[sampling] | {"max_new_tokens": 26, "eos_token_id": [whole[0].tokens[9], whole[1].tokens[17]]}
    expected = [result.tokens for result in run(model, texts, mode="ar", **asked)]
    assert len({len(tokens) for tokens in expected}) > 1
    asked["block_size"] = 8
    for steps in (None, 1, 3):
        found = run(model, texts, draft_steps=steps, **asked)
        assert [result.tokens for result in found] == expected, steps
    for name, wrong in {"never": lambda at, row: 8, "all": lambda at, row: (3 * at + row) % 8}.items():
        drafts = spoilt(texts, whole, 26, wrong)
        found = run(model, texts, drafts, draft_steps=1, **asked)
        assert [result.tokens for result in found] == expected, name
        assert sum(result.accepted for result in found) == sum(drafts.kept)
        assert sum(result.denoiser_passes for result in found) == len(drafts.kept)
    assert set(drafts.kept) == set(range(8))


@pytest.mark.parametrize("new", [1, 2, 7, 8, 9, 16, 17])
def test_any_length(new: int) -> None:
    model = build_random_model("M*", dtype=torch.float64)
    texts = prompts(3, 9)
    expected = run(model, texts, mode="ar", max_new_tokens=new)
    whole = run(model, texts, mode="ar", max_new_tokens=new + 8)
    drafts = spoilt(texts, whole, new, lambda at, row: 8)
    found = run(model, texts, drafts, max_new_tokens=new, block_size=8, draft_steps=1)
    assert [a.tokens for a in found] == [b.tokens for b in expected]
    assert {a.context_passes for a in found} == {math.ceil(new / 8)}
    assert {a.finish_reason for a in found} == {"length"}


def test_the_joint_distribution_is_that_of_ar() -> None:
    """Many seeds and random drafts of three tokens with two choices each, compared with all eight probabilities."""
    model = build_random_model("M*", dtype=torch.float64)
    prompt, seeds = [9, 10, 11], 4000
    expected = _texts(model, prompt, 3)
    rng = random.Random(1)
    texts = [[*prompt, *rng.choice(list(expected)), 0, 0, 0] for _ in range(seeds)]
    drafts = Spoilt(texts, [6] * seeds, lambda at, row: 8, strict=False)
    asked = {"max_new_tokens": 3, "temperature": 1.0, "top_k": 2, "seed": list(range(seeds))}
    found = run(model, [prompt] * seeds, drafts, rows=500, block_size=4, draft_steps=1, **asked)
    counts = Counter(tuple(result.tokens) for result in found)
    assert set(counts) <= set(expected)
    chi = sum((counts[text] - seeds * p) ** 2 / (seeds * p) for text, p in expected.items())
    assert chi < 24.3  # 7 degrees of freedom, 0.1 %
    assert seeds / 2 < sum(result.accepted for result in found) < 3 * seeds / 2


# --- against the oracle ---------------------------------------------------------------------------------------------


@dataclass
class Guesses:
    """Drafts of any length with tokens of the AR model's text and random ones. Equal texts get equal drafts."""

    texts: Sequence[Sequence[int]]
    passes: int

    def guess(self, row: int, tokens: Sequence[int], size: int) -> Draft:
        rng = random.Random(1000 * row + len(tokens))
        right = list(self.texts[row][len(tokens) : len(tokens) + rng.randint(0, size)])
        guessed = [token if rng.random() < 0.7 else rng.randrange(4, 64) for token in right]
        return Draft(guessed, [rng.randrange(self.passes) for _ in guessed], self.passes)

    def __call__(self, requests: Sequence[DraftRequest]) -> list[Draft]:
        return [self.guess(request.number, request.tokens, request.size) for request in requests]

    def of_row(self, row: int) -> oracle.Drafter:
        """For the oracle."""

        def draft(text: list[int], size: int) -> oracle.Block:
            made = self.guess(row, text, size - 1)
            own = [text[-1], *made.tokens]
            return oracle.Block(own, [0, *made.committed_at], [0.0] * len(own), made.passes)

        return draft


@pytest.mark.parametrize("acceptance", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("name", ["biased", "every-kind"])
@torch.no_grad()
def test_a_given_draft_counts_as_in_the_oracle(name: str, acceptance: float) -> None:
    """Tokens, rounds, and drafted, accepted and rejected counts are equal, for drafts of all lengths from 0."""
    model = decoding_model(name, torch.float64)
    texts = prompts(6, 20, seed=3)
    asked: dict[str, Any] = {"max_new_tokens": 20, "temperature": 0.8, "seed": 5, "eos_token_id": 9}
    whole = run(model, texts, mode="ar", **(asked | {"eos_token_id": None, "max_new_tokens": 30}))
    right = [[*text, *result.tokens] for text, result in zip(texts, whole, strict=True)]
    guesses = Guesses(right, passes=2)
    params = GenerationParams.of(mode="verified", block_size=8, draft_steps=2, acceptance=acceptance, **asked)
    results = LLM(model, rows=3, length=64, options=EngineOptions(drafter=guesses)).generate(
        [Request(text, params) for text in texts]
    )
    for row, found in enumerate(results):
        expected = oracle.decode(model, texts[row], params, guesses.of_row(row))
        assert row_matches(row_of(found), row_of(expected), 2e-6), (row, expected, found)
    assert sum(found.accepted for found in results) > 0
    assert (sum(found.rejected for found in results) > 0) == (acceptance > 0)


def test_other_modes_do_not_ask_it() -> None:
    """Beside requests with drafts, diffusion gives its result alone."""
    model = build_random_model(EVERY_KIND, dtype=torch.float64)
    diffusion = Request([5, 6, 7], GenerationParams.of(max_new_tokens=20, confidence_threshold=0.2))
    drafted = Request([5, 6, 7], GenerationParams.of(mode="verified", max_new_tokens=20, draft_steps=1))
    asked: list[int] = []

    def drafter(requests: Sequence[DraftRequest]) -> list[Draft]:
        asked.extend(request.number for request in requests)
        return [Draft([9] * request.size) for request in requests]

    first, second = LLM(model, rows=2, length=64, options=EngineOptions(drafter=drafter)).generate([diffusion, drafted])
    (alone,) = generate(model, [[5, 6, 7]], diffusion.params)
    assert (first.tokens, first.denoiser_passes) == (alone.tokens, alone.denoiser_passes)
    assert second.tokens == run(model, [[5, 6, 7]], mode="ar", max_new_tokens=20)[0].tokens
    assert set(asked) == {1}  # the second request


@pytest.mark.parametrize(
    ("drafts", "message"),
    [([Draft([5] * 8)], "the drafter gave 8 tokens; a draft may have 7"), ([], "gave 0 drafts for 1 texts")],
)
def test_invalid_drafts_are_errors(drafts: list[Draft], message: str) -> None:
    """They end their request, or raise with `raise_errors`."""
    model = build_random_model("M*", dtype=torch.float64)
    (result,) = run(model, [[5, 6]], lambda requests: drafts, block_size=8, draft_steps=1, max_new_tokens=9)
    assert result.finish_reason == "error"
    assert message in result.error
    params = GenerationParams.of(mode="verified", block_size=8, draft_steps=1, max_new_tokens=9)
    options = EngineOptions(drafter=lambda requests: drafts, raise_errors=True)
    with pytest.raises(ArgumentError, match=message):
        LLM(model, rows=1, length=32, options=options).generate([Request([5, 6], params)])


# --- in full --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("sampling", ["greedy", "sampled"])
@pytest.mark.parametrize("kind", ["random", "bundled"])
def test_equal_to_ar_in_full(kind: str, sampling: str) -> None:
    """Equal in float64. In fp32 a row may differ only at a near tie in float64; in bf16 the rate is printed."""
    count, new = FULL
    if kind == "bundled":
        exact = TwoTowerForCausalLM.from_pretrained(bundled_model("small"), dtype="float64")
        texts = [exact.tokenizer(text)["input_ids"] for text in full_prompts(count)]
    else:
        exact = build_random_model(EVERY_KIND, dtype=torch.float64)
        texts = prompts(count, 60)
    asked: dict[str, Any] = {"max_new_tokens": new}
    asked |= {"temperature": 1.0, "seed": 11} if sampling == "sampled" else {}
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        model = copy.deepcopy(exact).to(dtype)
        apart, worst, kept = 0, 0.0, 0
        asking = texts[: count // 5] if dtype == torch.bfloat16 else texts  # only the rate is printed
        expected = run(model, asking, mode="ar", rows=50, **asked)
        right = run(model, asking, mode="ar", rows=50, **(asked | {"max_new_tokens": new + 16}))
        drafts = spoilt(asking, right, new, lambda at, row: (5 * at + row) % 16, strict=dtype == torch.float64)
        for steps, drafter in ((1, None), (None, None), (1, drafts)):
            found = run(model, asking, drafter, rows=50, draft_steps=steps, **asked)
            kept += sum(result.accepted for result in found)
            for text, a, b in zip(asking, found, expected, strict=True):
                if a.tokens == b.tokens:
                    continue
                apart += 1
                at = next(i for i, (x, y) in enumerate(zip(a.tokens, b.tokens, strict=True)) if x != y)
                before = text + a.tokens[:at]
                margin = lead(exact, before, a.tokens[at], b.tokens[at], 11, asked.get("temperature", 0.0))
                worst = max(worst, margin)
        if dtype == torch.float64:
            assert apart == 0
            assert sum(result.accepted for result in found) == sum(drafts.kept)
        elif dtype == torch.float32:
            assert worst < 1e-4
        print(f"{kind}, {sampling}, {dtype}: {apart} of {3 * len(asking)} rows differ, margin {worst:.1e}, {kept} kept")
