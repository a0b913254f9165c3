"""Rotary position embedding (Su et al. 2021, RoFormer): pairs of dimensions turn by position · inverse frequency."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from twotower.specs import RopeSpec


class Rotation(NamedTuple):
    """Cosines and sines (B, L, R / 2) of the tokens of a pass, in at least fp32, times the factor of the `RopeSpec`.

    interleaved: pairs are neighbours, not halves.
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool


def rotation(positions: Tensor, rope: RopeSpec, dtype: torch.dtype) -> Rotation:
    """positions (B, L) → the rotation of each token in `dtype`, which is at least fp32."""
    frequencies = torch.tensor(rope.inverse_frequencies, dtype=dtype, device=positions.device)
    angles = positions[..., None].to(dtype) * frequencies
    return Rotation(angles.cos() * rope.factor, angles.sin() * rope.factor, rope.interleaved)


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
