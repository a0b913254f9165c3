"""Commit policies: which masked positions of a block become final after a pass.

A policy is a pure function of the results of one pass (`Pass`) and of one number, the policy value. It says which
positions are sure, and in what order the others would follow. `commit` turns that into progress: at least one position
a pass, and enough to finish the block in the given number of passes. `register_policy` adds to the table `POLICIES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from twotower.decoding.sampling import by_tiles
from twotower.deprecation import renamed_argument
from twotower.errors import ArgumentError
from twotower.ops.precision import upcast

KL_BOUND, KL_PASSES = 0.01, 1  # KLASS: the largest KL of a stable distribution, and in how many passes in a row
DECAYED = 0.5  # the decaying threshold in the last pass, as a share of the first


class Pass(NamedTuple):
    """The results of one pass over B rows and L positions, the input of a policy.

    logits (B, L, V): in the model's dtype, −∞ for the mask token. candidate (B, L): the tokens to commit; confidence
    (B, L): their untempered probabilities. masked (B, L): positions that are still masked. step (B, 1): each row's
    pass, from 0, of at most steps (B, 1). memory: the policy's result after the pass before, None in the first pass.
    """

    logits: Tensor
    candidate: Tensor
    confidence: Tensor
    masked: Tensor
    step: Tensor
    steps: Tensor
    memory: object = None


class Verdict(NamedTuple):
    """The result of a policy.

    sure (B, L) bool: positions to commit; only masked ones count. order (B, L): if more positions must be committed,
    the largest first, equal ones from the left. memory: for the next pass of the block.
    """

    sure: Tensor
    order: Tensor
    memory: object = None


PolicyRule = Callable[[Pass, Tensor], Verdict]  # the second argument is (B, 1), one policy value a row


@dataclass(frozen=True)
class Policy:
    """A commit policy: its rule, its source, and the meaning, default and range of its policy value."""

    name: str
    rule: PolicyRule
    value_meaning: str
    default: float
    low: float = 0.0
    high: float = math.inf
    source: str = ""


# --- rules ----------------------------------------------------------------------------------------------------------


def threshold(seen: Pass, value: Tensor) -> Verdict:
    """Commits every position whose confidence is above the policy value, as the released model does."""
    return Verdict(seen.confidence > value, seen.confidence)


def top_k(seen: Pass, value: Tensor) -> Verdict:
    """Commits the k most confident positions, where k is the policy value."""
    return Verdict(ranks(seen.confidence, seen.masked) < value, seen.confidence)


def factor(seen: Pass, value: Tensor) -> Verdict:
    """Commits the n most confident positions for the largest n with (n + 1)(1 − c₍ₙ₎) < f (c₍ₙ₎: n-th confidence)."""
    within = (ranks(seen.confidence, seen.masked) + 2) * (1 - seen.confidence) < value
    return Verdict(within, seen.confidence)


def entropy(seen: Pass, value: Tensor) -> Verdict:
    """Commits positions in order of entropy H while Σ H − max H ≤ γ nats, a bound on total correlation."""
    own = by_tiles(lambda logits: torch.special.entr(upcast(logits).softmax(-1)).sum(-1), seen.logits)
    ordered, place = own.masked_fill(~seen.masked, torch.inf).sort(dim=1, stable=True)
    # The largest of an ascending set is its last, so the sum without it is the sum of those before.
    before = torch.cat([torch.zeros_like(ordered[:, :1]), ordered[:, :-1].cumsum(1)], dim=1)
    return Verdict((before <= value).gather(1, place.argsort(1)), -own)


def margin(seen: Pass, value: Tensor) -> Verdict:
    """Commits positions where the probabilities of the best two tokens differ by more than the policy value."""
    best = by_tiles(lambda logits: upcast(logits).softmax(-1).topk(2, dim=-1).values, seen.logits)
    lead = best[..., 0] - best[..., 1]
    return Verdict(lead > value, lead)


def stability(seen: Pass, value: Tensor) -> Verdict:
    """Commits confident positions whose distribution moved by less than KL_BOUND nats since the pass before."""
    norm = by_tiles(lambda logits: upcast(logits).logsumexp(-1), seen.logits)
    match seen.memory:
        case (Tensor() as before, Tensor() as norm_before, Tensor() as since):
            moved = by_tiles(_divergence, seen.logits, norm, before, norm_before)
            still = torch.where(moved < KL_BOUND, since + 1, 0)
        case _:  # the first pass of a block
            still = torch.zeros_like(seen.masked, dtype=torch.long)
    return Verdict((still >= KL_PASSES) & (seen.confidence > value), seen.confidence, (seen.logits, norm, still))


def _divergence(logits: Tensor, norm: Tensor, before: Tensor, norm_before: Tensor) -> Tensor:
    """KL(now ‖ before) of n positions in nats (n,), from logits (n, V) and their logsumexp (n,), now and before."""
    now = upcast(logits) - norm[:, None]
    moved = now - (upcast(before) - norm_before[:, None])
    return (now.exp() * moved.masked_fill(now == -torch.inf, 0.0)).sum(-1)


def span(seen: Pass, value: Tensor) -> Verdict:
    """Commits from the left, up to the first masked position whose confidence is not above the policy value."""
    unsure = seen.masked & ~(seen.confidence > value)
    places = torch.arange(seen.masked.shape[1], 0, -1, device=seen.masked.device, dtype=seen.confidence.dtype)
    return Verdict(unsure.cumsum(1) == 0, places.expand_as(seen.confidence))


def decay(seen: Pass, value: Tensor) -> Verdict:
    """Commits above a confidence threshold that falls linearly over the passes, from the policy value to half of it."""
    done = seen.step / (seen.steps - 1).clamp(min=1)
    return Verdict(seen.confidence > value * (1 - (1 - DECAYED) * done), seen.confidence)


POLICIES: dict[str, Policy] = {}


@renamed_argument("knob", "value_meaning")
def register_policy(
    name: str,
    rule: PolicyRule,
    *,
    value_meaning: str,
    default: float,
    low: float = 0.0,
    high: float = math.inf,
    source: str = "",
) -> None:
    """Registers a rule under a name, for every place that takes the name of a policy.

    value_meaning: what the policy value is, in words, for error messages.

    Raises:
        ArgumentError: the name is taken, the rule is no function, or the default is out of range.
    """
    if not callable(rule):
        raise ArgumentError(f"policy {name!r}: the rule is {rule!r}; give a function", param="rule")
    if name in POLICIES:
        raise ArgumentError(f"policy {name!r} exists already; choose another name", param="name")
    if not low <= default <= high:
        raise ArgumentError(
            f"policy {name!r}: the default {default:g} is not between {low:g} and {high:g}", param="default"
        )
    POLICIES[name] = Policy(name, rule, value_meaning, default, low, high, source)


register_policy(
    "threshold", threshold, value_meaning="confidence", default=0.9, high=1.0, source="Nemotron-Labs-TwoTower, released"
)
register_policy("top-k", top_k, value_meaning="positions per pass", default=2, low=1, source="LLaDA (Nie et al. 2025)")
register_policy("factor", factor, value_meaning="f", default=1.0, source="Fast-dLLM (Wu et al. 2025)")
register_policy(
    "entropy",
    entropy,
    value_meaning="γ, nats",
    default=0.1,
    source="EB-Sampler (Ben-Hamu et al. 2025, arXiv 2505.24857)",
)
register_policy(
    "margin",
    margin,
    value_meaning="probability of the best less the second",
    default=0.8,
    high=1.0,
    source="top-probability margin (Kim et al. 2025, arXiv 2502.06768)",
)
register_policy(
    "klass",
    stability,
    value_meaning="confidence",
    default=0.8,
    high=1.0,
    source="KLASS (Kim et al. 2025, arXiv 2511.05664)",
)
register_policy(
    "span", span, value_meaning="confidence", default=0.8, high=1.0, source="left to right, as a draft is read"
)
register_policy(
    "decay",
    decay,
    value_meaning="confidence in the first pass",
    default=0.95,
    high=1.0,
    source="progress-aware thresholds (Mohamed et al. 2025)",
)


# --- applying them --------------------------------------------------------------------------------------------------


def ranks(score: Tensor, masked: Tensor) -> Tensor:
    """Ranks (B, L): 0 for each row's best masked position, 1 for the next; equal ones from the left."""
    return _best_first(score, masked).argsort(dim=1)


def _best_first(score: Tensor, masked: Tensor) -> Tensor:
    """Positions of each row (B, L), masked ones first, the best first, equal ones from the left."""
    return score.masked_fill(~masked, -torch.inf).argsort(dim=1, descending=True, stable=True)


def commit(verdict: Verdict, masked: Tensor, step: Tensor, steps: Tensor) -> Tensor:
    """Returns the positions to commit, bool (B, L): the k first masked ones of each row, sure ones before others.

    k = min(#masked, max(#sure, 1, ⌈#masked / (steps − step)⌉)); the last pass commits all.
    """
    left = masked.sum(1, keepdim=True)
    sure = masked & verdict.sure
    due = -(-left // (steps - step))
    count = torch.minimum(left, torch.maximum(sure.sum(1, keepdim=True), due.clamp(min=1)))
    # Two stable sorts order by both keys: by order, then sure ones first.
    by_order = _best_first(verdict.order, masked)
    by_both = by_order.gather(1, sure.gather(1, by_order).byte().argsort(dim=1, descending=True, stable=True))
    return masked & (by_both.argsort(dim=1) < count)


def decide(name: str, seen: Pass, values: Tensor) -> tuple[Tensor, object]:
    """The positions that rows of one policy commit, bool (B, L), and the policy's memory for their next pass."""
    verdict = POLICIES[name].rule(seen, values)
    return commit(verdict, seen.masked, seen.step, seen.steps), verdict.memory
