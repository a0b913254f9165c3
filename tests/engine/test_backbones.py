"""Every family of backbones in every mode and on every path, in float64, against the oracle and against transformers.

The short form has the shapes of `CORE`, which have every kind of layer and cache, and one set of requests each. The
full form has every shape, all policies, and more prompts, blocks and tokens.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import oracle
import pytest
import torch
from backbone_models import MASK, initialised, some_text, trained
from decoding_goldens import METHODS, row_matches, row_of
from decoding_requests import POLICY_VALUES
from oracle_tower import Context, read
from tiny_backbones import CORE, FAMILY_NAMES, SHAPES, VOCAB, hf_model, in_float64, slow_but
from torch import Tensor

from twotower import LLM, GenerationParams, Request, TwoTowerForCausalLM, generate
from twotower.cache import sliding_window
from twotower.cache.hybrid_cache import TowerState
from twotower.cache.replica import DeviceTransfer, Replica
from twotower.decoding.output import Generation
from twotower.engine import core
from twotower.engine.drafting import Draft, DraftRequest
from twotower.engine.engine_options import EngineOptions
from twotower.model import towers

NAMES = tuple(SHAPES)
# With LongRoPE, the logits at a position depend on where the text ends: tests/model/test_long_rope.py.
STATIC_NAMES = tuple(name for name in NAMES if "longrope" not in name)
POLICIES = tuple(POLICY_VALUES)
BASE = some_text(90, seed=1)  # prompts are beginnings of one text, so that the prefix cache has hits
LONGEST_BLOCK = 30  # longer than every window of SHAPES
slow = pytest.mark.slow
FEW = ("ministral", "granitemoehybrid", "falcon_h1", "qwen3_next")


def window(name: str) -> int:
    """The smallest window of a model, or a length for models without windows."""
    return min(trained(name).spec.windows, default=16)


@pytest.fixture(autouse=True)
def _no_grad(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Also makes the slots of windows as small as possible, so that tokens move in them often."""
    monkeypatch.setattr(sliding_window, "SHORTEST_CHUNK", 1)
    with torch.no_grad():
        yield


# --- every mode against the oracle ----------------------------------------------------------------------------------


def asked(mode: str, prompt: int, **values: Any) -> Request:
    shared: dict[str, Any] = {"mode": mode, "max_new_tokens": 10, "mask_token_id": MASK}
    return Request(BASE[:prompt], GenerationParams.of(**(shared | values)))


def few_requests(name: str) -> list[Request]:
    """One or two requests of each mode, for the shapes of `CORE`; one for others.

    All shapes of `CORE` together have all policies, and blocks below and above windows.
    """
    place, near = CORE.index(name) if name in CORE else NAMES.index(name), window(name)
    policies = [POLICIES[(3 * place + i) % len(POLICIES)] for i in range(3)]
    values = [{"policy": policy, "policy_value": POLICY_VALUES[policy][1]} for policy in policies]
    sampled: dict[str, Any] = {"temperature": 0.8, "seed": 7, "top_k": 20, "top_p": 0.95}
    every_shape = [
        asked("ar", near + 6),
        asked("mock_ar", near - 1),
        asked("diffusion", near + 1, block_size=near, steps_per_block=4, **values[0]),
        asked("verified", near - 8, block_size=17, draft_steps=2, acceptance=0.05),
    ]
    if name not in CORE:
        return every_shape
    return [
        *every_shape,
        asked("ar", 1, **sampled),
        asked("diffusion", 1, block_size=8, steps_per_block=6, **values[1]),
        asked("diffusion", near - 4, block_size=LONGEST_BLOCK, steps_per_block=3, **values[2], **sampled),
        asked("verified", near + 6, block_size=5, draft_steps=1),
    ]


def all_requests(name: str) -> list[Request]:
    """Every mode and policy, greedy and sampled, with prompts around the window and blocks around the window."""
    rng, near = random.Random(NAMES.index(name)), window(name)
    # The oracle has one set of frequencies; model/test_long_rope.py has texts beyond the original length, which is 64.
    lengths = (1, 2, 7, near - 2, near - 1, near, near + 1, 33, 70 if name in STATIC_NAMES else 50)
    requests = []
    for greedy in (True, False):
        sampling: dict[str, Any] = {} if greedy else {"temperature": 0.8, "seed": rng.randrange(2**30)}
        for mode in ("ar", "mock_ar"):
            requests += [asked(mode, length, **sampling) for length in lengths]
        for policy, values in POLICY_VALUES.items():
            for size in (1, 8, near - 1, near, LONGEST_BLOCK):
                steps = rng.choice([1, 3, 6])
                rule = {"policy": policy, "policy_value": rng.choice(values)}
                requests.append(
                    asked("diffusion", rng.choice(lengths), block_size=size, steps_per_block=steps, **rule, **sampling)
                )
            rule["acceptance"] = rng.choice([1.0, 0.3, 0.05, 0.0])
            size, steps = rng.choice([2, 5, 17, near]), rng.choice([0, 1, 2])
            requests.append(
                asked("verified", rng.choice(lengths), block_size=size, draft_steps=steps, **rule, **sampling)
            )
    return requests


FORMS = [pytest.param(few_requests, id="short"), pytest.param(all_requests, id="full", marks=slow)]


def in_engine(model: TwoTowerForCausalLM, requests: Sequence[Request], rounds: int = 1, **given: Any) -> Any:
    """Runs requests together, in chunks of 8 prompt tokens → the results, and the tokens from the prefix cache."""
    with patch.object(core, "PROMPT_CHUNK", 8):
        llm = LLM(model, rows=3, length=90, block_size=LONGEST_BLOCK, options=EngineOptions(**given))
        for _ in range(rounds):
            results = llm.generate(requests)
        reused = llm.stats().reused_tokens
        llm.close()
    return results, reused


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", slow_but(CORE))
def test_requests_equal_the_oracle(name: str, form: Any) -> None:
    """Alone, and together in an engine, twice, so that prompts are in the prefix cache."""
    model, requests = trained(name), form(name)
    rows = [row_of(oracle.decode(model, list(request.prompt), request.params)) for request in requests]
    for request, row in zip(requests, rows, strict=True):
        (alone,) = generate(model, [request.prompt], request.params)
        assert row_matches(row_of(alone), row, 2e-6), request
    together, reused = in_engine(model, requests, rounds=2)
    assert reused > 32
    for request, row, found in zip(requests, rows, together, strict=True):
        assert row_matches(row_of(found), row, 2e-6), request


class Fault:
    """Forwards calls, and raises at one of them."""

    def __init__(self, real: Any, at: int) -> None:
        self.real, self.at, self.calls = real, at, 0

    def __call__(self, *args: Any, **given: Any) -> Any:
        self.calls += 1
        if self.calls == self.at:
            raise ValueError("injected")
        return self.real(*args, **given)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", slow_but(FEW))
def test_every_engine_gives_the_same_texts(name: str, form: Any) -> None:
    """A replica on another device, deterministic requests, exceptions in passes, and a memory for two texts."""
    model, requests = trained(name), form(name)
    expected = [result.tokens for result in in_engine(model, requests)[0]]
    with patch.object(model, "transfer", DeviceTransfer()):
        assert isinstance(model.reader(model.new_state(1, 1)), Replica)
        assert [result.tokens for result in in_engine(model, requests, rounds=2)[0]] == expected
    for part, at in (("extend", 12), ("denoise", 5)):
        fault = Fault(getattr(model, part), at)
        with patch.object(model, part, fault):
            found, _ = in_engine(model, requests)
        assert fault.calls > at
        assert [result.tokens for result in found] == expected
    exact = [request for request in requests if request.params.acceptance == 1.0]  # otherwise drafts change texts
    fixed = [replace(request, params=replace(request.params, deterministic=True)) for request in exact]
    wanted = [tokens for tokens, request in zip(expected, requests, strict=True) if request in exact]
    assert [result.tokens for result in in_engine(model, fixed)[0]] == wanted


@pytest.mark.proves("verified")
@pytest.mark.parametrize("name", slow_but(CORE))
def test_verified_equals_ar_whatever_the_draft(name: str) -> None:
    """Drafts with random errors: all lengths of accepted drafts, and rows of all lengths."""
    model = trained(name)
    prompts = [BASE[:length] for length in (1, 5, window(name) - 1, 33)]
    ar = generate(model, prompts, GenerationParams.of(mode="ar", max_new_tokens=48))
    texts = [prompt + result.tokens for prompt, result in zip(prompts, ar, strict=True)]
    rng, accepted = random.Random(0), set()

    def draft(requests: Sequence[DraftRequest]) -> list[Draft]:
        drafts = []
        for request in requests:
            right = texts[request.number][len(request.tokens) : len(request.tokens) + request.size]
            wrong = rng.randint(0, len(right))
            accepted.add(min(wrong, len(right)))
            drafts.append(Draft([token if i < wrong else 3 + token % 5 for i, token in enumerate(right)]))
        return drafts

    params = GenerationParams.of(mode="verified", max_new_tokens=48, block_size=17, draft_steps=1)
    llm = LLM(model, rows=3, length=90, block_size=17, options=EngineOptions(drafter=draft))
    found = llm.generate([Request(prompt, params) for prompt in prompts])
    assert [result.tokens for result in found] == [result.tokens for result in ar]
    assert len(accepted) > 8


# --- states ---------------------------------------------------------------------------------------------------------


def padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Ragged rows as tokens (B, S), padded with a token that changes results if it is read, and lengths (B,)."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[9] * (width - len(row))] for row in rows]), torch.tensor([len(row) for row in rows])


@contextmanager
def prefill_chunk(tokens: int) -> Iterator[None]:
    with patch.object(towers, "PREFILL_CHUNK", tokens):
        yield


def state_of(model: TwoTowerForCausalLM, rows: Sequence[Sequence[int]]) -> TowerState:
    state = model.new_state(len(rows), 4)
    model.prefill(*padded(rows), state)
    return state


@pytest.mark.parametrize("name", slow_but(CORE, STATIC_NAMES))
def test_prefill_in_chunks_gives_the_logits_of_one_pass(name: str) -> None:
    model = trained(name)
    rows = [BASE[:length] for length in (70, 1, window(name), 41, window(name) + 1)]
    whole = model(padded(rows)[0]).logits
    wanted = torch.stack([logits[len(row) - 1] for logits, row in zip(whole, rows, strict=True)])
    for chunk in (1, 3, 17, 64):
        with prefill_chunk(chunk):
            state = model.new_state(len(rows), 4)
            torch.testing.assert_close(model.prefill(*padded(rows), state), wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.proves("rollback")
@pytest.mark.parametrize(
    "kept", [pytest.param((0, 1, 9, 17), id="short"), pytest.param(range(18), id="full", marks=slow)]
)
@pytest.mark.parametrize("name", slow_but(CORE, STATIC_NAMES))
def test_rollback_at_every_length(name: str, kept: Sequence[int]) -> None:
    """Ragged rows read 17 tokens and keep some of them. Both towers then compute what they compute after a prefill."""
    model, near = trained(name), window(name)
    lengths = (0, 1, near - 17, near - 9, near - 2, near - 1, near, near + 1, 40, 64)
    rows = [some_text(max(length, 0), seed=length) for length in lengths]
    checks = [some_text(17, seed=100 + length) for length in lengths]
    with prefill_chunk(16):
        state = state_of(model, rows)
        logits = model.extend(torch.tensor(checks), state)
    read_state = state.clone()
    moved = [group.slots.window.first.any() for group in state.kv_groups if group.slots.window is not None]
    assert all(moved)
    whole = [row + check for row, check in zip(rows, checks, strict=True)]
    expected = model(padded(whole)[0]).logits
    for row, length in enumerate(map(len, rows)):
        torch.testing.assert_close(logits[row], expected[row, length : length + 17], rtol=1e-9, atol=1e-10)
    for count in kept:
        state = read_state.clone()
        lengths_now = torch.tensor([len(row) + (count + i) % 18 for i, row in enumerate(rows)])
        state.rollback(lengths_now)
        texts = [text[:length] for text, length in zip(whole, lengths_now.tolist(), strict=True)]
        assert_same(model, state, texts, block=near + 3 if count % 2 else 5)


def assert_same(model: TwoTowerForCausalLM, state: TowerState, texts: Sequence[list[int]], block: int) -> None:
    """Compares what both towers compute after a state and after these texts; the state then reads 3 tokens."""
    after = torch.tensor([some_text(3, seed=7 + row) for row in range(len(texts))])
    masks = torch.tensor([[*some_text(2, seed=row), *[MASK] * (block - 2)] for row in range(len(texts))])
    fresh, half = state_of(model, texts), torch.full((len(texts),), 0.5, dtype=torch.float64)
    for causal in (False, True):
        one, two = (model.denoise(masks, half, model.reader(each).view(), causal) for each in (state, fresh))
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)
    logits = model.extend(after, state)
    whole = model(padded([[*text, *more] for text, more in zip(texts, after.tolist(), strict=True)])[0]).logits
    for row, text in enumerate(texts):
        torch.testing.assert_close(logits[row], whole[row, len(text) : len(text) + 3], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", slow_but(CORE))
def test_blocks_of_all_sizes_after_all_contexts_equal_the_oracle(name: str) -> None:
    """Blocks smaller than, equal to and larger than the window, after texts of the window ± 1."""
    model, near = trained(name), window(name)
    assert model.denoiser is not None
    lengths = (0, 1, near - 2, near - 1, near, near + 1, 60)
    rows = [BASE[:length] for length in lengths]
    view = model.reader(state_of(model, rows)).view()
    pasts: list[Context | None] = [read(model.context, row)[1] if row else None for row in rows]
    for size in (1, near - 1, near, near + 1):
        block = some_text(size, seed=size)
        found = model.denoise(torch.tensor([block] * len(rows)), None, view)
        for row, past in enumerate(pasts):
            expected, _ = read(model.denoiser, block, past, causal=False)
            torch.testing.assert_close(found[row], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", slow_but(FAMILY_NAMES))
def test_a_denoiser_at_initialisation_is_the_ar_model(name: str) -> None:
    """A block of one token after the context of the tokens before it has the AR logits; so mock-AR is AR."""
    model = initialised(name)
    lengths = (1, 2, window(name), window(name) + 1, 60)
    rows = [BASE[:length] for length in lengths]
    state = state_of(model, [row[:-1] for row in rows])
    last = torch.tensor([row[-1:] for row in rows])
    found = model.denoise(last, None, model.reader(state).view())
    at_a_time = model.denoise(last, torch.linspace(0, 1, len(rows), dtype=torch.float64), model.reader(state).view())
    logits = model(padded(rows)[0]).logits
    for row, length in enumerate(lengths):
        torch.testing.assert_close(found[row, 0], logits[row, length - 1], rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(at_a_time[row, 0], logits[row, length - 1], rtol=1e-9, atol=1e-10)
    texts = [getattr(model, METHODS[mode])(rows, max_new_tokens=16) for mode in ("mock_ar", "ar")]
    assert torch.equal(*texts)


# --- transformers ---------------------------------------------------------------------------------------------------

PROMPTS = tuple(some_text(length, seed=length) for length in (1, 7, 33, 70))
MARGIN = 1e-3


@dataclass
class Found:
    """Positions where a text differs from transformers' argmax, and positions with a near tie of the best two."""

    wrong: int = 0
    near: int = 0
    positions: int = 0


def texts_of(model: TwoTowerForCausalLM, mode: str, way: str, new: int) -> list[Generation]:
    """Greedy texts after PROMPTS, in a ragged batch or in an engine whose second round has prefix cache hits."""
    params = GenerationParams.of(mode=mode, max_new_tokens=new, draft_steps=1 if mode == "verified" else None)
    if way == "batch":
        return generate(model, PROMPTS, params)
    with patch.object(core, "PROMPT_CHUNK", 16):
        llm = LLM(model, rows=3, length=120)
        llm.generate([Request(prompt, replace(params, max_new_tokens=1)) for prompt in PROMPTS])
        results: list[Generation] = llm.generate([Request(prompt, params) for prompt in PROMPTS])
        assert llm.stats().reused_tokens >= 3 * 16
        llm.close()
    return results


def compared(model: TwoTowerForCausalLM, theirs: Any, runs: Sequence[tuple[str, str]], new: int) -> Found:
    """Compares texts with the argmax of transformers' logits over the same text. runs: modes and ways."""
    found, known = Found(), {}
    for mode, way in runs:
        for prompt, result in zip(PROMPTS, texts_of(model, mode, way, new), strict=True):
            text = (*prompt, *result.tokens)
            if text not in known:
                known[text] = theirs(torch.tensor([text]), use_cache=False).logits[0, len(prompt) - 1 : -1].topk(2)
            values, best = known[text]
            near = values[:, 0] - values[:, 1] <= MARGIN
            wrong = best[:, 0] != torch.tensor(result.tokens)
            found.wrong += int((wrong & ~near).sum())
            found.near += int((wrong & near).sum())
            found.positions += len(near)
    return found


EVERY_RUN = [(mode, way) for mode in ("ar", "verified") for way in ("batch", "engine")]


@pytest.mark.proves("AR equal", "verified")
@pytest.mark.parametrize(
    ("exact_runs", "fp32_runs", "new"),
    [
        pytest.param([("ar", "engine"), ("verified", "batch")], [("ar", "batch")], 24, id="short"),
        pytest.param(EVERY_RUN, EVERY_RUN, 40, id="full", marks=slow),
    ],
)
@pytest.mark.parametrize("name", slow_but(FEW, STATIC_NAMES))
def test_texts_equal_transformers(name: str, exact_runs: Any, fp32_runs: Any, new: int) -> None:
    """float64: all tokens. fp32: logits within 1e-4 of their deviation, and all tokens without a near tie."""
    theirs = hf_model(name)
    ids = torch.tensor([BASE[:70]])
    expected = theirs(ids, use_cache=False).logits
    logits = initialised(name, torch.float32)(ids).logits
    assert (logits - expected).abs().max() <= 1e-4 * expected.std()
    found = compared(initialised(name, torch.float32), theirs, fp32_runs, new)
    assert found.wrong == 0
    assert found.near <= found.positions / 100, found
    model = initialised(name)  # made outside the block, in which conversions to fp32 give float64
    with in_float64(theirs) as exact:
        found = compared(model, exact, exact_runs, new)
    assert (found.wrong, found.near) == (0, 0)


def test_short_forms_have_every_policy_and_every_kind() -> None:
    requests = [request for name in CORE for request in few_requests(name)]
    assert {request.params.policy for request in requests} >= set(POLICIES)
    assert all(max(request.prompt) < VOCAB for request in requests)
