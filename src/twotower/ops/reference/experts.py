"""Mixture-of-experts matmuls: each token through its own few experts, down(relu(up·x)²), weighted and summed.

hidden (T, H); choice (T, k) expert ids; weight (T, k); up (E, I, H); down (E, H, I) → (T, H). packed: `up` and `down`
packed for compiled kernels; not read here.
No backend visits an expert that nothing chose, and none synchronises the host once per expert.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

PackedPair = tuple[Tensor | None, Tensor | None]


def experts_sorted(
    hidden: Tensor, choice: Tensor, weight: Tensor, up: Tensor, down: Tensor, packed: PackedPair = (None, None)
) -> Tensor:
    """Tokens sorted by expert, one matmul pair per chosen expert. One host read of the counts (free on a CPU)."""

    def expert_mlp(expert: int, rows: Tensor) -> Tensor:
        return F.linear(F.relu(F.linear(rows, up[expert])).square(), down[expert])

    return loop_over_experts(hidden, choice, weight, up.shape[0], expert_mlp)


def loop_over_experts(
    hidden: Tensor, choice: Tensor, weight: Tensor, experts: int, expert_mlp: Callable[[int, Tensor], Tensor]
) -> Tensor:
    """The mixture where expert_mlp(expert, its tokens (n, H)) → (n, H)."""
    flat = choice.flatten()
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=experts).tolist()
    gathered = hidden[order // choice.shape[1]]  # (T·k, H), grouped by expert
    parts = [expert_mlp(expert, rows) for expert, rows in enumerate(gathered.split(counts)) if counts[expert]]
    # Without any token the weights still have a gradient, of zeros: processes that share them wait for each other's.
    return combine(torch.cat(parts) if parts else expert_mlp(0, gathered), order, weight)


def experts_gathered(
    hidden: Tensor, choice: Tensor, weight: Tensor, up: Tensor, down: Tensor, packed: PackedPair = (None, None)
) -> Tensor:
    """Copies the chosen experts' weights and multiplies in one batch: shapes depend only on T, no host read."""
    pairs = choice.flatten()
    x = hidden.repeat_interleave(choice.shape[1], 0)[:, :, None]  # (T·k, H, 1)
    out = down[pairs] @ F.relu(up[pairs] @ x).square()
    return weighted_sum(out[..., 0], weight)


def experts_grouped(
    hidden: Tensor, choice: Tensor, weight: Tensor, up: Tensor, down: Tensor, packed: PackedPair = (None, None)
) -> Tensor:
    """One grouped GEMM per projection (bf16 on CUDA); group ends stay on the device."""
    if not len(hidden):
        return experts_sorted(hidden, choice, weight, up, down)
    flat = choice.flatten()
    order = flat.argsort(stable=True)
    ends = F.one_hot(flat, up.shape[0]).sum(0).cumsum(0).to(torch.int32)
    gathered = hidden[order // choice.shape[1]]
    inner = F.relu(torch._grouped_mm(gathered, up.transpose(1, 2), offs=ends)).square()
    return combine(torch._grouped_mm(inner, down.transpose(1, 2), offs=ends), order, weight)


def experts_dense(
    hidden: Tensor, choice: Tensor, weight: Tensor, up: Tensor, down: Tensor, packed: PackedPair = (None, None)
) -> Tensor:
    """Slow reference: every expert on every token, weighted by zero where it was not chosen."""
    share = weight.new_zeros(hidden.shape[0], up.shape[0]).scatter_add(1, choice, weight)  # (T, E)
    every = torch.stack([F.linear(F.relu(F.linear(hidden, u)).square(), d) for u, d in zip(up, down, strict=True)], 1)
    return (every * share[..., None]).sum(1).to(hidden.dtype)


def combine(grouped: Tensor, order: Tensor, weight: Tensor) -> Tensor:
    """(T·k, H) in the order `order` of token order → the weighted sums, (T, H)."""
    back = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    return weighted_sum(grouped[back], weight)


def weighted_sum(pairs: Tensor, weight: Tensor) -> Tensor:
    """(T·k, H) in token order → the weighted sum over each token's k experts, (T, H) in the pairs' dtype."""
    return torch.einsum("tkh,tk->th", pairs.unflatten(0, weight.shape).to(weight.dtype), weight).to(pairs.dtype)
