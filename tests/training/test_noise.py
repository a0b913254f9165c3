"""Masks are a pure function of seed and row, only in trained blocks, with probability t."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
import torch
from packed import ROWS, packed
from torch import Tensor

from twotower.errors import ArgumentError
from twotower.training.data import Batch
from twotower.training.noise import LOWEST_NOISE, NOISE_SCOPES, Corruption, NoiseScope, corrupt

SCOPES = pytest.mark.parametrize("scope", NOISE_SCOPES)


def wide(rows: int, length: int, first_index: int = 0, documents: int = 1) -> Batch:
    """Rows of plain documents in which every position is masked."""
    return packed([[(length // documents, "plain")] * documents] * rows, 4, offset="fixed", first_index=first_index)


def same(a: Corruption, b: Corruption) -> bool:
    return torch.equal(a.t, b.t) and torch.equal(a.masked, b.masked)


@SCOPES
def test_noise_is_a_function_of_seed_and_row_number(scope: NoiseScope) -> None:
    """Noise does not depend on the batch, the order of rows or the tokens."""
    batch = packed(ROWS, first_index=40)
    noise = corrupt(batch, 4, 3, scope)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for r in range(len(batch)):
        assert same(corrupt(batch.rows(slice(r, r + 1)), 4, 3, scope), noise.rows(slice(r, r + 1)))
    assert torch.equal(torch.get_rng_state(), before)  # no global generator is used
    turned = Batch(*(value.flip(0) for value in vars(batch).values() if value is not None))
    assert same(corrupt(turned, 4, 3, scope), Corruption(noise.t.flip(0), noise.masked.flip(0)))
    assert same(corrupt(replace(batch, tokens=batch.tokens + 1), 4, 3, scope), noise)
    for other in (corrupt(batch, 4, 4, scope), corrupt(packed(ROWS, first_index=50), 4, 3, scope)):
        assert not torch.equal(other.t, noise.t)
        assert not torch.equal(other.masked, noise.masked)


@SCOPES
def test_only_trained_blocks_are_masked_and_all_of_them(scope: NoiseScope) -> None:
    """Padding and context are not masked; a trained first token and repeated EOS are."""
    batch = packed()
    ever = torch.zeros_like(batch.denoised)
    for seed in range(120):
        ever |= corrupt(batch, 4, seed, scope).masked
    assert torch.equal(ever, batch.denoised)
    assert (ever & ~batch.text).any()


def test_what_shares_a_level() -> None:
    batch = packed()
    owner = batch.document.unflatten(1, (-1, 4)).amax(-1)
    row, document, block = (corrupt(batch, 4, 0, scope).t for scope in get_args(NoiseScope))
    assert (row == row[:, :1]).all()
    assert len(row[:, 0].unique()) == len(row)
    for r in range(len(batch)):
        levels = [document[r, owner[r] == number].unique() for number in range(int(owner[r].max()) + 1)]
        assert [len(level) for level in levels] == [1] * len(levels)
        assert len(torch.cat(levels).unique()) == len(levels) > 1
        assert len(block[r].unique()) == block.shape[1]


@SCOPES
def test_each_token_is_masked_with_probability_t(scope: NoiseScope) -> None:
    """In every document of every row, independently of neighbours."""
    batch = wide(rows=24, length=1600, documents=2)
    noise = corrupt(batch, 4, 0, scope)
    level = noise.t.repeat_interleave(4, 1)
    excess = noise.masked.float() - level
    for number in range(2):
        own = batch.document == number
        deviations = (excess * own).sum(1) / (level * (1 - level) * own).sum(1).sqrt()
        assert deviations.abs().max() < 4
    together = excess[:, :-1] * excess[:, 1:]
    assert (together.sum() / together.square().sum().sqrt()).abs() < 4


@SCOPES
@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_levels_are_uniform_and_evenly_spread(scope: NoiseScope, seed: int) -> None:
    """Levels over [1e-3, 1], of successive rows or of the blocks of a row, have no large gap."""
    batch = wide(rows=2 if scope == "block" else 200, length=1600 if scope == "block" else 8)
    t = corrupt(batch, 4, seed, scope).t
    assert t.dtype == torch.float32
    levels = t[0] if scope == "block" else t[:, 0]
    assert levels.min() >= LOWEST_NOISE
    assert levels.max() <= 1
    # Documents of different rows are drawn at random, so they pass a Kolmogorov–Smirnov test at 1e-4.
    distance = furthest_from_uniform(levels)
    assert distance < (2.23 / 200**0.5 if scope == "document" else 3 / len(levels))


def furthest_from_uniform(levels: Tensor) -> float:
    """The Kolmogorov–Smirnov distance from the uniform distribution on [1e-3, 1]."""
    ordered = (levels.double().sort().values - LOWEST_NOISE) / (1 - LOWEST_NOISE)
    rank = torch.arange(1, len(ordered) + 1, dtype=torch.float64) / len(ordered)
    return float((ordered - rank).abs().max())


def test_levels_go_on_evenly_in_long_runs_and_long_rows() -> None:
    far = corrupt(wide(rows=100, length=8, first_index=10**9), 4, 0, "row").t[:, 0]
    assert furthest_from_uniform(far) < 3 / 100
    many = packed([[(4, "plain")] * 60], 4, offset="fixed")
    assert furthest_from_uniform(corrupt(many, 4, 0, "document").t[0]) < 4 / 60


def test_an_unknown_scope_is_an_error() -> None:
    with pytest.raises(ArgumentError, match=r"noise scope is 'token'; choose one of row, document, block"):
        corrupt(packed(), 4, 0, "token")  # type: ignore[arg-type]


def test_noise_is_cut_with_its_batch() -> None:
    noise = corrupt(packed(), 4, 0, "block")
    part = noise.rows(slice(1, 3)).to(torch.device("cpu"))
    assert torch.equal(part.t, noise.t[1:])
    assert torch.equal(part.masked, noise.masked[1:])
