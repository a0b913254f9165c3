"""Training of every family of backbones: losses and gradients equal those of generation, one block at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import random_two_tower
from oracle import seen_by_denoiser
from oracle_tower import conditioning, read
from packed import MASK, Case, Kind, blocks_of, case, deviation, naive_next_token_nll, naive_nll, objective, packed
from shaped_models import STATIC as SHAPED
from shaped_models import config_of
from test_objective import EXACT, same
from tiny_backbones import CORE, FAMILY_NAMES, SHAPES, VOCAB, slow_but
from torch import Tensor

from twotower.training import logits as logits_module
from twotower.training.noise import corrupt
from twotower.training.objective import AutoregressiveObjective

# Documents longer than every window of `SHAPES`, one of them after padding that fills half a block.
ROWS: tuple[tuple[tuple[int, Kind], ...], ...] = (
    ((7, "prompted"), (45, "bos"), (3, "plain")),
    ((10, "fragment"), (30, "prompted")),
)


def oracle_nll(step: Case) -> Tensor:
    """−ln p (N,) of the true token at each masked position, by the oracle, which has no cache, batch or module.

    Each block alone: the denoiser after what the context tower has read of the document.
    """
    context, denoiser = step.model.towers()
    assert step.model.time is not None
    found, seen = [], None
    for row, _, first, lo, hi in blocks_of(step.batch, step.block_size):
        seen = None if lo == first else seen
        block, masked = step.batch.tokens[row, lo:hi], step.noise.masked[row, lo:hi]
        if masked.any():
            time = conditioning(step.model.time, float(step.noise.t[row, lo // step.block_size]))
            past = seen_by_denoiser(step.model, seen)
            logits, _ = read(denoiser, block.masked_fill(masked, MASK).tolist(), past, causal=False, time=time)
            found.append(F.cross_entropy(logits[masked], block[masked], reduction="none"))
        _, seen = read(context, block.tolist(), seen)
    return torch.cat(found)


def oracle_next_nll(step: Case) -> Tensor:
    """−ln p (N,) of the tokens after the first of each document, by the oracle."""
    found = []
    for row, owner in enumerate(step.batch.document):
        for number in range(int(owner.max()) + 1):
            tokens = step.batch.tokens[row, (owner == number) & step.batch.text[row]]
            logits, _ = read(step.model.context, tokens.tolist())
            found.append(F.cross_entropy(logits[:-1], tokens[1:], reduction="none"))
    return torch.cat(found)


def check(step: Case, label: str, nll: Tensor, next_nll: Tensor) -> None:
    """The denoising loss with the context's next-token loss, and the latter alone: all gradients of both towers."""
    training = objective(step.model, train_context=True, ar_weight=0.3)
    naive = nll.sum() + 0.3 * next_nll.mean() * step.noise.masked.sum()
    same(training(step.batch, step.noise, step.block_size), naive, step.model, EXACT, label)
    alone = AutoregressiveObjective(step.model.context)
    same(alone(step.batch, None, step.block_size), next_nll.sum(), step.model.context, EXACT, f"{label}, next tokens")


def check_by_generation(step: Case, label: str) -> None:
    """Compares with the verbs of generation."""
    check(step, label, naive_nll(*step, by="extend"), naive_next_token_nll(step.model, step.batch))


@pytest.mark.proves("training gradient = reference")
@pytest.mark.parametrize("name", slow_but(CORE))
def test_gradients_of_every_family(name: str) -> None:
    step = case(backbone=name, rows=ROWS)
    check(step, name, oracle_nll(step), oracle_next_nll(step))


@pytest.mark.parametrize("name", slow_but(("hybrid, fewer experts",), SHAPED))
def test_gradients_of_denoisers_that_lack_layers(name: str) -> None:
    """Of both towers, and with activation checkpointing and a frozen context tower, of the denoiser."""
    model = random_two_tower(config_of(name), 8, torch.float64)
    batch = packed(ROWS, 4, seed=1)
    step = Case(model, batch, corrupt(batch, 4, seed=4, scope="block"), 4)
    nll = oracle_nll(step)
    check(step, name, nll, oracle_next_nll(step))
    frozen = objective(model, activation_checkpointing=True)
    run = [unit.runs_context for unit in frozen.units]
    own = model.denoiser.spec
    last = max(i for i, kind in zip(own.context_layers, own.pattern, strict=True) if kind in "M*PD")
    assert run == [i <= last for i in range(model.spec.num_layers)]
    same(frozen(batch, step.noise, 4), nll.sum(), model.denoiser, EXACT, f"{name}, frozen")
    assert all(p.grad is None for p in model.context.parameters())


@pytest.mark.proves("training gradient = reference")
@pytest.mark.parametrize("name", slow_but(FAMILY_NAMES, [name for name in SHAPES if name not in CORE]))
def test_gradients_of_every_other_shape(name: str) -> None:
    """Their oracle takes a second each, in the full form."""
    check_by_generation(case(backbone=name, rows=ROWS), name)


@pytest.mark.parametrize("window", [1, 2, 4, 5, 11])
@pytest.mark.parametrize("block_size", [4, 5])
def test_windows_shorter_and_longer_than_a_block(window: int, block_size: int) -> None:
    check_by_generation(
        case(block_size=block_size, rows=ROWS, backbone="mistral", sliding_window=window), f"window {window}"
    )


def test_windows_over_many_tiles() -> None:
    """A document of three tiles of attention, so that the keys of the later tiles begin after the first key."""
    step = case(rows=(((300, "bos"), (70, "plain")),), backbone="mistral", sliding_window=21, num_hidden_layers=1)
    check_by_generation(step, "three tiles")


@pytest.mark.parametrize("name", ["llama", "qwen3"])  # a tied head, and one with its own weight
def test_a_head_in_chunks_has_factor_and_softcap(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss goes through the tower's logits; chunks of three tokens change nothing."""
    step = case(rows=ROWS, backbone=name)
    plain = naive_nll(*step, by="extend")
    for tower in step.model.towers():
        tower.spec = replace(tower.spec, logit_factor=0.5, logit_softcap=2.0)
    assert deviation(naive_nll(*step, by="extend"), plain) > 0.1
    monkeypatch.setattr(logits_module, "MAX_LOGITS", 3 * VOCAB)
    check_by_generation(step, name)


def test_a_tied_head_is_one_parameter_with_both_gradients() -> None:
    """Of the denoiser. The embedding of a frozen context tower gets none."""
    step = case(rows=ROWS, backbone="llama")
    context, denoiser = step.model.towers()
    training = objective(step.model)
    names = {name for name, _ in training.named_parameters()}
    assert {"embeddings.weight", "context_embeddings.weight"} <= names
    assert not names & {"head.weight", "context_head.weight"}
    training(*step[1:]).backward()
    assert all(p.grad is None for p in context.parameters())
    weight = denoiser.embeddings.weight
    both = weight.grad
    assert both is not None
    weight.grad = None
    head = weight.detach().clone().requires_grad_()  # the two uses with a weight each
    hidden, _ = training.hidden(*step[1:])
    logits = hidden[step.noise.masked] @ head.T
    F.cross_entropy(logits, step.batch.tokens[step.noise.masked], reduction="sum").backward()
    assert weight.grad is not None
    assert head.grad is not None
    assert weight.grad.any()
    assert deviation(weight.grad + head.grad, both) < EXACT
