"""Denoisers with shifted predictions, prefix-causal attention, AR's first tokens and adapters: equal to the oracle."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import oracle
import pytest
import torch
from decoding_goldens import Golden, Row, depends_on_timing, params_of, row_matches, row_of, run_method
from decoding_models import CHOICES, HEADS, KINDS, decoding_model
from decoding_requests import random_request
from test_oracle import MODES, expected
from torch import Tensor

from twotower import LLM, GenerationParams, Request, TwoTowerForCausalLM
from twotower.decoding.output import BlockEvent, StepEvent
from twotower.decoding.unmasking import POLICIES

LONGEST, MOST_NEW = 37, 24
SHIFTED = ["shift", "shift-prefix", "everywhere-shift", "head-shift"]
AFTER_TEXT = [*SHIFTED, "first", "head-first"]  # diffusion begins a block with the last token of the text
FORMS = [
    pytest.param(6, id="short"),
    pytest.param(90, id="full", marks=[pytest.mark.slow, pytest.mark.timeout(3600)]),
]


def names(choice: str) -> list[str]:
    return [f"{kind}+{choice}" for kind in KINDS]


def policies(choice: str, mode: str) -> list[str]:
    """The policies that a denoiser supports: with a draft head, diffusion commits from the left."""
    return ["span", "threshold"] if choice in HEADS and mode == "diffusion" else sorted(POLICIES)


def model_of(choice: str, kind: str = "biased") -> TwoTowerForCausalLM:
    return decoding_model(f"{kind}+{choice}", torch.float64)


def text(length: int, seed: int = 0) -> list[int]:
    return [random.Random(seed).randrange(4, 60) for _ in range(length)]


@pytest.mark.parametrize("count", FORMS)
@pytest.mark.parametrize("choice", CHOICES)
@torch.no_grad()
def test_random_requests_equal_the_oracle(choice: str, count: int) -> None:
    """Alone, by the published methods, and all together in an engine: batches of mixed modes, policies and sizes."""
    rng = random.Random(f"{choice}{count}")
    goldens: list[Golden] = []
    for number in range(count):
        mode = MODES[number % len(MODES)]
        golden = random_request(rng, mode, 1, LONGEST, names(choice), policies(choice, mode))
        if golden["model"] in KINDS:  # verified requests prefer a model whose drafts are accepted
            golden["model"] = f"biased+{choice}"
        golden["params"]["max_new_tokens"] = min(golden["params"]["max_new_tokens"], MOST_NEW)
        goldens.append(golden)
    rows = [expected(golden) for golden in goldens]
    for golden, row in zip(goldens, rows, strict=True):
        (tokens,), nfe = run_method(decoding_model(golden["model"], torch.float64), golden)
        assert tokens == row["tokens"], golden
        assert depends_on_timing(golden) or nfe == row["passes"][0], golden
    for name in names(choice):
        own = [place for place, golden in enumerate(goldens) if golden["model"] == name]
        llm = LLM(decoding_model(name, torch.float64), rows=4, length=LONGEST + MOST_NEW, block_size=24)
        requests = [Request(goldens[place]["prompts"][0], params_of(goldens[place])) for place in own]
        for place, result in zip(own, llm.generate(requests), strict=True):
            assert row_matches(row_of(result, not depends_on_timing(goldens[place])), rows[place], 2e-6), goldens[place]


def sizes() -> Iterator[tuple[int, int]]:
    """Block sizes, and lengths of prompts around them."""
    for size in range(1, 33):
        for length in sorted({1, 2, size - 1, size, size + 1} - {0}):
            yield size, length


SOME = [(1, 2), (2, 1), (3, 4), (5, 5), (32, 1)]
MATRICES = [
    pytest.param(SOME, id="short"),
    pytest.param(list(sizes()), id="full", marks=[pytest.mark.slow, pytest.mark.timeout(3600)]),
]


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("choice", CHOICES)
@torch.no_grad()
def test_prompts_and_blocks_of_every_size_equal_the_oracle(choice: str, matrix: list[tuple[int, int]]) -> None:
    """In diffusion with each policy in turn, and with drafts to verify; all of them in one batch."""
    requests: list[Request] = []
    rows: list[Row] = []
    for number, (size, length) in enumerate(matrix):
        for mode in ("diffusion", "verified"):
            options: dict[str, Any] = {"steps_per_block": 3} if mode == "diffusion" else {"draft_steps": 2}
            sampling = {"temperature": 0.8, "seed": number} if number % 2 else {}
            allowed = policies(choice, mode)
            policy = {"policy": allowed[number % len(allowed)]}
            new = {"max_new_tokens": min(size + 2, 12), "eos_token_id": 2}
            params = GenerationParams.of(mode=mode, block_size=size, **new, **options, **policy, **sampling)
            requests.append(Request(text(length, number), params))
            rows.append(row_of(oracle.decode(model_of(choice), list(requests[-1].prompt), params), True))
    llm = LLM(model_of(choice), rows=8, length=64, block_size=32)
    for request, row, result in zip(requests, rows, llm.generate(requests), strict=True):
        assert row_matches(row_of(result, True), row, 2e-6), request


@pytest.mark.parametrize("choice", AFTER_TEXT)
@torch.no_grad()
def test_the_parts_of_a_stream_are_those_of_the_result(choice: str) -> None:
    """Watched requests, with log-probabilities that the context tower gives for the whole text, and cached prompts."""
    model = model_of(choice)
    params = GenerationParams.of(mode="diffusion", max_new_tokens=21, block_size=6, steps_per_block=4, eos_token_id=[])
    prompt = text(300)  # longer than a chunk of the prefix cache
    llm = LLM(model, rows=2, length=400, block_size=8)
    (plain,) = llm.generate([Request(prompt, params)])
    events = list(llm.stream(Request(prompt, params, logprobs=2, watched=True)))
    blocks = [event for event in events if isinstance(event, BlockEvent)]
    steps = [event for event in events if isinstance(event, StepEvent)]
    result = blocks[-1].result
    assert result is not None
    assert result.cached_tokens > 0
    assert result.tokens == plain.tokens == [token for event in blocks for token in event.tokens]
    whole = [*prompt, *plain.tokens]
    logits = model.extend(torch.tensor([whole]), model.new_state(1, len(whole)))
    assert logits is not None
    for place, found in enumerate(result.logprobs):
        own = logits[0, len(prompt) + place - 1].log_softmax(-1)
        assert found.token == plain.tokens[place]
        assert found.logprob == pytest.approx(float(own[found.token]), abs=1e-9)
    written = {event.start: event.tokens for event in blocks}
    assert len(steps) >= 4
    for step in steps:
        assert not step.masked[0]
        assert step.tokens[0] == whole[len(prompt) + step.start]
    assert written


@pytest.mark.parametrize("choice", SHIFTED)
@torch.no_grad()
def test_the_step_callback_gets_the_inputs(choice: str) -> None:
    model, prompt = model_of(choice), text(7)
    seen: list[tuple[int, Tensor, float]] = []

    def callback(step: int, steps: int, block: Tensor, *, t: float, logits: Tensor | None, block_idx: int) -> None:
        seen.append((block_idx, block, t))
        if logits is not None:
            assert logits.shape == (1, 5, model.spec.vocab_size)

    out = model.generate_mask_diffusion(
        torch.tensor([prompt]), max_new_tokens=10, block_size=5, steps_per_block=4, step_callback=callback
    )
    assert next(int(block[0, 0]) for number, block, _ in seen if number == 0) == prompt[-1]
    assert next(int(block[0, 0]) for number, block, _ in seen if number == 1) == int(out[0, len(prompt) + 4])
    for _, block, t in seen:
        assert block.shape == (1, 5)
        assert t == pytest.approx(int((block[0, 1:] == 3).sum()) / 4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("choice", ["prefix", "shift-prefix"])
@torch.no_grad()
def test_nothing_after_the_prefix_changes_its_outputs(kind: str, choice: str) -> None:
    """With the weights and the input of the context tower, they are AR's."""
    model = model_of(choice, kind)
    assert model.denoiser is not None
    state = model.new_state(1, 32)
    before, block = torch.tensor([text(9)]), torch.tensor([[*text(4, 1), 3, 20, 3, 3]])
    model.prefill(before, torch.tensor([9]), state)
    level = torch.tensor([0.4], dtype=torch.float64)
    first = model.denoise(block, level, state.view())
    other = model.denoise(torch.tensor([[*text(4, 1), 3, 3]]), level, state.view())
    torch.testing.assert_close(first[:, :4], other[:, :4], rtol=0, atol=1e-11)
    assert not torch.allclose(first[:, 4], other[:, 4])
    changed = block.clone()
    changed[0, 1] = 30
    assert not torch.allclose(model.denoise(changed, level, state.view())[:, 4], first[:, 4])
    own = model.denoiser.state_dict()
    model.denoiser.load_state_dict(model.context.state_dict())
    as_context = model.denoise(block, None, state.view())
    model.denoiser.load_state_dict(own)
    expected_logits = model.extend(block, state)
    assert expected_logits is not None
    torch.testing.assert_close(as_context[:, :4], expected_logits[:, :4], rtol=0, atol=1e-10)
