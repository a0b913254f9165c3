"""Low-rank updates of linear layers that read the same input (`model.adapters`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

TensorPair = tuple[Tensor, Tensor]


def low_rank(
    outs: Sequence[Tensor], x: Tensor, adapters: Sequence[TensorPair], positions: Tensor
) -> tuple[Tensor, ...]:
    """Adds x·aᵀ·bᵀ to outputs of linear layers, at some positions → the new outputs.

    x (…, in): the input of all layers; outs (…, out): their outputs; adapters: a (r, in) and b (out, r) of each;
    positions: one truth value a token. Kernels change `outs` in place. The positions are applied to r values of each
    token, not to `out`.
    """
    acts = positions.reshape(*x.shape[:-1], 1)
    return tuple(_updated(out, F.linear(x, a) * acts, b) for out, (a, b) in zip(outs, adapters, strict=True))


def _updated(out: Tensor, low: Tensor, b: Tensor) -> Tensor:
    return torch.addmm(out.flatten(0, -2), low.flatten(0, -2), b.t()).view_as(out)
