"""Adapters: a denoiser that is the context tower itself, with low-rank updates of its linear layers.

The updates act from the first mask of a block on. The tokens before it attend causally (`AttentionMetadata.prefix`), so
they are computed exactly as the autoregressive model computes them. One pass can therefore check drafted tokens, add
the kept ones to the state, and predict new tokens at the masks. Output i predicts token i + 1 (prediction shift 1), as
in the autoregressive model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twotower.ops.cpu.packed_weights import PackedWeight

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

    def add_to(self, out: Tensor, x: Tensor, positions: Tensor) -> Tensor:
        """out (…, O), the layer's output over x (…, I) → out with the update at positions (…), elsewhere as it is.

        The positions are applied to r values of each token, not to O.
        """
        low = F.linear(x, self.a) * positions.reshape(*x.shape[:-1], 1)
        return torch.addmm(out.flatten(0, -2), low.flatten(0, -2), self.b.t()).view_as(out)

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


def adapted(out: Tensor, x: Tensor, adapter: LowRank | None) -> Tensor:
    """The output of a linear layer over x with the update of its adapter, at the positions where adapters act."""
    positions = _POSITIONS.get()
    if adapter is None or positions is None:
        return out
    return adapter.add_to(out, x, positions)
