"""Sampling of tokens and their confidence: pure functions, vectorised over rows.

Noise is counter-based: a function of (seed, absolute position, purpose, step, token id), without generator state.
Therefore a row samples the same in any batch and after preemption, and verified decoding samples as AR does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from twotower.ops.host_transfer import to_device_async
from twotower.ops.precision import accumulation_dtype, upcast
from twotower.ops.registry import select

# Purposes of noise; part of its key.
AR_TOKEN = 1
DIFFUSION_CANDIDATE = 2

TILE_BYTES = 8 << 20
LEAST_TEMPERATURE = 1e-250  # the division by a lower one could overflow
_GOLDEN = -7046029254386353131  # 2⁶⁴/φ as a signed 64-bit integer


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Sampling parameters of a batch: seeds (B,); one temperature and one filter for all rows."""

    seeds: Tensor
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float = 0.0


class SamplingRule(NamedTuple):
    """Sampling parameters of one row."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float = 0.0


class NoiseKeys(NamedTuple):
    """Keys of the noise of B rows and L positions: seeds (B,), absolute positions (B, L), purpose and step (B, 1)."""

    seeds: Tensor
    positions: Tensor
    purpose: Tensor
    step: Tensor

    def select(self, rows: Tensor) -> NoiseKeys:
        return NoiseKeys(*(part[rows] for part in self))

    def at(self, place: int) -> NoiseKeys:
        """The keys of one position of each row."""
        return self._replace(positions=self.positions[:, place : place + 1])


def all_greedy(rules: Sequence[SamplingRule]) -> bool:
    """Whether every row takes the largest logit."""
    return all(rule.temperature <= 0 for rule in rules)


def sample_rows(logits: Tensor, rules: Sequence[SamplingRule], keys: Callable[[], NoiseKeys]) -> tuple[Tensor, Tensor]:
    """Chooses tokens from logits (B, L, V), with a rule a row → tokens and their confidence (B, L).

    keys: called only if a row's temperature is above 0.
    """
    if all_greedy(rules):
        return argmax_with_confidence(logits)
    known = keys()
    if len(set(rules)) == 1:
        return _sample_by(rules[0], logits, known)
    tokens = torch.empty_like(known.positions)
    sure = torch.empty(known.positions.shape, dtype=accumulation_dtype(logits.dtype), device=logits.device)
    for rule in set(rules):
        rows = to_device_async([i for i, own in enumerate(rules) if own == rule], logits.device)
        tokens[rows], sure[rows] = _sample_by(rule, logits[rows], known.select(rows))
    return tokens, sure


def _sample_by(rule: SamplingRule, logits: Tensor, keys: NoiseKeys) -> tuple[Tensor, Tensor]:
    sampling = Sampling(seeds=keys.seeds, **rule._asdict())
    return sample_with_confidence(logits, sampling, keys.positions, keys.purpose, keys.step)


def argmax_with_confidence(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The most probable token of each position of logits (B, L, V), and its confidence, in one pass over the logits."""
    tokens, sure = select("argmax", logits.device, logits.dtype).function(logits)
    return tokens, sure


def sample_with_confidence(
    logits: Tensor, sampling: Sampling, positions: Tensor, purpose: int | Tensor, step: int | Tensor = 0
) -> tuple[Tensor, Tensor]:
    """Tokens as from `sample`, and their `confidence`. At temperature ≤ 0, one pass over the logits gives both."""
    if sampling.temperature <= 0:
        return argmax_with_confidence(logits)
    tokens = sample(logits, sampling, positions, purpose, step)
    return tokens, confidence(logits, tokens)


def sample(
    logits: Tensor, sampling: Sampling, positions: Tensor, purpose: int | Tensor, step: int | Tensor = 0
) -> Tensor:
    """Chooses token ids (B, L) from logits (B, L, V) at absolute positions (B, L).

    purpose, step: one number, or one a row (B, 1). Temperature ≤ 0: the largest logit. Otherwise a Gumbel-max sample of
    softmax(logits / temperature), filtered by min-p, top-k and top-p.
    """
    if sampling.temperature <= 0:
        return logits.argmax(-1)

    def gumbel_max(logits: Tensor, seeds: Tensor, positions: Tensor, purpose: Tensor, step: Tensor) -> Tensor:
        scaled = filtered(
            logits.double() / max(sampling.temperature, LEAST_TEMPERATURE),
            sampling.top_k,
            sampling.top_p,
            sampling.min_p,
        )
        uniform = noise(seeds, positions[:, None], purpose[:, None], step[:, None], logits.shape[-1])[:, 0]
        return (scaled - torch.log(-torch.log(uniform))).argmax(-1)

    zeros = torch.zeros_like(positions)
    return by_tiles(gumbel_max, logits, zeros + sampling.seeds[:, None], positions, zeros + purpose, zeros + step)


def confidence(logits: Tensor, tokens: Tensor) -> Tensor:
    """The untempered, unfiltered probability of each token: logits (B, L, V), tokens (B, L) → (B, L)."""

    def probability(logits: Tensor, tokens: Tensor) -> Tensor:
        wide = upcast(logits)
        return (wide.gather(-1, tokens[..., None])[..., 0] - wide.logsumexp(-1)).exp()

    return by_tiles(probability, logits, tokens)


def by_tiles(function: Callable[..., Tensor], logits: Tensor, *others: Tensor) -> Tensor:
    """Applies `function` to logits (B, L, V) and others (B, L, …), a few positions at a time.

    function((n, V), (n, …), …) → (n, …). The tiles bound the size of upcast logits to `TILE_BYTES` or one position.
    """
    flat = [part.flatten(0, 1) for part in (logits, *others)]
    count = max(TILE_BYTES // (8 * logits.shape[2]), 1)
    outs = [function(*(part[at : at + count] for part in flat)) for at in range(0, max(len(flat[0]), 1), count)]
    joined: Tensor = torch.cat(outs).unflatten(0, logits.shape[:2])
    return joined


def filtered(logits: Tensor, top_k: int | None, top_p: float | None, min_p: float = 0.0) -> Tensor:
    """Logits in which tokens outside min-p, then outside top-k, then outside top-p, are −∞.

    Min-p keeps tokens with at least p times the probability of the most probable token (Nguyen et al. 2024). Top-k
    keeps ties of the k-th largest logit. Top-p keeps the smallest set of the most probable remaining tokens whose
    probabilities sum to more than p.
    """
    if min_p > 0:
        logits = logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(min_p), -torch.inf)
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p is not None and top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        probs = ordered.softmax(-1)
        before = probs.cumsum(-1) - probs  # sum over the more probable tokens
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
