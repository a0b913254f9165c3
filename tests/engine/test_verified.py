"""Verified decoding gives the AR model's text for any draft; drafting that does not pay costs little."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
from conftest import EVERY_KIND, GOLDEN, build_random_model
from torch import Tensor

from twotower import TwoTowerForCausalLM, bundled_model
from twotower.cache.replica import DeviceTransfer
from twotower.decoding.acceptance import accepted_length
from twotower.decoding.draft_controller import CREDIT_SHARE, CREDIT_STEPS, SAVED_STEPS, DraftController
from twotower.decoding.output import Generation
from twotower.decoding.params import GenerationParams
from twotower.decoding.sampling import AR_TOKEN, noise
from twotower.engine.generation import generate, stream
from twotower.errors import ArgumentError
from twotower.evaluation.held_out import cut_dialogue, read_documents
from twotower.evaluation.tasks import make_problems

SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 1.0, "seed": 3},
    "filtered": {"temperature": 0.7, "top_k": 9, "top_p": 0.9, "seed": 4},
}


def prompts(count: int, longest: int, seed: int = 0, words: int = 64) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(4, words) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def by(mode: str, model: TwoTowerForCausalLM, texts: list, **arguments: Any) -> list[Generation]:
    return generate(model, texts, GenerationParams.of(mode=mode, **arguments))


# --- the same tokens as AR ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draft_steps", [None, 1])
def test_no_tokens_asked_for(draft_steps: int | None) -> None:
    model = build_random_model("M*", dtype=torch.float64)
    found = by("verified", model, prompts(2, 9), max_new_tokens=0, draft_steps=draft_steps)
    assert [(a.tokens, a.finish_reason, a.drafts) for a in found] == [([], "length", 0)] * 2


def test_stop_strings_events_and_statistics() -> None:
    model = TwoTowerForCausalLM.from_pretrained(bundled_model("small"), dtype="float64")
    texts = ["User: I need a taxi to the airport.\nAssistant:", "User: I want to see a doctor.\nAssistant:"]
    asked: dict[str, Any] = {"max_new_tokens": 48, "eos_token_id": 2, "stop": "\nUser"}
    expected = by("ar", model, texts, **asked)
    found = by("verified", model, texts, draft_steps=1, **asked)
    events = list(stream(model, texts, "verified", draft_steps=1, **asked))
    for row, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert (a.tokens, a.text, a.finish_reason) == (b.tokens, b.text, b.finish_reason)
        own = [event for event in events if event.row == row]
        assert "".join(event.text for event in own) == a.text
        assert [token for event in own for token in event.tokens] == a.tokens
        assert a.drafts == a.context_passes == a.denoiser_passes
        assert 0 < a.accepted <= a.drafted <= 15 * a.drafts
        assert a.mean_accepted == a.accepted / a.drafts
        assert a.tokens_per_pass == len(a.tokens) / (a.context_passes + a.denoiser_passes)
        assert a.context_passes < len(a.tokens)
        assert len(a.committed_at) == len(a.confidence) == len(a.tokens)
        assert a.confidence == pytest.approx(b.confidence, abs=1e-9)
    assert found[0].to_dict()["mean_accepted"] == found[0].mean_accepted


class Counting(DeviceTransfer):
    """Both towers on the CPU, treated as two devices."""

    def __init__(self) -> None:
        self.sent = 0

    def send(self, tensor: Tensor, device: torch.device) -> Tensor:
        self.sent += tensor.nbytes
        return tensor.clone()


def test_the_replica_follows_a_rollback() -> None:
    """The replica follows a rolled back state."""
    model = build_random_model(EVERY_KIND, dtype=torch.float64)
    texts = prompts(5, 20)
    asked = {"max_new_tokens": 24, "block_size": 8, "draft_steps": 2}
    together = by("verified", model, texts, **asked)
    model.transfer = Counting()
    apart = by("verified", model, texts, **asked)
    assert model.transfer.sent > 0
    assert [(a.tokens, a.accepted) for a in apart] == [(b.tokens, b.accepted) for b in together]


# --- the rule -------------------------------------------------------------------------------------------------------


def _texts(model: TwoTowerForCausalLM, prompt: list[int], more: int) -> dict[tuple[int, ...], float]:
    """Every continuation by the model's two most probable tokens at each position, with its probability."""
    if not more:
        return {(): 1.0}
    with torch.no_grad():
        best = model(torch.tensor([prompt])).logits[0, -1].topk(2)
    out = {}
    for token, p in zip(best.indices.tolist(), best.values.softmax(0).tolist(), strict=True):
        out |= {(token, *rest): p * q for rest, q in _texts(model, [*prompt, token], more - 1).items()}
    return out


def test_a_ratio_rule_would_be_wrong_for_drafts_out_of_order() -> None:
    """Acceptance with min(1, p/q), computed exactly on three binary tokens whose joint distribution the drafter knows.

    In a draft of one parallel pass, q depends on the prefix alone and the rule gives p. In a draft that is filled in
    order of confidence, q of a token depends on tokens to its right, and the rule does not give p.
    """
    rng = random.Random(0)
    weights = {text: rng.random() ** 3 + 0.01 for text in itertools.product((0, 1), repeat=3)}
    total = sum(weights.values())
    p = {text: weight / total for text, weight in weights.items()}

    def marginal(at: int, known: dict[int, int]) -> list[float]:
        fit = [sum(v for t, v in p.items() if t[at] == x and all(t[i] == k for i, k in known.items())) for x in (0, 1)]
        return [value / sum(fit) for value in fit]

    def parallel() -> Iterator[tuple[tuple[int, ...], list[list[float]], float]]:
        own = [marginal(i, {}) for i in range(3)]
        for text in p:
            yield text, own, math.prod(own[i][text[i]] for i in range(3))

    def confident_first() -> Iterator[tuple[tuple[int, ...], list[list[float]], float]]:
        def fill(known: dict[int, int], used: dict[int, list[float]], chance: float) -> Iterator[Any]:
            left = [i for i in range(3) if i not in known]
            if not left:
                yield tuple(known[i] for i in range(3)), [used[i] for i in range(3)], chance
                return
            at = max(left, key=lambda i: max(marginal(i, known)))
            own = marginal(at, known)
            for token in (0, 1):
                yield from fill(known | {at: token}, used | {at: own}, chance * own[token])

        yield from fill({}, {}, 1.0)

    def outcome(drafts: Callable[[], Iterator[Any]]) -> dict[tuple[int, ...], float]:
        """The exact distribution under min(1, p/q), with the AR model after a rejected token."""
        out = dict.fromkeys(p, 0.0)
        for draft, q, chance in drafts():
            for i in range(4):
                known = {k: draft[k] for k in range(i)}
                if i == 3:
                    out[draft] += chance
                    break
                target, token = marginal(i, known), draft[i]
                keep = min(1.0, target[token] / q[i][token])
                residual = [max(a - b, 0.0) for a, b in zip(target, q[i], strict=True)]
                if keep < 1:
                    for other in (0, 1):
                        start = known | {i: other}
                        share = chance * (1 - keep) * residual[other] / sum(residual)
                        for text in p:
                            if all(text[k] == v for k, v in start.items()):
                                rest = math.prod(
                                    marginal(k, dict(enumerate(text[:k])))[text[k]] for k in range(i + 1, 3)
                                )
                                out[text] += share * rest
                chance *= keep
        return out

    right, wrong = outcome(parallel), outcome(confident_first)
    assert sum(wrong.values()) == pytest.approx(1)
    assert max(abs(right[text] - p[text]) for text in p) < 1e-12
    assert sum(abs(wrong[text] - p[text]) for text in p) / 2 > 0.02


def test_drafts_use_the_noise_of_ar_tokens() -> None:
    """A denoiser with the AR model's distributions is always accepted, also at temperature 1."""
    model = build_random_model(
        "-", dtype=torch.float64
    )  # no layer mixes positions, so logits depend on one token alone
    assert model.denoiser is not None
    with torch.no_grad():
        for tower in (model.context, model.denoiser):
            for parameter in tower.parameters():
                parameter.zero_()
    found = by(
        "verified", model, prompts(4, 5), max_new_tokens=16, block_size=8, draft_steps=1, temperature=1.0, seed=1
    )
    assert all(result.accepted == 14 for result in found)  # of the vocabulary without the mask token
    assert len({tuple(result.tokens) for result in found}) > 1


def test_relaxed_acceptance() -> None:
    """α = 1 is lossless, α = 0 accepts all. Between them a token has at least α times AR's best probability."""
    own = torch.tensor([[4, 5, 6]])
    drafted = torch.tensor([[4, 9, 6]])
    logits = torch.zeros(1, 3, 12)
    logits[0, 1, 5] = math.log(4.0)
    for acceptance, kept in ((1.0, 1), (0.3, 1), (0.25, 3), (0.0, 3)):
        assert accepted_length(drafted, own, logits, acceptance).tolist() == [kept]
    model = build_random_model("M*E", dtype=torch.float64)
    texts = prompts(6, 12)
    asked = {"max_new_tokens": 24, "block_size": 8, "draft_steps": 1}
    accepted = []
    for acceptance in (1.0, 0.5, 0.1, 0.0):
        found = by("verified", model, texts, acceptance=acceptance, **asked)
        accepted.append(sum(result.accepted for result in found))
        for text, result in zip(texts, found, strict=True):
            with torch.no_grad():
                logits = model(torch.tensor([text + result.tokens])).logits[0, len(text) - 1 : -1]
            chance = logits.softmax(-1)
            share = chance.gather(1, torch.tensor(result.tokens)[:, None])[:, 0] / chance.amax(-1)
            assert (share >= acceptance - 1e-9).all()
    assert accepted == sorted(accepted)
    assert accepted[0] < accepted[1]
    assert {result.context_passes for result in found} == {3}


# --- when it pays ---------------------------------------------------------------------------------------------------


def simulate(
    cost: Callable[[int], float], gain: Callable[[int, int], int], tokens: int
) -> tuple[float, DraftController]:
    """Simulates rounds until `tokens` tokens: draft depth k takes cost(k) and accepts gain(k, tokens so far)."""
    controller, seconds, made = DraftController(), 0.0, 0
    while made < tokens:
        passes = controller.choose_depth()
        kept, took = gain(passes, made) if passes else 0, cost(passes)
        made += kept + 1
        seconds += took
        controller.record(passes, kept + 1, kept, took)
    return seconds, controller


@pytest.mark.parametrize("tokens", [40, 64, 400, 4000])
@pytest.mark.parametrize("cost", [1.5, 3.0, 10.0])
def test_drafting_that_never_pays_costs_little(tokens: int, cost: float) -> None:
    seconds, controller = simulate(lambda k: 1.0 if k == 0 else cost * (1 + k / 4), lambda k, made: 0, tokens)
    largest = cost * 2  # the most that one draft can lose beyond the credit
    assert seconds <= tokens * (1 + CREDIT_SHARE) + CREDIT_STEPS + largest
    if tokens >= 400:
        assert seconds < 1.1 * tokens
    assert controller.stats[0].rounds > 0


def test_the_best_number_of_passes_is_found() -> None:
    gains = {1: 3, 2: 9, 4: 11}
    cost = {0: 1.0, 1: 2.2, 2: 3.2, 4: 5.2}
    seconds, controller = simulate(lambda k: cost[k], lambda k, made: gains[k], 2000)
    assert max(controller.stats, key=lambda k: controller.stats[k].rounds) == 2
    assert 2000 / seconds > 0.9 * (10 / 3.2)


def test_draft_controllers_outlive_a_request() -> None:
    """Sequences of similar shape share one controller. A fixed draft depth, and relaxed acceptance, have their own."""
    model = build_random_model("M*", dtype=torch.float64)
    asked: list[DraftController] = []
    given = model.workspace.draft_controller
    with patch.object(model.workspace, "draft_controller", lambda *a: asked.append(given(*a)) or asked[-1]):
        for texts in (prompts(1, 30), prompts(1, 30), prompts(3, 30)):
            by("verified", model, texts, max_new_tokens=12)
        rounds = asked[0].rounds
        by("verified", model, prompts(1, 30), max_new_tokens=12, draft_steps=2)
        by("verified", model, prompts(1, 30), max_new_tokens=12, acceptance=0.5)
    assert asked[0] is asked[1]
    assert asked[0] is not asked[2]
    assert [controller.fixed_depth for controller in asked] == [None] * 5 + [2, 1]
    assert asked[0].rounds == rounds > 2


def test_a_slow_first_step_has_little_weight() -> None:
    """The first AR step takes twenty times its usual time; drafts never pay."""
    first = iter([20.0])
    seconds, controller = simulate(lambda k: next(first, 1.0) if k == 0 else 3.0, lambda k, made: 0, 300)
    assert controller.stats[0].rounds > 250
    assert seconds < 1.25 * 300


def test_drafting_is_retried_when_the_text_becomes_easier() -> None:
    cost = {0: 1.0, 1: 2.5, 2: 3.0, 4: 4.0}
    seconds, _ = simulate(lambda k: cost[k], lambda k, made: 0 if made < 500 else 8, 3000)
    assert seconds < 1.1 * 500 + 1.4 * 2500 * 2.5 / 9


@pytest.mark.parametrize("good", [100, 3000])
def test_gains_are_credited_only_in_part(good: int) -> None:
    cost = {0: 1.0, 1: 2.5, 2: 3.6, 4: 5.8}
    before, _ = simulate(lambda k: cost[k], lambda k, made: 8 if made < good else 0, good)
    seconds, _ = simulate(lambda k: cost[k], lambda k, made: 8 if made < good else 0, good + 300)
    assert seconds - before <= 300 * (1 + CREDIT_SHARE) + SAVED_STEPS + CREDIT_STEPS + cost[4]


def test_losses_of_earlier_batches_do_not_count() -> None:
    """Texts of 30 tokens, ten without and then ten with accepted drafts: drafting soon resumes."""
    cost = {0: 1.0, 1: 2.5, 2: 3.6, 4: 5.8}
    controller, seconds = DraftController(), []
    for text in range(20):
        taken, made = 0.0, 0
        controller.begin(together=1)
        while made < 30:
            passes = controller.choose_depth()
            taken += cost[passes]
            kept = 8 if passes and text >= 10 else 0
            made += kept + 1
            controller.record(passes, kept + 1, kept, cost[passes])
        seconds.append(taken)
    assert sum(seconds[:10]) < 1.15 * 300
    assert sum(seconds[15:]) < 5 * 15


def test_varying_rounds_do_not_stop_drafting() -> None:
    """Random gains of 1 to 12 tokens a round; drafts of one pass are twice as fast as AR."""
    rng = random.Random(0)
    cost = {0: 1.0, 1: 2.8, 2: 4.0, 4: 6.4}
    gains = {1: (0, 0, 3, 5, 9, 11), 2: (0, 1, 4, 6, 11, 12), 4: (0, 2, 5, 7, 11, 12)}
    seconds = []
    for _ in range(20):
        taken, _ = simulate(lambda k: cost[k], lambda k, made: rng.choice(gains[k]), 2000)
        seconds.append(taken)
    best = 2.8 / (1 + sum(gains[1]) / 6)  # per token, if every draft had one pass
    assert sum(seconds) / 20 < 1.15 * 2000 * best
    assert max(seconds) < 1.4 * 2000 * best


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"acceptance": 1.5}, "acceptance is 1.5"),
        ({"draft_steps": -1}, "draft_steps is -1"),
        ({"draft_steps": 1.5}, "draft_steps is 1.5"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError) as error:
        GenerationParams.of(mode="verified", **arguments)
    assert message in str(error.value)


# --- in full --------------------------------------------------------------------------------------------------------


FULL = 500, 64  # prompts, and new tokens of each


def full_prompts(count: int) -> list[str]:
    """Held-out dialogues cut at random, and arithmetic problems."""
    dialogues = read_documents(GOLDEN / "dialogues" / "held_out.jsonl")
    rng = random.Random(0)
    cut = [cut_dialogue(rng.choice(dialogues), rng) for _ in range(count // 2)]
    return cut + [problem.prompt for problem in make_problems("test", count - len(cut), 5)]


def lead(model: TwoTowerForCausalLM, text: list[int], a: int, b: int, seed: int, temperature: float) -> float:
    """The float64 model's preference between two next tokens, including the row's noise."""
    with torch.no_grad():
        scores = model(torch.tensor([text])).logits[0, -1]
    if temperature > 0:
        uniform = noise(torch.tensor([seed]), torch.tensor([[len(text)]]), AR_TOKEN, 0, len(scores))[0, 0]
        scores = scores / temperature - torch.log(-torch.log(uniform))
    return float((scores[a] - scores[b]).abs())
