"""The size of a row's state."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from twotower.cache.hybrid_cache import TowerState
from twotower.cache.sliding_window import widest_window
from twotower.specs import TowerSpec


class StateBytes(NamedTuple):
    """Bytes of a row: of its Mamba states, of a token, and of a token in the layers with a window.

    keep: tokens of a window before the longest pass; see `SlidingWindow`.
    """

    row: int
    token: int
    window_token: int
    keep: int

    def of_text(self, tokens: int, longest_pass: int) -> int:
        """Bytes of a text of `tokens` tokens."""
        return self.row + self.token * tokens + self.window_token * min(tokens, self.keep + longest_pass)


@lru_cache(maxsize=32)
def state_bytes(spec: TowerSpec, dtype: torch.dtype) -> StateBytes:
    """Bytes of a row of a state, measured on states on the meta device."""
    states = [TowerState(spec, 1, capacity, torch.device("meta"), dtype, longest_pass=2) for capacity in (1, 2)]
    row = sum(pool.conv_window.nbytes + pool.ssm_state.nbytes for _, pool in states[0].mamba_pools)
    sizes = [
        [sum(pool.k.nbytes + pool.v.nbytes for _, _, pool in group.layers) for group in state.kv_groups]
        for state in states
    ]
    token, *window = (two - one for one, two in zip(*sizes, strict=True))
    return StateBytes(row, token, sum(window), (widest_window(spec) or 1) - 1)
