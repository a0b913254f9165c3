"""Training of denoisers with shifted predictions, prefix-causal attention or adapters everywhere.

The loss of all blocks at once equals the loss of one block after the other, computed with the verbs of generation.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from packed import MASK, Block, blocks_of, deviation, packed
from tiny_backbones import slow_but, two_tower
from torch import Tensor

from twotower import TwoTowerForCausalLM
from twotower.denoiser_fields import DenoiserConfig, DraftHeadConfig
from twotower.errors import ArgumentError
from twotower.evaluation.likelihood import continuation_bound
from twotower.training.data import Batch
from twotower.training.noise import Corruption
from twotower.training.objective import DenoisingObjective, DenoisingOptions
from twotower.training.patterns import Patterns
from twotower.training.recipe import Recipe

NAMES = slow_but(("nemotron_h", "gemma2", "qwen3_next"))
EVERYWHERE = DenoiserConfig.with_adapters(3, "everywhere")
CHOICES = {
    "shift": DenoiserConfig(prediction_shift=1),
    "prefix": DenoiserConfig(block_attention="prefix_causal"),
    "shift-prefix": DenoiserConfig(prediction_shift=1, block_attention="prefix_causal"),
    "everywhere": EVERYWHERE,
    "everywhere-shift": replace(EVERYWHERE, prediction_shift=1),
}
HEAD = DraftHeadConfig(5)
CHOICES |= {
    "head": DenoiserConfig(draft_head=HEAD),
    "head-shift": DenoiserConfig(prediction_shift=1, block_attention="prefix_causal", draft_head=HEAD),
    "head-everywhere": replace(EVERYWHERE, draft_head=HEAD),
}
MIXED = Recipe(patterns=Patterns.parse("levels+prefix+draft"))


def objective(model: TwoTowerForCausalLM, **options: Any) -> DenoisingObjective:
    choices = model.config.denoiser
    settings = DenoisingOptions(
        mask_token_id=MASK,
        scope="block",
        seed=4,
        time=model.time is not None,
        shift=choices.prediction_shift,
        prefix_causal=choices.block_attention == "prefix_causal",
        **options,
    )
    denoiser = model.context if model.has_adapters else model.denoiser
    assert denoiser is not None
    return DenoisingObjective(model.context, denoiser, model.time, settings)


def naive(model: TwoTowerForCausalLM, batch: Batch, noise: Corruption, size: int, elbo: bool = False) -> Tensor:
    """−ln p of each prediction, block by block: of the masked tokens, and with shift 1 of the token after the block."""
    shift, found = model.config.denoiser.prediction_shift, []
    for block in blocks_of(batch, size):
        row, masked = batch.tokens[block.row], noise.masked[block.row, block.lo : block.hi]
        if not masked.any():
            continue
        state = model.new_state(1, row.numel())
        if block.lo > block.first:  # the state has the tokens before the block's first column
            model.extend(row[None, block.first : block.lo], state, logits=False)
        level = noise.t[block.row, block.lo // size][None]
        given = row[block.lo : block.hi].masked_fill(masked, MASK)
        logits = model.denoise(given[None], level if model.time is not None else None, model.reader(state).view())[0]
        logits = logits + terms(model, row, block, shift)
        share = level[0] if elbo else 1.0
        for place in masked.nonzero()[:, 0].tolist():
            found.append(F.cross_entropy(logits[place - shift], row[block.lo + place]) / share)
        if shift and not elbo:
            own = batch.document[block.row]
            if block.hi < len(own) and own[block.hi] == block.number:
                found.append(F.cross_entropy(logits[-1], row[block.hi]))
            elif not batch.text[block.row, block.hi - 1]:
                found.append(F.cross_entropy(logits[-1], row[block.hi - 1]))  # EOS after EOS
    return torch.stack(found)


def terms(model: TwoTowerForCausalLM, row: Tensor, block: Block, shift: int) -> Tensor:
    """What the draft head adds to the logits (L, V) of a block: each gets the true token before its target."""
    head = model.draft_head
    if head is None:
        return torch.zeros((), dtype=torch.float64)
    found = []
    for place in range(block.lo, block.hi):
        before = place - 1 + shift
        there = before >= block.first  # a document's first token follows no token
        found.append(head.following @ head.previous[row[before]] if there else head.following.sum(1) * 0)
    return torch.stack(found)


def gradients(loss: Tensor, model: TwoTowerForCausalLM) -> dict[str, Tensor]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: g for name, g in zip(named, found, strict=True) if g is not None and g.abs().max() > 1e-12}


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("name", NAMES)
def test_all_blocks_at_once_equal_generation_block_by_block(name: str, choice: str) -> None:
    """Losses and gradients, for several patterns of masks; only a denoiser's own weights have gradients."""
    model = two_tower(name, torch.float64, seed=8, denoiser=CHOICES[choice])
    for size in (2, 4) if name == "nemotron_h" else (4,):
        batch = packed(block_size=size, seed=1)
        training = objective(model, recipe=MIXED)
        noise = training.draw_noise(batch, size)
        shift = model.config.denoiser.prediction_shift
        assert noise.masked.any()
        assert not shift or not noise.masked.unflatten(1, (-1, size))[..., 0].any()
        loss = training(batch, noise, size)
        expected = naive(model, batch, noise, size)
        assert training.targets(batch, noise) == len(expected)
        assert deviation(loss, expected.sum()) < 1e-9
        fast, slow = gradients(loss, model), gradients(expected.sum(), model)
        assert fast.keys() == slow.keys()
        assert all(deviation(fast[key], slow[key]) < 1e-7 for key in slow)
        own = (".adapter.", "mask_embedding.", "draft_head.") if model.has_adapters else ("denoiser.", "time.")
        assert (model.draft_head is None) == (not any("draft_head" in key for key in fast))
        assert all(any(part in key for part in own) for key in fast)


@pytest.mark.parametrize("choice", ["shift", "shift-prefix", "everywhere"])
def test_the_likelihood_bound_counts_the_tokens_that_the_denoiser_writes(choice: str) -> None:
    model, batch = two_tower("nemotron_h", torch.float64, seed=8, denoiser=CHOICES[choice]), packed(seed=1)
    training = objective(model, elbo=True)
    noise = training.draw_noise(batch, 4)
    assert deviation(training(batch, noise, 4), naive(model, batch, noise, 4, elbo=True).sum()) < 1e-9
    written = batch.denoised.unflatten(1, (-1, 4))[..., model.config.denoiser.prediction_shift :]
    assert training.targets(batch, noise) == int(written.sum())


@pytest.mark.parametrize("choice", CHOICES)
def test_no_prediction_depends_on_its_token_or_on_later_text(choice: str) -> None:
    """Changing the tokens under the masks of a block, or those after it, leaves its predictions as they are."""
    model, batch = two_tower("nemotron_h", torch.float64, seed=8, denoiser=CHOICES[choice]), packed(seed=1)
    training = objective(model, recipe=MIXED)
    noise = training.draw_noise(batch, 4)
    follows = batch.document[0, 3:-1:4] == batch.document[0, 4::4]  # another block of the same document
    number = int((noise.masked[0].unflatten(0, (-1, 4)).any(-1)[1:] & follows).nonzero()[0]) + 1
    own = slice(4 * number, 4 * number + 4)
    tokens = batch.tokens.clone()
    tokens[0, own] = torch.where(noise.masked[0, own], 40, tokens[0, own])
    tokens[0, own.stop :] = 41
    with torch.no_grad():
        before = training.hidden(batch, noise, 4)[0][0, own]
        after = training.hidden(replace(batch, tokens=tokens), noise, 4)[0][0, own]
        torch.testing.assert_close(after, before, rtol=0, atol=1e-12)
        tokens[0, own.start] = 42  # the first column of the block, if it is visible, or the text before
        if noise.masked[0, own.start]:
            tokens[0, own.start - 1] = 42
        changed = training.hidden(replace(batch, tokens=tokens), noise, 4)[0][0, own]
    assert not torch.allclose(changed, before)


@pytest.mark.parametrize("choices", [CHOICES["shift"], DenoiserConfig(first_from_ar=True)], ids=["shift", "first"])
def test_the_bound_of_given_text_is_refused_where_ar_writes_a_part(choices: DenoiserConfig) -> None:
    model = two_tower("nemotron_h", torch.float64, denoiser=choices)
    with pytest.raises(ArgumentError, match="here the context tower chooses one of them"):
        continuation_bound(model, [([5, 6], [7, 8])])
