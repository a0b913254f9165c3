"""Training of a denoiser tower with a draft head: it predicts more tokens; what cannot be trained is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from packed import packed
from tiny_backbones import two_tower

from twotower import TwoTowerForCausalLM
from twotower.denoiser_fields import DenoiserConfig, DraftHeadConfig
from twotower.errors import ArgumentError
from twotower.evaluation.likelihood import continuation_bound
from twotower.training.columns import trained_columns, wanted_columns
from twotower.training.data import Piece, collate
from twotower.training.data.batch import Batch
from twotower.training.noise import Corruption
from twotower.training.objective import DenoisingObjective, DenoisingOptions
from twotower.training.patterns import Patterns
from twotower.training.recipe import Recipe
from twotower.training.targets import Targets, log_probabilities

SIZE, LENGTH, ROWS, STEPS = 4, 32, 32, 60
RECIPE = Recipe(patterns=Patterns.parse("levels"), targets=Targets())
FOLLOWS = np.random.default_rng(0).permutation(20).astype(np.int32) + 4


def copied(draft_head: DraftHeadConfig | None) -> TwoTowerForCausalLM:
    """A model whose denoiser starts as its context tower."""
    model = two_tower("llama", denoiser=DenoiserConfig(prediction_shift=1, draft_head=draft_head))
    assert model.denoiser is not None
    assert model.time is not None
    model.denoiser.load_state_dict(model.context.state_dict(), strict=False)
    model.time.reset_parameters()
    if model.draft_head is not None:
        model.draft_head.reset_parameters()
    return model


def texts(seed: int) -> Batch:
    """Texts in which a token follows from the one before, or in a third of the cases from nothing."""
    rng = np.random.default_rng(seed)
    drawn = rng.integers(4, 24, (ROWS, LENGTH)).astype(np.int32)
    for place in range(1, LENGTH):
        drawn[:, place] = np.where(rng.random(ROWS) < 2 / 3, FOLLOWS[drawn[:, place - 1] - 4], drawn[:, place])
    return collate([[Piece(text, 1, 0, True, True)] for text in drawn], range(ROWS), LENGTH, SIZE, eos=2, pad=0)


def agreement_after_training(draft_head: DraftHeadConfig | None) -> float:
    """The share of the tokens of masked blocks that a short training predicts, each given the true one before it."""
    model = copied(draft_head)
    batch = texts(1)
    options = DenoisingOptions(mask_token_id=3, shift=1, seed=1, recipe=RECIPE)
    objective = DenoisingObjective(model.context, model.denoiser, model.time, options)  # type: ignore[arg-type]
    trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-2)
    for _ in range(STEPS):
        noise = objective.draw_noise(batch, SIZE)
        loss = objective(batch, noise, SIZE) / objective.targets(batch, noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    batch = texts(2)
    masked = batch.denoised & (torch.arange(batch.tokens.shape[1]) % SIZE > 0)
    noise = Corruption(torch.ones(ROWS, batch.tokens.shape[1] // SIZE), masked)
    return agreement(objective, batch, noise)


@torch.no_grad()
def agreement(objective: DenoisingObjective, batch: Batch, noise: Corruption) -> float:
    columns = trained_columns(batch, wanted_columns(batch, noise, SIZE, 1), 1)
    hidden, _ = objective.hidden(batch, noise, SIZE)
    own = log_probabilities(objective.denoiser, hidden.flatten(0, 1)[columns.at], 3, columns.before)
    return float((own.argmax(-1) == columns.token).double().mean())


def test_a_short_training_with_a_draft_head_predicts_more_tokens() -> None:
    with_head, without = agreement_after_training(DraftHeadConfig(16)), agreement_after_training(None)
    print(f"tokens predicted: {with_head:.1%} with a draft head, {without:.1%} without")
    assert with_head > without + 0.1


@pytest.mark.parametrize("shift", [0, 1])
def test_the_token_before_a_target_is_of_the_same_document(shift: int) -> None:
    batch = packed(offset="fixed")
    masked = batch.denoised & (torch.arange(batch.tokens.shape[1]) % 4 >= shift)
    noise = Corruption(torch.ones(len(batch), batch.tokens.shape[1] // 4), masked)
    columns = trained_columns(batch, wanted_columns(batch, noise, 4, shift), shift)
    tokens, document = batch.tokens.flatten().tolist(), batch.document.flatten().tolist()
    for at, before in zip(columns.at.tolist(), columns.before.tolist(), strict=True):
        first = not shift and (at % batch.tokens.shape[1] == 0 or document[at - 1] != document[at])
        assert before == (-1 if first else tokens[at - 1 + shift])
    assert bool((columns.before == -1).any()) == (shift == 0)


def test_a_likelihood_bound_is_refused() -> None:
    model = two_tower("llama", denoiser=DenoiserConfig(draft_head=DraftHeadConfig(4)))
    with pytest.raises(ArgumentError, match='likelihood "bound" needs a denoiser without a draft head'):
        continuation_bound(model, [([4, 5], [6, 7])])
