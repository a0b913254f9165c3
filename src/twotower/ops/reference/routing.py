"""The router of a mixture of experts: sigmoid scores, a choice within the best groups, weights of the chosen."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower.ops.precision import accumulation_dtype


class Routing(NamedTuple):
    """n_group groups of experts, of which the topk_group best are kept; top experts a token; the chosen scores are
    normalised or not, then multiplied by factor."""

    n_group: int
    topk_group: int
    top: int
    normalise: bool
    factor: float


def route(hidden: Tensor, weight: Tensor, bias: Tensor, rule: Routing) -> tuple[Tensor, Tensor]:
    """hidden (T, H), weight (E, H), bias (E,), which acts on the selection only (spec §2) → expert ids (T, k) and their
    weights (T, k), scores in at least fp32."""
    acc = accumulation_dtype(hidden.dtype)
    scores = torch.sigmoid(F.linear(hidden.to(acc), weight.to(acc)))
    biased = scores.detach() + bias
    if rule.n_group > 1:
        grouped = biased.unflatten(-1, (rule.n_group, weight.shape[0] // rule.n_group))
        best = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
        kept = torch.zeros_like(best, dtype=torch.bool).scatter(-1, best.topk(rule.topk_group).indices, True)
        # Left-out groups score 0, not −∞: the reference's rule, which differs where all kept scores are negative.
        biased = (grouped * kept[..., None]).flatten(-2)
    choice = biased.topk(rule.top, dim=-1).indices
    chosen = scores.gather(-1, choice)
    if rule.normalise:
        chosen = chosen / (chosen.sum(-1, keepdim=True) + 1e-20)
    return choice, chosen * rule.factor
