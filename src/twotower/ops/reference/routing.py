"""The router of a mixture of experts: scores, selection within the best groups, weights of the selected experts."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower.ops.precision import accumulation_dtype
from twotower.specs import RouterScores


class Routing(NamedTuple):
    """Routing parameters of an MoE layer.

    n_group: groups of experts, of which the topk_group best are kept. top: experts per token. normalise: whether the
    selected scores are normalised to sum 1. factor: multiplies the expert weights. scores: of the router's logits.
    """

    n_group: int
    topk_group: int
    top: int
    normalise: bool
    factor: float
    scores: RouterScores = "sigmoid"


def route(hidden: Tensor, weight: Tensor, bias: Tensor | None, rule: Routing) -> tuple[Tensor, Tensor]:
    """Selects experts: hidden (T, H), weight (E, H), bias (E,) or None → expert ids (T, k) and their weights (T, k).

    The bias affects the selection only. Scores are in at least fp32.
    """
    acc = accumulation_dtype(hidden.dtype)
    logits = F.linear(hidden.to(acc), weight.to(acc))
    scores = torch.sigmoid(logits) if rule.scores == "sigmoid" else torch.softmax(logits, -1)
    biased = scores.detach() if bias is None else scores.detach() + bias
    if rule.n_group > 1:
        grouped = biased.unflatten(-1, (rule.n_group, weight.shape[0] // rule.n_group))
        best = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
        kept = torch.zeros_like(best, dtype=torch.bool).scatter(-1, best.topk(rule.topk_group).indices, True)
        # Masked groups score 0, not −∞, as in the published implementation; it matters if all kept scores are negative.
        biased = (grouped * kept[..., None]).flatten(-2)
    topk_ids = biased.topk(rule.top, dim=-1).indices
    topk_weights = scores.gather(-1, topk_ids)
    if rule.normalise:
        topk_weights = topk_weights / (topk_weights.sum(-1, keepdim=True) + 1e-20)
    return topk_ids, topk_weights * rule.factor


def selections(topk_ids: Tensor, experts: int) -> Tensor:
    """Expert ids, any shape → how often each expert is selected (E,). Unlike `bincount`, the host reads nothing."""
    return (topk_ids.flatten()[:, None] == torch.arange(experts, device=topk_ids.device)).sum(0)
