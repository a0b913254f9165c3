"""The C++ kernels of mixtures of experts as functions of tensors, with the signatures of their references in torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from twotower.ops.cpu.kernels import ACTIVATIONS, call, max_tokens
from twotower.ops.reference import experts as torch_experts
from twotower.ops.reference import gated_experts as torch_gated_experts
from twotower.ops.reference import int8
from twotower.ops.reference.experts import PackedPair
from twotower.ops.reference.gated_experts import NOT_PACKED, Int8Pair, PackedTriple
from twotower.ops.reference.routing import Routing
from twotower.specs import Activation, RouterScores

ROUTER_SCORES: dict[RouterScores, int] = {"sigmoid": 0, "softmax": 1}  # enum RouterScores
Matrix = tuple[Tensor | None, Tensor | None, Tensor | None]  # rows, packed copy, scales: `Matrix` in matmul.h
NO_MATRIX: Matrix = (None, None, None)


def experts(
    hidden: Tensor, topk_ids: Tensor, weight: Tensor, up: Tensor, down: Tensor, packed: PackedPair = (None, None)
) -> Tensor:
    """As `ops.reference.experts.experts_sorted`. packed: the packed copies of up and down, or None."""
    if _torch_is_faster(hidden, topk_ids, len(up), all(part is not None for part in packed)):
        return torch_experts.experts_sorted(hidden, topk_ids, weight, up, down)
    matrices = NO_MATRIX, (up, packed[0], None), (down, packed[1], None)
    return _experts(hidden, topk_ids, weight, matrices, up.shape, "relu2")


def experts_int8(
    hidden: Tensor, topk_ids: Tensor, weight: Tensor, up: Tensor, up_scale: Tensor, down: Tensor, down_scale: Tensor
) -> Tensor:
    """As `ops.reference.int8.experts_sorted`."""
    if _torch_is_faster(hidden, topk_ids, len(up), packed=True):
        return int8.experts_sorted(hidden, topk_ids, weight, up, up_scale, down, down_scale)
    matrices = NO_MATRIX, (None, up, up_scale.float()), (None, down, down_scale.float())
    return _experts(hidden, topk_ids, weight, matrices, int8.weight_shape(up, up_scale), "relu2")


def gated_experts(
    hidden: Tensor,
    topk_ids: Tensor,
    weight: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    activation: Activation,
    packed: PackedTriple = NOT_PACKED,
) -> Tensor:
    """As `ops.reference.gated_experts.gated_experts_sorted`. packed: the packed copies of the weights, or None."""
    if _torch_is_faster(hidden, topk_ids, len(up), all(part is not None for part in packed)):
        return torch_gated_experts.gated_experts_sorted(hidden, topk_ids, weight, gate, up, down, activation)
    matrices = tuple((rows, copy, None) for rows, copy in zip((gate, up, down), packed, strict=True))
    return _experts(hidden, topk_ids, weight, matrices, up.shape, activation)


def gated_experts_int8(
    hidden: Tensor,
    topk_ids: Tensor,
    weight: Tensor,
    gate: Int8Pair,
    up: Int8Pair,
    down: Int8Pair,
    activation: Activation,
) -> Tensor:
    """As `ops.reference.gated_experts.gated_experts_int8`."""
    if _torch_is_faster(hidden, topk_ids, len(up[0]), packed=True):
        return torch_gated_experts.gated_experts_int8(hidden, topk_ids, weight, gate, up, down, activation)
    matrices = tuple((None, q, scale.float()) for q, scale in (gate, up, down))
    return _experts(hidden, topk_ids, weight, matrices, int8.weight_shape(*up), activation)


def _torch_is_faster(hidden: Tensor, topk_ids: Tensor, experts: int, packed: bool) -> bool:
    """Compares the average number of tokens per expert with the limit of the kernels."""
    return topk_ids.numel() > max_tokens(hidden.dtype, packed=packed) * experts


def _experts(
    hidden: Tensor,
    topk_ids: Tensor,
    weight: Tensor,
    matrices: Sequence[Matrix],
    shape: Sequence[int],
    activation: Activation,
) -> Tensor:
    """matrices: gate, up and down. shape: (E, I, H) of up."""
    hidden, topk_ids, weight = hidden.contiguous(), topk_ids.contiguous(), weight.float().contiguous()
    out = torch.empty_like(hidden)
    parts = [part for matrix in matrices for part in matrix]
    sizes = *topk_ids.shape, *shape, ACTIVATIONS[activation]
    call("experts_", hidden, hidden, topk_ids, weight, *parts, out, *sizes)
    return out


def route(hidden: Tensor, weight: Tensor, bias: Tensor | None, rule: Routing) -> tuple[Tensor, Tensor]:
    """As `ops.reference.routing.route`; of equal scores the lower expert id wins."""
    hidden, bias = hidden.contiguous(), None if bias is None else bias.float()
    tokens = len(hidden)
    topk_ids = torch.empty(tokens, rule.top, dtype=torch.long)
    topk_weights = torch.empty(tokens, rule.top)
    groups = rule.n_group, rule.topk_group, rule.top, int(rule.normalise), ROUTER_SCORES[rule.scores]
    sizes = tokens, *weight.shape[::-1], *groups, rule.factor
    call("route_", hidden, hidden, weight, bias, topk_ids, topk_weights, *sizes)
    return topk_ids, topk_weights
