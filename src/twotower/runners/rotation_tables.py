"""Cosines and sines of all positions up to a limit, so that a pass does not compute them."""

from __future__ import annotations

import torch

from twotower.ops.reference.rope import Rotation, rotation
from twotower.specs import RopeSpec

MAX_POSITIONS = 1 << 15  # 16 MiB for 64 pairs; rows beyond compute their rotations in each pass


class RotationTables:
    """The rotations in fp32 of positions 0, 1, … for each of some embeddings. They grow with the longest text."""

    def __init__(self, ropes: tuple[RopeSpec, ...]) -> None:
        self._ropes = ropes
        self._tables: tuple[Rotation, ...] = ()
        self._positions = 0
        self._fixed = all(rope.original_length is None for rope in ropes)  # LongRoPE depends on the text's length

    def up_to(self, length: int) -> tuple[Rotation, ...] | None:
        """Tables (1, N, R / 2) for texts of `length` tokens, N ≥ length; None if there are none so long."""
        if not self._fixed or length > MAX_POSITIONS:
            return None
        if length > self._positions:
            count = max(1 << (length - 1).bit_length(), 256)
            positions = torch.arange(count)[None]
            self._tables = tuple(rotation(positions, rope, torch.float32) for rope in self._ropes)
            self._positions = count
        return self._tables
