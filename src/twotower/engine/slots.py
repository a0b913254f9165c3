"""Reads and writes the slots of a pass in the engine's pools."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from twotower.engine.sequence import RunningSequence
from twotower.ops.host_transfer import to_device_async


def slots_of(sequences: Sequence[RunningSequence], rows: int, device: torch.device) -> Tensor | None:
    """The sequences' slots (B,) in pools of `rows` rows.

    None if they are all rows in order: a pass then uses the pools without a gather.
    """
    slots = [sequence.slot for sequence in sequences]
    return None if slots == list(range(rows)) else to_device_async(slots, device)


def at(pool: Tensor, slots: Tensor | None) -> Tensor:
    """The rows of a pool (R, …) at `slots` (B,), or the pool itself."""
    return pool if slots is None else pool[slots]


def stored(pool: Tensor, slots: Tensor | None, values: Tensor) -> Tensor:
    """A pool (R, S) with `values` (B, L) in the first L columns of `slots`; with slots None and L = S, the values.

    The old pool is not changed, because uncollected results of an earlier pass may share its memory.
    """
    if values.shape[1] < pool.shape[1]:
        values = torch.cat([values, at(pool, slots)[:, values.shape[1] :]], dim=1)
    return values if slots is None else pool.index_copy(0, slots, values)
