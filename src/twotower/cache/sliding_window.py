"""`SlidingWindow`: which tokens of a row lie in the KV slots of layers with a window."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from twotower.specs import TowerSpec

LONGEST_CHUNK, SHORTEST_CHUNK = 512, 64  # prompt tokens of one pass: the window's length, within these limits


def widest_window(spec: TowerSpec) -> int | None:
    """The widest window of the layers that keep the tokens of a window only; None: all layers keep all tokens.

    With LongRoPE all layers keep all tokens, because a pass reads a row again from its first token.
    """
    return spec.windows[-1] if spec.windows and spec.original_length is None else None


def slides(spec: TowerSpec, layer: int) -> bool:
    """Whether a layer keeps the tokens of a window only."""
    return widest_window(spec) is not None and spec.window_of(layer) is not None


def prefill_limit(spec: TowerSpec) -> int:
    """The most prompt tokens of one pass. Slots of layers with a window have room for one pass behind the window."""
    widest = widest_window(spec)
    return LONGEST_CHUNK if widest is None else min(max(widest, SHORTEST_CHUNK), LONGEST_CHUNK)


def longest_pass_of(spec: TowerSpec, block_size: int = 1) -> int:
    """The most tokens that a pass appends to a row, with blocks of `block_size`."""
    return max(prefill_limit(spec), block_size)


class SlidingWindow:
    """The last tokens of each row, contiguous in its slots: slot s of row r holds token first[r] + s.

    keep: tokens that the next pass may attend to, w − 1 for the widest window w. longest_pass: the most tokens that a
    pass appends to a row. A row needs at most keep + longest_pass slots: when a pass does not fit behind its last
    token, its last `keep` tokens move to its first slots. The tokens of the last pass are always behind them, so a
    rollback finds its window.
    held: for each row, an upper bound of its tokens in slots, known on the host without a synchronisation.
    """

    def __init__(self, rows: int, keep: int, longest_pass: int, device: torch.device) -> None:
        self.keep, self.longest_pass = keep, longest_pass
        self.first = torch.zeros(rows, dtype=torch.long, device=device)
        self.held = [0] * rows

    @property
    def slots(self) -> int:
        """The most slots that a row needs."""
        return self.keep + self.longest_pass

    def select(self, rows: Tensor) -> SlidingWindow:
        """The windows of the given rows (B,), in that order."""
        out = SlidingWindow(len(rows), self.keep, self.longest_pass, self.first.device)
        out.first, out.held = self.first[rows], [max(self.held, default=0)] * len(rows)
        return out

    def map(self, change: Callable[[Tensor], Tensor]) -> SlidingWindow:
        """The same windows with the tensor passed through `change`."""
        out = object.__new__(SlidingWindow)
        out.keep, out.longest_pass = self.keep, self.longest_pass
        out.first, out.held = change(self.first), list(self.held)
        return out
