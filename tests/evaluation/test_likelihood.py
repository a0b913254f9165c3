"""Likelihoods of continuations: compared with a plain forward of the context tower and with `denoise`."""

from __future__ import annotations

import random

import pytest
import torch
from conftest import build_random_model
from tiny_backbones import two_tower

from twotower import TwoTowerForCausalLM
from twotower.decoding.params import GenerationParams
from twotower.engine.generation import generate
from twotower.errors import ArgumentError
from twotower.evaluation import likelihood
from twotower.evaluation.likelihood import continuation_bound, continuation_likelihood


def pairs_of(count: int, seed: int = 0) -> list[tuple[list[int], list[int]]]:
    rng = random.Random(seed)

    def tokens(most: int) -> list[int]:
        return [rng.randrange(4, 64) for _ in range(rng.randint(1, most))]

    return [(tokens(40), tokens(9)) for _ in range(count)]


def build(backbone: str | None) -> TwoTowerForCausalLM:
    return build_random_model(dtype=torch.float64) if backbone is None else two_tower(backbone, torch.float64)


# A tied head with a cap of logits; a factor of logits; a recurrence in chunks.
@pytest.mark.parametrize("backbone", [None, "gemma2", "granite", "qwen3_next"])
def test_context_likelihood_equals_that_of_a_plain_forward(
    backbone: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(backbone)
    pairs = pairs_of(12)
    given, last = pairs[0]
    pairs += [(given, [*last[:-1], other]) for other in (7, 8, 9)]  # one question with several answers
    monkeypatch.setattr(likelihood, "MAX_BATCH_TOKENS", 96)  # several batches
    told: list[int] = []
    found = continuation_likelihood(model, pairs, told.append)
    assert told[-1] == len(pairs)
    assert len(told) > 2
    for (given, text), one in zip(pairs, found, strict=True):
        chances = model(torch.tensor([[*given, *text]])).logits.detach()[0, len(given) - 1 : -1].log_softmax(-1)
        want = chances.gather(-1, torch.tensor(text)[:, None]).sum()
        assert one.log_prob == pytest.approx(float(want), abs=1e-9)
        assert one.greedy == (chances.argmax(-1).tolist() == text)


def test_greedy_is_true_for_the_text_of_ar() -> None:
    model = build_random_model(dtype=torch.float64)
    prompts = [given for given, _ in pairs_of(5)]
    written = [out.tokens for out in generate(model, prompts, GenerationParams.of(mode="ar", max_new_tokens=6))]
    assert all(one.greedy for one in continuation_likelihood(model, list(zip(prompts, written, strict=True))))
    changed = [[*tokens[:-1], (tokens[-1] + 1) % 64] for tokens in written]
    assert not any(one.greedy for one in continuation_likelihood(model, list(zip(prompts, changed, strict=True))))


def nll(model: TwoTowerForCausalLM, text: list[int], block: list[int], wanted: dict[int, int]) -> dict[int, float]:
    """−ln p of tokens at positions of a block, computed with `extend` and `denoise`; 3 is the mask token."""
    state = model.new_state(1, len(text) + 8)
    with torch.no_grad():
        model.prefill(torch.tensor([text]), torch.tensor([len(text)]), state)
        t = torch.tensor([block.count(3) / len(block)], dtype=torch.float64)
        chances = model.denoise(torch.tensor([block]), t, model.reader(state).view())[0].log_softmax(-1)
    return {place: -float(chances[place, token]) for place, token in wanted.items()}


def test_the_bound_is_exact_for_blocks_of_one_token() -> None:
    model = build_random_model(dtype=torch.float64)
    given, text = [5, 6, 7, 8, 9], [10, 11, 12]
    want = -sum(nll(model, given + text[:i], [3], {0: text[i]})[0] for i in range(3))
    (found,) = continuation_bound(model, [(given, text)], block_size=1, samples=1)
    assert found == pytest.approx(want, abs=1e-9)


@pytest.mark.parametrize("backbone", [None, "gemma2", "granite"])
def test_the_bound_weights_random_orders_of_a_block(backbone: str | None) -> None:
    """Two tokens in a block of four: weights n/m, even m, the rest masked, t as in generation."""
    model = build(backbone)
    given, (a, b) = [5, 6, 7, 8, 9], (10, 11)
    both = nll(model, given, [3, 3, 3, 3], {0: a, 1: b})
    second, first = nll(model, given, [a, 3, 3, 3], {1: b})[1], nll(model, given, [3, b, 3, 3], {0: a})[0]
    possible = [-(sum(both.values()) + 2 * alone) / 2 for alone in (first, second)]
    found = [continuation_bound(model, [(given, [a, b])], block_size=4, samples=2, seed=s)[0] for s in range(12)]
    for one in found:
        assert min(abs(one - each) for each in possible) < 1e-9
    assert len({round(one, 6) for one in found}) == 2  # each token comes first in some draw


def test_the_bound_is_below_the_exact_value() -> None:
    """For a block of two: ln of the mean over both orders ≥ the mean of ln, to which many draws converge."""
    model = build_random_model(dtype=torch.float64)
    given, (a, b) = [5, 6, 7], (10, 11)
    both = nll(model, given, [3, 3], {0: a, 1: b})
    left, right = nll(model, given, [a, 3], {1: b})[1], nll(model, given, [3, b], {0: a})[0]
    exact = torch.tensor([-(both[0] + left), -(both[1] + right)]).logsumexp(0).item() - 0.6931471805599453
    mean = -(sum(both.values()) + left + right) / 2
    (found,) = continuation_bound(model, [(given, [a, b])], block_size=2, samples=400)
    assert found == pytest.approx(mean, abs=0.1)
    assert mean <= exact


def test_pairs_do_not_affect_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_random_model(dtype=torch.float64)
    pairs = pairs_of(6)
    wants = [p.requires_grad for p in model.parameters()]
    told: list[int] = []
    together = continuation_bound(model, pairs, block_size=4, samples=3, progress=told.append)
    monkeypatch.setattr(likelihood, "MAX_BATCH_TOKENS", 1)  # one row per batch
    assert continuation_bound(model, pairs, block_size=4, samples=3) == pytest.approx(together, abs=1e-9)
    assert told[-1] == 6
    assert [p.requires_grad for p in model.parameters()] == wants
    assert continuation_bound(model, pairs, block_size=4, samples=3, seed=1) != pytest.approx(together, abs=1e-6)


def test_pairs_that_cannot_be_scored_are_errors() -> None:
    model = build_random_model("M")
    with pytest.raises(ArgumentError, match="pair 1 has an empty continuation"):
        continuation_likelihood(model, [([1], [2]), ([1], [])])
    with pytest.raises(ArgumentError, match="pair 0 has an empty prefix"):
        continuation_bound(model, [([], [2])])
    model.denoiser = None
    with pytest.raises(ArgumentError, match='towers="both"'):
        continuation_bound(model, [([1], [2])])
    assert continuation_likelihood(model, []) == []
