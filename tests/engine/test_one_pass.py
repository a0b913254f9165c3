"""Models with adapters in the engine: verified text is AR's, and one pass checks a draft and makes the next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from test_recovery import Fault
from tiny_backbones import slow_but, two_tower

from twotower import TwoTowerForCausalLM
from twotower.decoding.output import Generation, StepEvent
from twotower.decoding.params import GenerationParams
from twotower.decoding.sampling import AR_TOKEN, Sampling, sample
from twotower.engine import context_step, one_pass
from twotower.engine.generation import generate
from twotower.engine.llm import LLM
from twotower.engine.scheduled import ScheduledTokens
from twotower.engine.sequence import Request

NAMES = slow_but(("nemotron_h", "llama", "gemma2", "qwen3_next"))
PROMPTS = [[5], [6, 7, 8], [9, 10, 11, 12, 13, 14, 15, 16, 17, 18], [20, 21] * 9]
NEW, MASK, EOS = 24, 3, 2


def model_of(name: str, dtype: torch.dtype = torch.float64, draft_rank: int | None = None) -> TwoTowerForCausalLM:
    return two_tower(name, dtype, rank=3, draft_rank=draft_rank)


def run(model: TwoTowerForCausalLM, prompts: list[list[int]] = PROMPTS, **options: Any) -> list[Generation]:
    settings: dict[str, Any] = {"max_new_tokens": NEW, "eos_token_id": EOS, "block_size": 6} | options
    return generate(model, prompts, GenerationParams.of(**settings))


def tokens(rows: Sequence[Generation]) -> list[list[int]]:
    return [row.tokens for row in rows]


def draft_from(texts: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts are the rest of these texts, with every fifth token wrong, as far as there are masks."""

    def rest(
        entry: ScheduledTokens, new: Sequence[int], sure: Sequence[float], accepted: int
    ) -> tuple[Sequence[int], Sequence[float]]:
        if accepted < len(entry.tokens) - 1:
            return (), ()
        output = entry.sequence.output
        done = len(output.progress.tokens) + accepted + 1
        following = texts[output.row][done : done + entry.masks]
        drafted = [token if (done + place) % 5 else 4 for place, token in enumerate(following)]
        return drafted, [0.9] * len(drafted)

    monkeypatch.setattr(one_pass, "candidates", rest)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", [{}, {"temperature": 0.8, "seed": 5}], ids=["greedy", "sampled"])
def test_verified_text_is_that_of_ar(name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(name)
    expected = run(model, mode="ar", **options)
    own = run(model, mode="verified", draft_steps=1, **options)
    assert tokens(own) == tokens(expected)
    assert sum(row.drafted for row in own)
    draft_from(tokens(expected), monkeypatch)
    for block_size in (2, 6, 16):
        found = run(model, mode="verified", draft_steps=1, block_size=block_size, **options)
        assert tokens(found) == tokens(expected)
        assert [row.finish_reason for row in found] == [row.finish_reason for row in expected]
        for row in found:
            assert row.denoiser_passes == 0
            assert row.context_passes + row.accepted >= len(row.tokens) > row.context_passes
        assert sum(row.rejected for row in found)
    adaptive = run(model, mode="verified", **options)
    assert tokens(adaptive) == tokens(expected)


@pytest.mark.parametrize("name", NAMES)
def test_diffusion_with_threshold_1_is_ar_and_a_lower_one_needs_fewer_passes(name: str) -> None:
    model = model_of(name)
    expected = run(model, mode="ar")
    exact = run(model, mode="diffusion", confidence_threshold=1.0)
    assert tokens(exact) == tokens(expected)
    assert tokens(run(model, mode="mock_ar")) == tokens(expected)
    fast = run(model, mode="diffusion", confidence_threshold=0.1)
    assert sum(row.context_passes for row in fast) < sum(row.context_passes for row in exact)
    assert [row.tokens[0] for row in fast] == [row.tokens[0] for row in expected]


@torch.no_grad()
def naive_diffusion(
    model: TwoTowerForCausalLM, prompt: list[int], size: int, threshold: float, fixed: bool = False
) -> list[int]:
    """Diffusion without a kept state: every pass reads the text anew, all but what the last pass made final first.

    fixed: every pass has `size` positions. Otherwise masks pay by the share of tokens that masks brought so far.
    """
    text, read, passes = list(prompt), len(prompt) - 1, 0
    while len(text) < len(prompt) + NEW and EOS not in text[len(prompt) :]:
        block, new = text[read:], len(text) - len(prompt)
        prefix, share, masks = len(block), (8 + new - passes) / (10 + new), 1
        while masks < size and share ** (masks + 1) > 0.2:
            masks += 1
        masks = size - prefix if fixed else min(masks, size - prefix)
        block += [MASK] * max(min(masks, NEW - new - 1), 0)
        passes += 1
        state = model.new_state(1, len(text) + size)
        if read:
            model.extend(torch.tensor([text[:read]]), state)
        logits = model.extend(torch.tensor([block]), state, prefix=torch.tensor([prefix]))
        assert logits is not None
        logits[0, prefix:, MASK] = -torch.inf
        read = len(text)
        text.append(int(logits[0, prefix - 1].argmax()))
        head = model.context.draft_head
        for row in logits[0, prefix:]:
            if head is not None:
                row += head.following @ head.previous[text[-1]]
            sure, own = row.softmax(-1).max(-1)
            if not sure > threshold or text[-1] == EOS:
                break
            text.append(int(own))
    return text[len(prompt) :]


@pytest.mark.parametrize("name", ["nemotron_h", "llama"])
@pytest.mark.parametrize("size", [1, 2, 6, 30])
@pytest.mark.parametrize("draft_rank", [None, 5], ids=["plain", "draft head"])
def test_diffusion_is_that_of_a_loop_without_a_state(name: str, size: int, draft_rank: int | None) -> None:
    model = model_of(name, draft_rank=draft_rank)
    found = run(model, mode="diffusion", confidence_threshold=0.1, block_size=size)
    assert tokens(found) == [naive_diffusion(model, prompt, size, 0.1) for prompt in PROMPTS]
    assert size == 1 or sum(row.context_passes for row in found) < sum(len(row.tokens) for row in found)
    alone = [run(model, [prompt], mode="diffusion", confidence_threshold=0.1, block_size=size)[0] for prompt in PROMPTS]
    assert tokens(alone) == tokens(found)


def test_a_deterministic_pass_of_diffusion_has_the_width_of_a_block() -> None:
    model, options = model_of("llama"), {"mode": "diffusion", "confidence_threshold": 0.1, "block_size": 12}
    found = run(model, deterministic=True, **options)
    assert tokens(found) == [naive_diffusion(model, prompt, 12, 0.1, fixed=True) for prompt in PROMPTS]
    assert tokens(found) != tokens(run(model, **options))


def test_log_probabilities_do_not_change_a_text_of_diffusion() -> None:
    """Except for the last token, which AR may choose in the place of a mask."""
    model = model_of("llama")
    params = GenerationParams.of(mode="diffusion", max_new_tokens=NEW, block_size=12, confidence_threshold=0.05)
    plain, waiting = (
        LLM(model, rows=2, length=64).generate([Request(prompt, params, logprobs=count) for prompt in PROMPTS])
        for count in (None, 1)
    )
    assert [row.tokens[:-1] for row in waiting] == [row.tokens[:-1] for row in plain]
    assert sum(row.context_passes for row in plain) < len(PROMPTS) * NEW


@pytest.mark.parametrize("at", [2, 3, 5])
def test_an_exception_does_not_change_the_text_of_diffusion(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("nemotron_h")
    params = GenerationParams.of(mode="diffusion", max_new_tokens=NEW, block_size=12, confidence_threshold=0.05)
    requests = [Request(prompt, params) for prompt in PROMPTS]
    expected = LLM(model, rows=4, length=64).generate(requests)
    failing = Fault(context_step.launch, at)
    monkeypatch.setattr(context_step, "launch", failing)
    found = LLM(model, rows=4, length=64).generate(requests)
    assert failing.calls > at
    assert tokens(found) == tokens(expected)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.8, "seed": 5}], ids=["greedy", "sampled"])
def test_verified_text_with_a_draft_head_is_that_of_ar(options: dict[str, Any]) -> None:
    plain, model = model_of("nemotron_h"), model_of("nemotron_h", draft_rank=5)
    assert model.context.draft_head is not None
    plain.load_state_dict({name: t for name, t in model.state_dict().items() if "draft_head" not in name})
    expected = run(plain, mode="ar", **options)
    assert tokens(run(model, mode="ar", **options)) == tokens(expected)
    drafts = []
    for own in (plain, model):
        found = run(own, mode="verified", draft_steps=1, **options)
        assert tokens(found) == tokens(expected)
        alone = [run(own, [prompt], mode="verified", draft_steps=1, **options)[0] for prompt in PROMPTS]
        if not options:  # a seed belongs to a row
            assert [(row.tokens, row.accepted, row.drafted) for row in alone] == [
                (row.tokens, row.accepted, row.drafted) for row in found
            ]
        drafts.append([(row.accepted, row.drafted) for row in found])
    assert drafts[0] != drafts[1]


@torch.no_grad()
def test_the_noise_of_a_drafted_token_is_that_of_ar() -> None:
    """Where all other logits are 0, the draft is what AR with the terms of the head as logits would write."""
    model = model_of("llama", draft_rank=5)
    head = model.context.draft_head
    assert head is not None
    model.context.norm_f.weight.zero_()  # all logits are 0, and AR's tokens are noise
    params = GenerationParams.of(
        mode="diffusion", max_new_tokens=8, eos_token_id=EOS, block_size=8, confidence_threshold=0.0, temperature=1.0,
        seed=3,
    )  # fmt: skip
    (found,) = generate(model, [[5, 6]], params)
    expected = [found.tokens[0]]
    barred, seeds = torch.tensor([MASK]), torch.tensor(params.row_seeds(1))
    for place in range(1, 8):
        logits = (head.following @ head.previous[expected[-1]]).index_fill(0, barred, -torch.inf)
        sampling = Sampling(seeds=seeds, temperature=1.0)
        position = torch.tensor([[2 + place]])
        expected.append(int(sample(logits[None, None], sampling, position, AR_TOKEN)))
    assert found.tokens == expected[: len(found.tokens)]
    assert len(found.tokens) > 3


@pytest.mark.parametrize("mode", ["verified", "diffusion"])
def test_a_watched_request_shows_the_draft_of_each_pass(mode: str) -> None:
    model = model_of("llama")
    params = GenerationParams.of(
        mode=mode, max_new_tokens=NEW, eos_token_id=EOS, block_size=6, confidence_threshold=0.02,
        **({"draft_steps": 1} if mode == "verified" else {}),
    )  # fmt: skip
    engine = LLM(model, rows=2, length=64, block_size=6)
    (alone,) = engine.generate([Request(PROMPTS[2], params)])
    text: list[int] = []
    shown: list[StepEvent] = []
    drafts = 0
    for event in engine.stream(Request(PROMPTS[2], params, watched=True)):
        if isinstance(event, StepEvent):
            shown.append(event)
            assert event.start == len(text) - (mode == "verified")
            assert len(event.tokens) == len(event.masked) == len(event.confidence) <= 6
            assert not event.masked[0]
            assert mode == "diffusion" or event.tokens[0] == text[-1]
            continue
        text += event.tokens
        if not shown:
            continue
        known = shown[-1].tokens[: shown[-1].masked.count(False)]
        if mode == "diffusion":
            assert event.tokens == known[: len(event.tokens)]
        else:
            assert list(event.draft) == known[1 : 1 + len(event.draft)]
        drafts += len(known) > 1
        shown.clear()
    assert text == alone.tokens
    assert drafts
