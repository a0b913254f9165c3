"""Mixture-of-experts matmuls with gated experts: down(act(gate·x) · up·x), weighted and summed.

hidden (T, H); topk_ids (T, k) expert ids; weight (T, k); gate, up (E, I, H); down (E, H, I) → (T, H). packed: packed
copies of `gate`, `up` and `down` for the CPU kernels, ignored here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower.ops.reference import int8
from twotower.ops.reference.activation import activate
from twotower.ops.reference.experts import combine, group_pairs, grouped_product, loop_over_experts, weighted_sum
from twotower.specs import Activation

PackedTriple = tuple[Tensor | None, Tensor | None, Tensor | None]
NOT_PACKED: PackedTriple = (None, None, None)


def gated_experts_sorted(
    hidden: Tensor,
    topk_ids: Tensor,
    weight: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    activation: Activation,
    packed: PackedTriple = NOT_PACKED,
) -> Tensor:
    """Tokens sorted by expert, three matmuls per selected expert. Reads the counts on the host (free on a CPU)."""

    def expert_mlp(expert: int, rows: Tensor) -> Tensor:
        inner = activate(F.linear(rows, up[expert]), F.linear(rows, gate[expert]), activation)
        return F.linear(inner, down[expert])

    return loop_over_experts(hidden, topk_ids, weight, up.shape[0], expert_mlp)


def gated_experts_gathered(
    hidden: Tensor,
    topk_ids: Tensor,
    weight: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    activation: Activation,
    packed: PackedTriple = NOT_PACKED,
) -> Tensor:
    """Copies the selected experts' weights, batched matmuls: shapes depend only on T, no host read."""
    pairs = topk_ids.flatten()
    x = hidden.repeat_interleave(topk_ids.shape[1], 0)[:, :, None]  # (T·k, H, 1)
    out = down[pairs] @ activate(up[pairs] @ x, gate[pairs] @ x, activation)
    return weighted_sum(out[..., 0], weight)


def gated_experts_grouped(
    hidden: Tensor,
    topk_ids: Tensor,
    weight: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    activation: Activation,
    packed: PackedTriple = NOT_PACKED,
) -> Tensor:
    """One grouped GEMM per projection (bf16 on CUDA); the group offsets stay on the device."""
    if not len(hidden):
        return gated_experts_sorted(hidden, topk_ids, weight, gate, up, down, activation)
    order, ends = group_pairs(topk_ids, len(up))
    gathered = hidden[order // topk_ids.shape[1]]
    inner = activate(grouped_product(gathered, up, ends), grouped_product(gathered, gate, ends), activation)
    return combine(grouped_product(inner, down, ends), order, weight)


def gated_experts_dense(
    hidden: Tensor, topk_ids: Tensor, weight: Tensor, gate: Tensor, up: Tensor, down: Tensor, activation: Activation
) -> Tensor:
    """Dense reference: every expert on every token, weighted by zero where the expert is not selected."""
    share = weight.new_zeros(hidden.shape[0], up.shape[0]).scatter_add(1, topk_ids, weight)  # (T, E)
    inner = (activate(F.linear(hidden, u), F.linear(hidden, g), activation) for g, u in zip(gate, up, strict=True))
    every = torch.stack([F.linear(each, d) for each, d in zip(inner, down, strict=True)], 1)
    return (every * share[..., None]).sum(1).to(hidden.dtype)


Int8Pair = tuple[Tensor, Tensor]  # q and scale, see `int8`


def gated_experts_int8(
    hidden: Tensor,
    topk_ids: Tensor,
    weight: Tensor,
    gate: Int8Pair,
    up: Int8Pair,
    down: Int8Pair,
    activation: Activation,
) -> Tensor:
    """`gated_experts_sorted` with int8 weights."""

    def product(rows: Tensor, pair: Int8Pair, expert: int) -> Tensor:
        return int8.linear(rows, pair[0][expert], pair[1][expert])

    def expert_mlp(expert: int, rows: Tensor) -> Tensor:
        inner = activate(product(rows, up, expert), product(rows, gate, expert), activation)
        return product(inner, down, expert)

    return loop_over_experts(hidden, topk_ids, weight, len(up[0]), expert_mlp)


def gated_experts_int8_gathered(
    hidden: Tensor,
    topk_ids: Tensor,
    weight: Tensor,
    gate: Int8Pair,
    up: Int8Pair,
    down: Int8Pair,
    activation: Activation,
) -> Tensor:
    """`gated_experts_gathered`: gathers int8 and upcasts the gathered weights."""
    pairs = topk_ids.flatten()

    def product(x: Tensor, pair: Int8Pair) -> Tensor:
        wide = int8.unpack(pair[0][pairs], pair[1][pairs], x.dtype)
        return ((wide @ x[:, :, None])[:, :, 0] * pair[1][pairs]).to(x.dtype)

    x = hidden.repeat_interleave(topk_ids.shape[1], 0)
    return weighted_sum(product(activate(product(x, up), product(x, gate), activation), down), weight)


def gated_experts_int8_grouped(
    hidden: Tensor,
    topk_ids: Tensor,
    weight: Tensor,
    gate: Int8Pair,
    up: Int8Pair,
    down: Int8Pair,
    activation: Activation,
) -> Tensor:
    """`gated_experts_grouped` with all experts upcast, one projection at a time; few pairs are gathered."""
    if topk_ids.numel() < len(up[0]):
        return gated_experts_int8_gathered(hidden, topk_ids, weight, gate, up, down, activation)
    order, ends = group_pairs(topk_ids, len(up[0]))
    gathered = hidden[order // topk_ids.shape[1]]
    raised, gates = (int8.grouped_product(gathered, *pair, topk_ids, order, ends) for pair in (up, gate))
    inner = activate(raised, gates, activation)
    return combine(int8.grouped_product(inner, *down, topk_ids, order, ends), order, weight)
