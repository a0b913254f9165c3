"""The C++ kernels of mixtures of experts as functions of tensors, with the signatures of their references in torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from twotower.ops.cpu.kernels import ACTIVATIONS, MAX_TOKENS, Storage, call, max_tokens
from twotower.ops.reference import experts as torch_experts
from twotower.ops.reference import int4, int8
from twotower.ops.reference.experts import NOT_PACKED, Packed
from twotower.ops.reference.int8 import Int8Pair
from twotower.ops.reference.routing import Routing
from twotower.specs import Activation, RouterScores

ROUTER_SCORES: dict[RouterScores, int] = {"sigmoid": 0, "softmax": 1}  # enum RouterScores
Matrix = tuple[Tensor | None, Tensor | None, Tensor | None]  # rows, packed copy, scales: `Matrix` in matmul.h


def experts(
    hidden: Tensor,
    topk_ids: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down: Tensor,
    activation: Activation,
    packed: Packed = NOT_PACKED,
) -> Tensor:
    """As `ops.reference.experts.experts_sorted`. packed: the packed copies of the weights, or None."""
    matrices = [(rows, copy, None) for rows, copy in zip((gate, up, down), packed, strict=True)]
    all_packed = all(rows is None or copy is not None for rows, copy, _ in matrices)
    if _torch_is_faster(hidden, topk_ids, len(up), "packed" if all_packed else "rows"):
        return torch_experts.experts_sorted(hidden, topk_ids, weight, gate, up, down, activation)
    return _experts(hidden, topk_ids, weight, matrices, up.shape, activation)


def experts_int8(
    hidden: Tensor,
    topk_ids: Tensor,
    weight: Tensor,
    gate: Int8Pair | None,
    up: Int8Pair,
    down: Int8Pair,
    activation: Activation,
) -> Tensor:
    """As `ops.reference.int8.experts_sorted`."""
    if _torch_is_faster(hidden, topk_ids, len(up[0]), "quantized"):
        return int8.experts_sorted(hidden, topk_ids, weight, gate, up, down, activation)
    return _experts(hidden, topk_ids, weight, _of_int8(gate, up, down), int8.weight_shape(*up), activation)


def experts_int4(
    hidden: Tensor,
    topk_ids: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down: Tensor,
    width: int,
    activation: Activation,
) -> Tensor:
    """As `ops.reference.int4.experts_sorted`."""
    if _torch_is_faster(hidden, topk_ids, len(up), "quantized"):
        return int4.experts_sorted(hidden, topk_ids, weight, gate, up, down, width, activation)
    shape = len(up), width, hidden.shape[1]
    return _experts(hidden, topk_ids, weight, _of_int4(gate, up, down), shape, activation)


def experts_w8a8(
    hidden: Tensor,
    topk_ids: Tensor,
    weight: Tensor,
    gate: Int8Pair | None,
    up: Int8Pair,
    down: Int8Pair,
    activation: Activation,
) -> Tensor:
    """As `ops.reference.integer.experts_w8a8`."""
    matrices, shape = _of_int8(gate, up, down), int8.weight_shape(*up)
    return _experts(hidden, topk_ids, weight, matrices, shape, activation, int8_activations=True)


def experts_w4a8(
    hidden: Tensor,
    topk_ids: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down: Tensor,
    width: int,
    activation: Activation,
) -> Tensor:
    """As `ops.reference.integer.experts_w4a8`."""
    matrices, shape = _of_int4(gate, up, down), (len(up), width, hidden.shape[1])
    return _experts(hidden, topk_ids, weight, matrices, shape, activation, int8_activations=True)


def _of_int8(*pairs: Int8Pair | None) -> list[Matrix]:
    return [(None, None, None) if pair is None else (None, pair[0], pair[1].float()) for pair in pairs]


def _of_int4(*every: Tensor | None) -> list[Matrix]:
    return [(None, data, data) for data in every]  # the scales are in the data


def _torch_is_faster(hidden: Tensor, topk_ids: Tensor, experts: int, storage: Storage) -> bool:
    """Compares the average number of tokens per expert with the limit of the kernels."""
    return topk_ids.numel() > max_tokens(hidden.dtype, storage) * experts


def _experts(
    hidden: Tensor,
    topk_ids: Tensor,
    weight: Tensor,
    matrices: Sequence[Matrix],
    shape: Sequence[int],
    activation: Activation,
    int8_activations: bool = False,
) -> Tensor:
    """matrices: gate, up and down. shape: (E, I, H) of up."""
    hidden, topk_ids, weight = hidden.contiguous(), topk_ids.contiguous(), weight.float().contiguous()
    out = torch.empty_like(hidden)
    parts = [part for matrix in matrices for part in matrix]
    options = *topk_ids.shape[1:], *shape, ACTIVATIONS[activation], int(int8_activations)
    tokens = zip(*(part.split(MAX_TOKENS) for part in (hidden, topk_ids, weight, out)), strict=True)
    for some, ids, weights, to in tokens:
        call("experts_", hidden, some, ids, weights, *parts, to, len(some), *options)
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
