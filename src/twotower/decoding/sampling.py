"""Choosing tokens and measuring confidence: pure, per row, vectorised.

Randomness is counter-based: a row's noise is a function of (seed, absolute position, purpose, step) and the
token id, never of a generator's history. Batching, preemption, resuming and verification rest on that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from twotower.ops.host_transfer import to_device_async
from twotower.ops.precision import accumulation_dtype, upcast
from twotower.ops.registry import select

# What a draw is for; part of the noise's key.
AR_TOKEN = 1
DIFFUSION_CANDIDATE = 2

TILE_BYTES = 8 << 20
_GOLDEN = -7046029254386353131  # 2⁶⁴/φ as a signed 64-bit integer


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Row-wise sampling parameters: seeds (B,); one temperature and filter for all rows."""

    seeds: Tensor
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None


class SamplingRule(NamedTuple):
    """How a row samples."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None


class NoiseKeys(NamedTuple):
    """What the noise of B rows and L positions is keyed by: seeds (B,), absolute positions (B, L), purpose and step
    (B, 1)."""

    seeds: Tensor
    positions: Tensor
    purpose: Tensor
    step: Tensor

    def select(self, rows: Tensor) -> NoiseKeys:
        return NoiseKeys(*(part[rows] for part in self))


def sample_rows(logits: Tensor, rules: Sequence[SamplingRule], keys: Callable[[], NoiseKeys]) -> tuple[Tensor, Tensor]:
    """`pick` with a rule for each row of logits (B, L, V) → tokens and the confidence in them (B, L).

    keys: called only if some row samples.
    """
    if all(rule.temperature <= 0 for rule in rules):
        return greedy(logits)
    known = keys()
    if len(set(rules)) == 1:
        return _pick_by(rules[0], logits, known)
    tokens = torch.empty_like(known.positions)
    sure = torch.empty(known.positions.shape, dtype=accumulation_dtype(logits.dtype), device=logits.device)
    for rule in set(rules):
        rows = to_device_async([i for i, own in enumerate(rules) if own == rule], logits.device)
        tokens[rows], sure[rows] = _pick_by(rule, logits[rows], known.select(rows))
    return tokens, sure


def _pick_by(rule: SamplingRule, logits: Tensor, keys: NoiseKeys) -> tuple[Tensor, Tensor]:
    sampling = Sampling(seeds=keys.seeds, **rule._asdict())
    return pick(logits, sampling, keys.positions, keys.purpose, keys.step)


def greedy(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The most probable token of each position of logits (B, L, V), and the confidence in it, in one reading."""
    tokens, sure = select("argmax", logits.device, logits.dtype).function(logits)
    return tokens, sure


def pick(
    logits: Tensor, sampling: Sampling, positions: Tensor, purpose: int | Tensor, step: int | Tensor = 0
) -> tuple[Tensor, Tensor]:
    """`choose`, and the `confidence` in what was chosen; greedily both in one reading of the logits."""
    if sampling.temperature <= 0:
        return greedy(logits)
    tokens = choose(logits, sampling, positions, purpose, step)
    return tokens, confidence(logits, tokens)


def choose(
    logits: Tensor, sampling: Sampling, positions: Tensor, purpose: int | Tensor, step: int | Tensor = 0
) -> Tensor:
    """logits (B, L, V), absolute positions (B, L); purpose and step, or one a row (B, 1) → token ids (B, L).

    Temperature ≤ 0: the largest logit. Otherwise a Gumbel-max sample of softmax(logits / temperature), filtered.
    """
    if sampling.temperature <= 0:
        return logits.argmax(-1)

    def sample(logits: Tensor, seeds: Tensor, positions: Tensor, purpose: Tensor, step: Tensor) -> Tensor:
        scaled = filtered(logits.double() / sampling.temperature, sampling.top_k, sampling.top_p)
        uniform = noise(seeds, positions[:, None], purpose[:, None], step[:, None], logits.shape[-1])[:, 0]
        return (scaled - torch.log(-torch.log(uniform))).argmax(-1)

    zeros = torch.zeros_like(positions)
    return by_tiles(sample, logits, zeros + sampling.seeds[:, None], positions, zeros + purpose, zeros + step)


def confidence(logits: Tensor, tokens: Tensor) -> Tensor:
    """The untempered, unfiltered probability of each token: logits (B, L, V), tokens (B, L) → (B, L)."""

    def probability(logits: Tensor, tokens: Tensor) -> Tensor:
        wide = upcast(logits)
        return (wide.gather(-1, tokens[..., None])[..., 0] - wide.logsumexp(-1)).exp()

    return by_tiles(probability, logits, tokens)


def by_tiles(function: Callable[..., Tensor], logits: Tensor, *others: Tensor) -> Tensor:
    """`function` of logits (B, L, V) and others (B, L, …), a few positions at a time: function((n, V), (n, …), …) →
    (n, …). So what it makes of the logits in a wider type is never larger than `TILE_BYTES`, or one position."""
    flat = [part.flatten(0, 1) for part in (logits, *others)]
    count = max(TILE_BYTES // (8 * logits.shape[2]), 1)
    outs = [function(*(part[at : at + count] for part in flat)) for at in range(0, max(len(flat[0]), 1), count)]
    joined: Tensor = torch.cat(outs).unflatten(0, logits.shape[:2])
    return joined


def filtered(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Logits with what top-k, then top-p, leave out set to −∞.

    Top-k keeps ties of the k-th largest. Top-p keeps the smallest set of most probable tokens (of those top-k
    left) whose probabilities sum to more than p.
    """
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p is not None and top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        probs = ordered.softmax(-1)
        before = probs.cumsum(-1) - probs  # what more probable tokens sum to
        logits = logits.masked_fill((before > top_p).gather(-1, order.argsort(-1)), -torch.inf)
    return logits


def noise(seeds: Tensor, positions: Tensor, purpose: int | Tensor, step: int | Tensor, size: int) -> Tensor:
    """Uniform numbers in (0, 1), float64: seeds (B,), positions (B, L), purpose, step (or (B, 1)) → (B, L, size)."""
    key, zeros = _mix(seeds)[:, None], torch.zeros_like(positions)
    for part in (positions, zeros + purpose, zeros + step):
        key = _mix(key + _GOLDEN * (part + 1))
    counters = torch.arange(1, size + 1, device=positions.device) * _GOLDEN
    bits = _shift(_mix(key[..., None] + counters), 11)  # 53 bits
    return (bits.double() + 0.5) * 2.0**-53


def _mix(z: Tensor) -> Tensor:
    """splitmix64's finaliser (Steele et al. 2014) on int64, which wraps around as uint64 does."""
    z = (z ^ _shift(z, 30)) * -4658895280553007687
    z = (z ^ _shift(z, 27)) * -7723592293110705685
    return z ^ _shift(z, 31)


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
