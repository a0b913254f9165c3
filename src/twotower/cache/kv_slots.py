"""Where the keys and values of each row lie in a pool of vectors: one run of columns a row, as long as it needs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from twotower.ops.reference.kv_write import places


class Segments:
    """A column holds a token's `heads` vectors. Of row r, head h, token t the vector is start[r] + h·stride[r] + t.

    Either every row has `even` columns, one row after the other, or rows share `columns` of them (`shared`), and each
    has what `open` gave it. start, stride (R,) live on the pool's device; which columns are taken is known on the host.
    """

    def __init__(self, rows: int, heads: int, columns: int, device: torch.device, even: int | None = None) -> None:
        self.heads = heads
        self.columns = columns
        self.shared = even is None
        self.even = even or 0
        self.taken: dict[int, tuple[int, int]] = {}  # of shared columns, by row: the first, and how many
        self.version = 0  # changes of start and stride: what a mirror has to follow
        order = torch.arange(rows, device=device)
        self.start = order * (heads * self.even)
        self.stride = torch.full_like(order, self.even)

    @classmethod
    def of_rows(cls, rows: int, heads: int, capacity: int, device: torch.device) -> Segments:
        """As many columns for each."""
        return cls(rows, heads, rows * capacity, device, even=capacity)

    @property
    def rows(self) -> int:
        return self.start.shape[0]

    @property
    def vectors(self) -> int:
        """Of the whole pool; one more, the last, takes the writes of padding."""
        return self.columns * self.heads

    def room_for(self, length: int) -> int | None:
        """The first column of the first gap of `length` shared columns, or None."""
        end = 0
        for first, count in sorted(self.taken.values()):
            if first - end >= length:
                return end
            end = first + count
        return end if self.columns - end >= length else None

    def open(self, row: int, length: int) -> None:
        """Gives a row `length` of the shared columns; there must be room."""
        first = self.room_for(length)
        assert first is not None, "open without room"
        self.taken[row] = (first, length)
        self.start[row] = first * self.heads
        self.stride[row] = length
        self.version += 1

    def close(self, row: int) -> None:
        """The row's columns are free again."""
        self.taken.pop(row, None)

    def at(self, slots: Tensor | None, columns: Tensor, exists: Tensor) -> Tensor:
        """The vectors of columns (B, W) of the given slots (None: all) → (B, W, heads); the spare one where `exists`
        (B, W) is False or a row's own columns end."""
        start, stride = (part if slots is None else part[slots] for part in (self.start, self.stride))
        return places(start, stride, self.heads, columns, exists, self.vectors)

    def map(self, change: Callable[[Tensor], Tensor]) -> Segments:
        """The same places, each tensor changed (copied, or moved to another device)."""
        out = object.__new__(Segments)
        out.heads, out.columns, out.shared, out.even = self.heads, self.columns, self.shared, self.even
        out.taken, out.version = dict(self.taken), self.version
        out.start, out.stride = change(self.start), change(self.stride)
        return out
