"""Commit policies: each rule against a plain-Python reference, their progress, and several policies in one batch."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from conftest import EVERY_KIND, build_random_model
from naive_policies import NAIVE, NaiveRow, naive_commit
from torch import Tensor

from twotower.decoding import sampling
from twotower.decoding.params import GenerationParams
from twotower.decoding.unmasking import POLICIES, Pass, Verdict, commit, decide, register_policy
from twotower.engine.generation import generate
from twotower.errors import ArgumentError

ROWS, LENGTH, WORDS, STEPS = 6, 9, 12, 7


def draw(seed: int, sharpness: float = 3.0) -> Pass:
    """A pass with some committed positions; one row has a single masked position, one has all masked."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(ROWS, LENGTH, WORDS, generator=generator, dtype=torch.float64) * sharpness
    logits[..., 3] = -torch.inf
    probs = logits.softmax(-1)
    candidate = torch.multinomial(probs.flatten(0, 1), 1, generator=generator).view(ROWS, LENGTH)
    masked = torch.rand(ROWS, LENGTH, generator=generator) < 0.6
    masked[0], masked[1] = True, torch.arange(LENGTH) == 4
    confidence = probs.gather(-1, candidate[..., None])[..., 0]
    return Pass(logits, candidate, confidence, masked, each(seed % STEPS), each(STEPS))


def each(step: int, rows: int = ROWS) -> Tensor:
    return torch.full((rows, 1), step)


# --- rules, against the same in plain Python ------------------------------------------------------------------------

POLICY_VALUES: dict[str, tuple[float, ...]] = {
    "threshold": (0.0, 0.3, 0.8, 1.0),
    "top-k": (1, 3, 20),
    "factor": (0.0, 0.7, 1.5, 4.0),
    "entropy": (0.0, 0.3, 1.0, 9.0),
    "margin": (0.0, 0.4, 0.9),
    "klass": (0.0, 0.3, 0.8),
    "span": (0.0, 0.2, 0.6),
    "decay": (0.2, 0.6, 1.0),
}


def test_every_policy_has_a_twin_a_source_and_a_meaning() -> None:
    assert set(NAIVE) == set(POLICY_VALUES) == set(POLICIES)
    for name, policy in POLICIES.items():
        assert NAIVE[name].default == policy.default
        assert policy.value_meaning
        assert policy.source
        assert policy.low <= policy.default <= policy.high


@pytest.mark.parametrize("name", NAIVE)
def test_a_rule_is_what_its_twin_says(name: str) -> None:
    some = 0
    for seed in range(12):
        seen = draw(seed)
        memory = None
        if name == "klass":  # a pass before, so similar that some positions count as stable
            earlier = seen._replace(logits=seen.logits + 0.2 * draw(seed + 100).logits.nan_to_num(neginf=0.0))
            memory = POLICIES[name].rule(earlier, torch.zeros(ROWS, 1)).memory
        for value in POLICY_VALUES[name]:
            verdict = POLICIES[name].rule(seen._replace(memory=memory), torch.full((ROWS, 1), float(value)))
            for r in range(ROWS):
                row = NaiveRow(
                    p=seen.logits[r].softmax(-1).tolist(),
                    c=seen.confidence[r].tolist(),
                    open=seen.masked[r].nonzero()[:, 0].tolist(),
                    before=None if memory is None else memory[0][r].softmax(-1).tolist(),
                    step=int(seen.step[r]),
                    steps=STEPS,
                )
                sure = (verdict.sure & seen.masked)[r].nonzero()[:, 0].tolist()
                assert set(sure) == NAIVE[name].select(row, value), (seed, value, r)
                chosen = commit(verdict, seen.masked, seen.step, seen.steps)[r].nonzero()[:, 0].tolist()
                assert set(chosen) == naive_commit(name, row, value), (seed, value, r)
                some += len(sure)
    assert some > 0


def test_the_memory_of_klass_is_not_upcast() -> None:
    """The memory has the logits in their dtype and two numbers a position. Tiles of one position give equal results."""
    seen, value = draw(3), torch.zeros(ROWS, 1)
    narrow = seen._replace(logits=seen.logits.bfloat16())
    memory = POLICIES["klass"].rule(narrow, value).memory
    assert memory[0] is narrow.logits
    assert all(part.shape == seen.masked.shape for part in memory[1:])
    later = narrow._replace(logits=narrow.logits + 0.01, memory=memory)
    whole = POLICIES["klass"].rule(later, value)
    with patch.object(sampling, "TILE_BYTES", 1):
        by_one = POLICIES["klass"].rule(later, value)
    assert torch.equal(whole.sure, by_one.sure)
    assert whole.sure.any()


# --- progress -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", POLICIES)
def test_a_block_is_done_in_its_steps_and_each_pass_commits(name: str) -> None:
    """Also with policy values that commit nothing by themselves. A committed position does not change."""
    policy = POLICIES[name]
    never = {"top-k": 1.0, "factor": 0.0, "entropy": 0.0}.get(name, 1.0)
    for steps in (1, 3, LENGTH):
        memory: Any = None
        masked = torch.ones(ROWS, LENGTH, dtype=torch.bool)
        for step in range(steps):
            seen = draw(step)._replace(masked=masked, step=each(step), steps=each(steps))
            chosen, memory = decide(name, seen._replace(memory=memory), torch.full((ROWS, 1), never).double())
            assert (chosen & ~masked).sum() == 0
            assert (chosen.sum(1) >= masked.any(1).long()).all()
            masked = masked & ~chosen
        assert not masked.any()
    assert policy.rule is not None


def test_sure_positions_go_before_better_placed_ones() -> None:
    sure = torch.tensor([[False, False, True, True]])
    order = torch.tensor([[0.9, 0.8, 0.1, 0.2]])
    masked = torch.ones(1, 4, dtype=torch.bool)
    assert commit(Verdict(sure, order), masked, each(0, 1), each(8, 1)).tolist() == [[False, False, True, True]]
    assert commit(Verdict(sure, order), masked, each(0, 1), each(2, 1)).tolist() == [[False, False, True, True]]
    assert commit(Verdict(sure, order), masked, each(2, 1), each(3, 1)).all()
    nothing = torch.zeros_like(sure)
    assert commit(Verdict(nothing, order), masked, each(0, 1), each(4, 1)).tolist() == [[True, False, False, False]]
    even = torch.full_like(order, 0.5)
    assert commit(Verdict(nothing, even), masked, each(0, 1), each(2, 1)).tolist() == [[True, True, False, False]]


# --- in generation --------------------------------------------------------------------------------------------------

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [14, 15], [16, 17, 18, 19], [20], [21, 22], [23, 24, 25]]
ASKED: dict[str, Any] = {"mode": "diffusion", "max_new_tokens": 20, "block_size": 8, "steps_per_block": 8}


def test_each_row_of_a_batch_has_its_own_policy() -> None:
    """Each row equals its result alone, with every policy in one batch, including a registered one."""
    model = build_random_model(EVERY_KIND, dtype=torch.float64)
    register_policy("odd first", _odd_first, value_meaning="nothing", default=0.5, high=1.0)
    try:
        names = ["threshold", "klass", "entropy", "odd first", "span", "decay", "top-k", "factor"]
        values = [0.1, 0.05, 2.0, 0.5, 0.05, 0.2, 3.0, 1.9]
        together = generate(model, PROMPTS, GenerationParams.of(policy=names, policy_value=values, **ASKED))
        for prompt, name, value, result in zip(PROMPTS, names, values, together, strict=True):
            (alone,) = generate(model, [prompt], GenerationParams.of(policy=name, policy_value=value, **ASKED))
            assert result.tokens == alone.tokens
            assert result.committed_at == alone.committed_at
            assert result.denoiser_passes == alone.denoiser_passes
        assert len({result.denoiser_passes for result in together}) > 2
        assert together[3].committed_at[:4] == [4, 0, 5, 1]
    finally:
        del POLICIES["odd first"]


def _odd_first(seen: Pass, value: Tensor) -> Verdict:
    """Commits one position per pass: 1, 3, 5, … and then 0, 2, 4, …"""
    place = torch.arange(seen.masked.shape[1])
    order = -(place // 2 + (place % 2 == 0) * 100.0).expand(len(seen.masked), -1)
    return Verdict(torch.zeros_like(seen.masked), order)


def test_the_default_is_the_released_rule() -> None:
    model = build_random_model("M*E", dtype=torch.float64)
    usual = generate(model, PROMPTS, GenerationParams.of(confidence_threshold=0.2, **ASKED))
    named = generate(model, PROMPTS, GenerationParams.of(policy="threshold", policy_value=0.2, **ASKED))
    assert [a.tokens for a in usual] == [b.tokens for b in named]
    assert [a.committed_at for a in usual] == [b.committed_at for b in named]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"policy": "boldly"}, "policy is 'boldly'; choose one of threshold, top-k"),
        ({"policy": []}, "policy is empty"),
        (
            {"policy": "margin", "policy_value": 1.5},
            "policy_value (margin: probability of the best less the second) is 1.5",
        ),
        ({"policy": "top-k", "policy_value": 0}, "policy_value (top-k: positions per pass) is 0"),
        ({"policy": ["span", "margin"], "policy_value": [0.5, 2]}, "policy_value (margin"),
        ({"policy": ["span", "margin"], "policy_value": [0.5, 0.5, 0.5]}, "3 policy values for 2 policies"),
        ({"policy_value": "0.9"}, "policy_value (threshold: confidence) is '0.9'"),
    ],
)
def test_invalid_policies(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError) as error:
        GenerationParams.of(**arguments)
    assert message in str(error.value)


def test_one_for_each_prompt_or_one_for_all() -> None:
    model = build_random_model("M")
    for name, values in (("policies", {"policy": ["span", "margin"]}), ("policy values", {"policy_value": [0.5, 0.6]})):
        with pytest.raises(ArgumentError, match=f"2 {name} for 3 prompts"):
            generate(model, PROMPTS[:3], GenerationParams.of(**values, **ASKED))


def test_a_name_is_taken_once() -> None:
    with pytest.raises(ArgumentError, match="exists already"):
        register_policy("span", _odd_first, value_meaning="", default=0.0)
    with pytest.raises(ArgumentError, match="default 2 is not between 0 and 1"):
        register_policy("new", _odd_first, value_meaning="", default=2, high=1.0)
    with pytest.raises(ArgumentError, match="the rule is 5; give a function"):
        register_policy("new", 5, value_meaning="", default=0.0)
