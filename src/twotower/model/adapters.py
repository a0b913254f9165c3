"""Adapters: a denoiser that is the context tower itself, with low-rank updates of its linear layers.

The updates act from the first mask of a block on. The tokens before it attend causally (`AttentionMetadata.prefix`), so
they are computed exactly as the autoregressive model computes them. One pass can therefore check drafted tokens, add
the kept ones to the state, and predict new tokens at the masks. Output i predicts token i + 1 (prediction shift 1), as
in the autoregressive model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twotower.ops.cpu.packed_weights import PackedWeight
from twotower.ops.registry import select

_POSITIONS: ContextVar[Tensor | None] = ContextVar("adapted positions", default=None)


class LowRank(nn.Module):
    """The update x·Aᵀ·Bᵀ of a linear layer: a (r, in), b (out, r) (LoRA; Hu et al. 2021, arXiv 2106.09685).

    packed_a, packed_b: the packed copies, as in `Linear`.
    """

    def __init__(self, in_features: int, out_features: int, rank: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(rank, in_features))
        self.b = nn.Parameter(torch.empty(out_features, rank))
        self.packed_a, self.packed_b = PackedWeight(), PackedWeight()

    def reset_parameters(self) -> None:
        """a ~ N(0, 1 / in), b = 0: no update."""
        nn.init.normal_(self.a, std=self.a.shape[1] ** -0.5)
        nn.init.zeros_(self.b)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.a), self.b)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LowRank:
        super()._apply(fn, recurse)
        self.packed_a.get(self.a), self.packed_b.get(self.b)  # as in `Linear`
        return self


class MaskEmbedding(nn.Module):
    """The embedding of the mask token where adapters act. Elsewhere the token has its row of the embedding."""

    def __init__(self, hidden_size: int, token: int) -> None:
        super().__init__()
        self.token = token
        self.weight = nn.Parameter(torch.empty(hidden_size))

    def forward(self, x: Tensor, tokens: Tensor, positions: Tensor) -> Tensor:
        """x (B, L, H): embeddings of tokens (B, L) → with this one at masks among `positions` (B, L)."""
        return torch.where((positions & (tokens == self.token))[..., None], self.weight.to(x.dtype), x)


def train_adapters_only(tower: nn.Module) -> None:
    """Sets which parameters of a tower with adapters require gradients: the adapters and the mask's embedding."""
    for name, parameter in tower.named_parameters():
        parameter.requires_grad_(".adapter." in name or name.startswith(("mask_embedding.", "draft_head.")))


@contextmanager
def adapting(positions: Tensor | None) -> Iterator[None]:
    """Adapters act at these positions (B, L) of the layers that run in this context; None: nowhere."""
    before = _POSITIONS.set(positions)
    try:
        yield
    finally:
        _POSITIONS.reset(before)


def adapters_act() -> bool:
    """Whether adapters act at any position of the layers that run in this context."""
    return _POSITIONS.get() is not None


def adapted(outs: Sequence[Tensor], x: Tensor, adapters: Sequence[LowRank | None]) -> tuple[Tensor, ...]:
    """The outputs of linear layers over x with the updates of their adapters, at the positions where adapters act.

    adapters: one a layer. The outputs may be changed in place.
    """
    positions, places = _POSITIONS.get(), [i for i, adapter in enumerate(adapters) if adapter is not None]
    new = list(outs)
    if positions is None or not places:
        return tuple(new)
    pairs = tuple((adapter.a, adapter.b) for adapter in adapters if adapter is not None)
    updated = select("low_rank", x.device, x.dtype).function(tuple(new[i] for i in places), x, pairs, positions)
    for i, out in zip(places, updated, strict=True):
        new[i] = out
    return tuple(new)
