"""Mixture-of-experts matmuls: each token passes through its selected experts, weighted and summed.

An expert computes down(act(gate·x) · up·x), or down(act(up·x)) without a gate. hidden (T, H); topk_ids (T, k) expert
ids; weight (T, k); gate (E, I, H) or None; up (E, I, H); down (E, H, I) → (T, H). packed: packed copies of `gate`, `up`
and `down` for the CPU kernels, ignored here. No backend loads an expert that no token selected, and none synchronizes
the host once per expert. `int8` has the same functions for int8 weights.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower.ops.reference.activation import activate
from twotower.ops.reference.routing import selections
from twotower.specs import Activation

Packed = tuple[Tensor | None, Tensor | None, Tensor | None]
NOT_PACKED: Packed = (None, None, None)
GATHERED = 2**28  # values of weights that `experts_gathered` copies at a time: 1 GiB in fp32
Matrices = TypeVar("Matrices")  # the matrices of all experts: a tensor, or int8 values and scales


def experts_sorted(
    hidden: Tensor,
    topk_ids: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down: Tensor,
    activation: Activation,
    packed: Packed = NOT_PACKED,
) -> Tensor:
    """Tokens sorted by expert, two or three matmuls per selected expert.

    Reads the counts on the host (free on a CPU).
    """
    gates, ups, downs = (None if matrices is None else _of_each(matrices) for matrices in (gate, up, down))
    assert ups is not None
    assert downs is not None

    def mlp(expert: int, rows: Tensor) -> Tensor:
        own = None if gates is None else gates[expert]
        return expert_mlp(rows, own, ups[expert], downs[expert], activation, F.linear)

    return loop_over_experts(hidden, topk_ids, weight, len(up), mlp)


def _of_each(matrices: Tensor) -> Tensor | tuple[Tensor, ...]:
    """The matrices by number of the expert. Those that train are views of one operation, with one stacked gradient.

    The backward pass of `matrices[expert]` would write the gradients of all experts, once for each selected one.
    """
    return matrices.unbind(0) if matrices.requires_grad and torch.is_grad_enabled() else matrices


def expert_mlp(
    x: Tensor,
    gate: Matrices | None,
    up: Matrices,
    down: Matrices,
    activation: Activation,
    product: Callable[[Tensor, Matrices], Tensor],
) -> Tensor:
    """down(act(gate·x) · up·x), or down(act(up·x)) without a gate, with product(x, matrices)."""
    inner = product(x, up)
    inner = activate(inner, None if gate is None else product(x, gate), activation)
    return product(inner, down)


def loop_over_experts(
    hidden: Tensor, topk_ids: Tensor, weight: Tensor, experts: int, mlp: Callable[[int, Tensor], Tensor]
) -> Tensor:
    """The mixture, with mlp(expert, its tokens (n, H)) → (n, H)."""
    flat = topk_ids.flatten()
    order = flat.argsort(stable=True)
    counts = _tokens_of_each(flat, experts)
    gathered = hidden[order // topk_ids.shape[1]]  # (T·k, H), grouped by expert
    parts = [mlp(expert, rows) for expert, rows in enumerate(gathered.split(counts)) if counts[expert]]
    # Without tokens the weights still get a zero gradient: FSDP processes wait for each other's gradients.
    return combine(torch.cat(parts) if parts else mlp(0, gathered), order, weight)


def _tokens_of_each(choices: Tensor, experts: int) -> list[int]:
    """The number of choices (n,) of each expert, on the host; an even share on the meta device."""
    if choices.is_meta:
        count = choices.numel()
        return [count * (expert + 1) // experts - count * expert // experts for expert in range(experts)]
    counts: list[int] = torch.bincount(choices, minlength=experts).tolist()
    return counts


def experts_gathered(
    hidden: Tensor,
    topk_ids: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down: Tensor,
    activation: Activation,
    packed: Packed = NOT_PACKED,
) -> Tensor:
    """Copies the selected experts' weights, batched matmuls: shapes depend only on T, no host read.

    Copies at most GATHERED values of a projection at a time.
    """
    each, pairs = max(GATHERED // up[0].numel(), 1), topk_ids.numel()
    if pairs <= each:
        return experts_at_once(hidden, topk_ids, weight, gate, up, down, activation)
    x = _rows_of_pairs(hidden, topk_ids)
    parts = [
        expert_mlp(rows, gate, up, down, activation, partial(_product_of_pairs, pairs=own))
        for rows, own in zip(x.split(each), topk_ids.flatten().split(each), strict=True)
    ]
    return weighted_sum(torch.cat(parts)[..., 0], weight)


def experts_at_once(
    hidden: Tensor,
    topk_ids: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down: Tensor,
    activation: Activation,
) -> Tensor:
    """`experts_gathered` in one part. No shape decides what is computed, so a trace is valid for any T."""
    product = partial(_product_of_pairs, pairs=topk_ids.flatten())
    out = expert_mlp(_rows_of_pairs(hidden, topk_ids), gate, up, down, activation, product)
    return weighted_sum(out[..., 0], weight)


def _rows_of_pairs(hidden: Tensor, topk_ids: Tensor) -> Tensor:
    """The tokens (T, H), once for each of their experts (T, k) → (T·k, H, 1)."""
    return hidden.repeat_interleave(topk_ids.shape[1], 0)[:, :, None]


def _product_of_pairs(x: Tensor, matrices: Tensor, pairs: Tensor) -> Tensor:
    """x (n, in, 1) times copies of the matrices of experts `pairs` (n,)."""
    return matrices[pairs] @ x


def experts_grouped(
    hidden: Tensor,
    topk_ids: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down: Tensor,
    activation: Activation,
    packed: Packed = NOT_PACKED,
) -> Tensor:
    """One grouped GEMM per projection (bf16 on CUDA); the group offsets stay on the device."""
    if not len(hidden):
        return experts_sorted(hidden, topk_ids, weight, gate, up, down, activation)
    order, ends = group_pairs(topk_ids, len(up))
    gathered = hidden[order // topk_ids.shape[1]]
    out = expert_mlp(gathered, gate, up, down, activation, lambda x, matrices: grouped_product(x, matrices, ends))
    return combine(out, order, weight)


def group_pairs(topk_ids: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """The (token, expert) pairs, numbered token by token, grouped by expert (T·k,), and the end of each group (E,)."""
    flat = topk_ids.flatten()
    return flat.argsort(stable=True), selections(flat, experts).cumsum(0).to(torch.int32)


def grouped_product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """x (T·k, in), grouped by expert, times weight (E, out, in) → (T·k, out).

    torch needs rows of whole 16 bytes; odd widths are padded.
    """
    width, out = weight.shape[2], weight.shape[1]
    pads = [-size % (16 // x.element_size()) for size in (width, out)]
    if any(pads):
        x, weight = F.pad(x, (0, pads[0])), F.pad(weight, (0, pads[0], 0, pads[1]))
    return torch._grouped_mm(x, weight.transpose(1, 2), offs=ends)[:, :out]


def experts_dense(
    hidden: Tensor,
    topk_ids: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down: Tensor,
    activation: Activation,
) -> Tensor:
    """Dense reference: every expert on every token, weighted by zero where the expert is not selected."""
    share = weight.new_zeros(hidden.shape[0], up.shape[0]).scatter_add(1, topk_ids, weight)  # (T, E)
    gates = (None,) * len(up) if gate is None else gate
    every = [
        expert_mlp(hidden, *own, activation, F.linear)  # one expert's matrices
        for own in zip(gates, up, down, strict=True)
    ]
    return (torch.stack(every, 1) * share[..., None]).sum(1).to(hidden.dtype)


def combine(grouped: Tensor, order: Tensor, weight: Tensor) -> Tensor:
    """The weighted sums (T, H) of pair outputs (T·k, H) that are permuted by `order`."""
    back = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    return weighted_sum(grouped[back], weight)


def weighted_sum(pairs: Tensor, weight: Tensor) -> Tensor:
    """The weighted sum over each token's k experts: pair outputs (T·k, H) in token order → (T, H) in their dtype."""
    return torch.einsum("tkh,tk->th", pairs.unflatten(0, weight.shape).to(weight.dtype), weight).to(pairs.dtype)
