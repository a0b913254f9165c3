"""Denoiser towers and adapters everywhere with a draft head: verified text is AR's, diffusion commits from the left.

`test_denoiser_choices.py` compares every mode with the oracle.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_backbones import two_tower

from twotower import LLM, GenerationParams, Request, TwoTowerForCausalLM
from twotower.decoding.output import Generation
from twotower.decoding.sampling import AR_TOKEN, Sampling, sample
from twotower.decoding.unmasking import POLICIES
from twotower.denoiser_fields import DenoiserConfig, DraftHeadConfig
from twotower.engine.generation import generate
from twotower.errors import ArgumentError

HEAD = DraftHeadConfig(5)
PREFIX_CAUSAL = DenoiserConfig(prediction_shift=1, block_attention="prefix_causal", draft_head=HEAD)
CHOICES = {
    "released": DenoiserConfig(draft_head=HEAD),
    "shift": PREFIX_CAUSAL,
    "first": DenoiserConfig(first_from_ar=True, draft_head=HEAD),
    "short": replace(PREFIX_CAUSAL, denoiser_layers=(0, 2, 3)),
    "everywhere": replace(DenoiserConfig.with_adapters(3, "everywhere"), draft_head=HEAD),
}
PROMPTS = [[5], [6, 7, 8], [9, 10, 11, 12, 13, 14, 15, 16, 17, 18], [20, 21] * 9]


def model_of(choice: str) -> TwoTowerForCausalLM:
    return two_tower("nemotron_h", torch.float64, denoiser=CHOICES[choice])


def run(model: TwoTowerForCausalLM, prompts: list[list[int]] = PROMPTS, **options: Any) -> list[Generation]:
    settings: dict[str, Any] = {"max_new_tokens": 24, "eos_token_id": 2, "block_size": 6} | options
    return generate(model, prompts, GenerationParams.of(**settings))


@pytest.mark.parametrize("options", [{}, {"temperature": 0.8, "seed": 5}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("choice", CHOICES)
def test_verified_text_is_that_of_ar_whatever_the_head_drafts(choice: str, options: dict[str, Any]) -> None:
    model = model_of(choice)
    expected = run(model, mode="ar", **options)
    for steps in (1, 3):
        found = run(model, mode="verified", draft_steps=steps, **options)
        assert [row.tokens for row in found] == [row.tokens for row in expected]
        assert sum(row.drafted for row in found) > sum(row.accepted for row in found)


@pytest.mark.parametrize("choice", CHOICES)
def test_diffusion_gives_a_row_the_same_text_alone_and_in_a_batch(choice: str) -> None:
    model = model_of(choice)
    options = {"mode": "diffusion", "confidence_threshold": 0.05, "temperature": 0.7, "seed": 3}
    together = [row.tokens for row in run(model, **options)]
    assert [run(model, [prompt], **options)[0].tokens for prompt in PROMPTS] == together
    by_name = run(model, **options | {"policy": "span", "policy_value": 0.05})
    assert [row.tokens for row in by_name] == together
    assert model.draft_head is not None
    with torch.no_grad():
        model.draft_head.following.zero_()
    assert [row.tokens for row in run(model, **options)] != together


@pytest.mark.parametrize("choice", ["released", "shift", "everywhere"])
@torch.no_grad()
def test_the_noise_of_a_token_is_that_of_ar(choice: str) -> None:
    """Where all other logits are 0, a block has what AR with the terms of the head as logits would write."""
    model = model_of(choice)
    head, tower = model.draft_head, model.denoiser or model.context
    assert head is not None
    tower.norm_f.weight.zero_()
    head.following *= 4  # so that a wrong token before another one shows
    params = GenerationParams.of(
        mode="diffusion", max_new_tokens=7, eos_token_id=2, block_size=8, confidence_threshold=0.9, temperature=1.0,
        seed=3,
    )  # fmt: skip
    (found,) = generate(model, [[5, 6]], params)
    text, seeds = [5, 6], torch.tensor(params.row_seeds(1))
    for place in range(2, 9):
        logits = (head.following @ head.previous[text[-1]]).index_fill(0, torch.tensor([3]), -torch.inf)
        sampling = Sampling(seeds=seeds, temperature=1.0)
        text.append(int(sample(logits[None, None], sampling, torch.tensor([[place]]), AR_TOKEN)))
    assert found.tokens == text[2 : 2 + len(found.tokens)]
    assert len(found.tokens) > 3
    assert found.denoiser_passes > 1  # a position that is drawn again draws the same


@pytest.mark.parametrize("mode", ["diffusion", "auto"])
def test_other_policies_are_one_line(mode: str) -> None:
    model = model_of("released")
    for policy in sorted(POLICIES.keys() - {"threshold", "span"}):
        said = f"policy is '{policy}', and this model's denoiser has a draft head, which draws from the left; use span"
        request = Request([5, 6], GenerationParams.of(mode=mode, policy=policy, max_new_tokens=4, block_size=4))
        with pytest.raises(ArgumentError, match=said) as error:
            LLM(model, rows=1, length=32, block_size=4).add_request(request)
        assert "\n" not in str(error.value)
