"""Rotary position embedding (Su et al. 2021, RoFormer): pairs of dimensions turn by position · inverse frequency.

`norm_and_rotate` is the operation: the norms of the heads, if there are any, and the rotation.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from twotower.ops.reference.norm import rms_norm
from twotower.specs import RopeSpec


class Rotation(NamedTuple):
    """Cosines and sines (B, L, R / 2) of the tokens of a pass, in at least fp32, times the factor of the `RopeSpec`.

    interleaved: pairs are neighbours, not halves.
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool


class HeadNorms(NamedTuple):
    """RMSNorms of each head of the queries and of the keys: weights (D,), and eps and offset as in `rms_norm`."""

    q: Tensor
    k: Tensor
    eps: float
    offset: float


def norm_and_rotate(q: Tensor, k: Tensor, norms: HeadNorms | None, turn: Rotation | None) -> tuple[Tensor, Tensor]:
    """Queries (B, L, Hq, D) and keys (B, L, Hkv, D), normed, then turned; None: not normed, not turned."""
    if norms is not None:
        q, k = (rms_norm(x, weight, norms.eps, offset=norms.offset) for x, weight in ((q, norms.q), (k, norms.k)))
    return (q, k) if turn is None else (rotate(q, turn), rotate(k, turn))


def rotation(positions: Tensor, rope: RopeSpec, dtype: torch.dtype, long: Tensor | None = None) -> Rotation:
    """positions (B, L) → the rotation of each token in `dtype`, which is at least fp32.

    long: (B, 1 or L), which tokens have the long frequencies, if the embedding has them.
    """
    per_position = frequencies(rope.inverse_frequencies, dtype, positions.device)
    if rope.long_inverse_frequencies and long is not None:
        other = frequencies(rope.long_inverse_frequencies, dtype, positions.device)
        per_position = torch.where(long[..., None], other, per_position)
    angles = positions[..., None].to(dtype) * per_position
    return Rotation(angles.cos() * rope.factor, angles.sin() * rope.factor, rope.interleaved)


def frequencies(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The inverse frequencies (R / 2,), on the device: a pass that a CUDA graph captures copies nothing to it."""
    if torch._C._len_torch_dispatch_stack():  # fake tensors, tracing: not kept beyond the mode
        return torch.tensor(values, dtype=dtype, device=device)
    return _resident(values, dtype, device)


@cache  # nothing is dropped: graphs hold the addresses
def _resident(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False), torch._C.DisableTorchFunction():  # as an ordinary tensor, whatever the caller
        return torch.tensor(values, dtype=dtype, device=device)


def rotate(x: Tensor, turn: Rotation) -> Tensor:
    """x (B, L, heads, D) → x with its first R dimensions turned, in x's dtype; computed in the rotation's dtype."""
    cos, sin = turn.cos[:, :, None], turn.sin[:, :, None]
    width = 2 * cos.shape[-1]
    turned = x[..., :width].to(cos.dtype)
    if turn.interleaved:
        a, b = turned[..., ::2], turned[..., 1::2]
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
    else:
        a, b = turned.chunk(2, dim=-1)
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
    turned = turned.to(x.dtype)
    return turned if width == x.shape[-1] else torch.cat([turned, x[..., width:]], dim=-1)
