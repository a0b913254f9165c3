"""KV slots: where the keys and values of each row lie in a pool of vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from twotower.cache.sliding_window import SlidingWindow
from twotower.ops.reference.kv_write import write_indices


class KVSlots:
    """Assigns each row a contiguous range of KV slots. One KV slot holds one token's `heads` vectors.

    The vector of row r, head h, slot s has index start[r] + h·stride[r] + s; start, stride (R,) are on its device.
    Slot s holds token s, or the token that `window` says: slots with a window hold the last tokens of a row only.
    Two layouts: every row has `slots_per_row` slots, row after row (`contiguous`); or the rows share `total` slots
    (`shared`), and `allocate` assigns them. `allocated` is on the host: row → (first slot, count).
    """

    def __init__(
        self,
        rows: int,
        heads: int,
        total: int,
        device: torch.device,
        slots_per_row: int | None = None,
        window: SlidingWindow | None = None,
    ) -> None:
        self.heads = heads
        self.total = total
        self.shared = slots_per_row is None
        self.slots_per_row = slots_per_row or 0
        self.window = window
        self.allocated: dict[int, tuple[int, int]] = {}
        self.version = 0  # counts changes of start and stride, which a replica must copy
        order = torch.arange(rows, device=device)
        self.start = order * (heads * self.slots_per_row)
        self.stride = torch.full_like(order, self.slots_per_row)

    @classmethod
    def contiguous(
        cls, rows: int, heads: int, capacity: int, device: torch.device, window: SlidingWindow | None = None
    ) -> KVSlots:
        """`capacity` slots for every row, row after row; fewer if the window needs fewer."""
        capacity = capacity if window is None else min(capacity, window.slots)
        return cls(rows, heads, rows * capacity, device, capacity, window)

    @classmethod
    def sharing(
        cls, rows: int, heads: int, total: int, device: torch.device, window: SlidingWindow | None = None
    ) -> KVSlots:
        """`total` slots that the rows share; fewer if the windows of all rows need fewer."""
        total = total if window is None else min(total, rows * window.slots)
        return cls(rows, heads, total, device, None, window)

    @property
    def rows(self) -> int:
        return self.start.shape[0]

    @property
    def num_vectors(self) -> int:
        """Vectors of the pool, without the spare last vector, which takes the writes of padding."""
        return self.total * self.heads

    def slots_for(self, length: int) -> int:
        """The slots that a text of `length` tokens needs."""
        return length if self.window is None else min(length, self.window.slots)

    def first_fit(self, length: int) -> int | None:
        """The start of the first gap for a text of `length` tokens; None if there is no such gap."""
        end, count = 0, self.slots_for(length)
        for first, taken in sorted(self.allocated.values()):
            if first - end >= count:
                return end
            end = first + taken
        return end if self.total - end >= count else None

    def allocate(self, row: int, length: int) -> None:
        """Assigns shared slots for a text of `length` tokens to a row; `first_fit` must have found a gap."""
        first, count = self.first_fit(length), self.slots_for(length)
        assert first is not None, "allocate without room"
        self.allocated[row] = (first, count)
        self.start[row] = first * self.heads
        self.stride[row] = count
        self.version += 1
        if self.window is not None:
            self.window.held[row] = 0

    def free(self, row: int) -> None:
        """Returns the row's slots."""
        self.allocated.pop(row, None)

    def restart(self, rows: Tensor) -> None:
        """Puts the first token of rows (B,) into their first slots again; the rows are empty."""
        if self.window is not None:
            self.window.first = self.window.first.index_fill(0, rows, 0)

    def layout(self, rows: Tensor | None, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Start, stride and the number of used slots of the given rows (None: all), which have lengths (B,)."""
        start, stride, first = self._of(rows)
        return start, stride, lengths if first is None else lengths - first

    def vectors_of(self, rows: Tensor | None, tokens: Tensor, exists: Tensor) -> Tensor:
        """Indices (B, W, heads) of the vectors of tokens (B, W) of the given rows (None: all).

        The index is that of the spare vector where `exists` (B, W) is False or the token is not in the row's slots.
        """
        start, stride, first = self._of(rows)
        if first is not None:
            tokens = tokens - first[:, None]
            exists = exists & (tokens >= 0)
        return write_indices(start, stride, self.heads, tokens, exists, self.num_vectors)

    def crowded(self, rows: Sequence[int], width: int) -> list[int]:
        """Those of the given rows whose tokens must `slide` before they append `width` tokens.

        A row with fewer slots than a window needs has slots for its whole text.
        """
        window = self.window
        assert window is not None
        full = [row for row in rows if window.held[row] + width > window.slots]
        return [row for row in full if window.slots <= self._slots_of(row)]

    def _slots_of(self, row: int) -> int:
        return self.allocated.get(row, (0, 0))[1] if self.shared else self.slots_per_row

    def slide(self, rows: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """How the last tokens of rows (B,) of lengths (B,) move to their first slots.

        Returns vector indices, of the old and of the new places, and the new `window.first`, which counts from then on.
        """
        assert self.window is not None
        step = torch.arange(self.window.keep, device=lengths.device)
        first = torch.maximum(self.window.first[rows], lengths - self.window.keep)
        tokens = first[:, None] + step
        exists = tokens < lengths[:, None]
        start, stride, _ = self._of(rows)
        places = step.expand_as(tokens)
        target = write_indices(start, stride, self.heads, places, exists, self.num_vectors).flatten()
        source = self.vectors_of(rows, tokens, exists).flatten()
        return source, target, self.window.first.index_copy(0, rows, first)

    def _of(self, rows: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Start, stride and first token of all rows or of the given ones (B,)."""
        first = None if self.window is None else self.window.first
        if rows is None:
            return self.start, self.stride, first
        return self.start[rows], self.stride[rows], None if first is None else first[rows]

    def select(self, rows: Tensor) -> KVSlots:
        """A contiguous layout of its own for the given rows (B,), with as many slots a row."""
        window = None if self.window is None else self.window.select(rows)
        return KVSlots.contiguous(len(rows), self.heads, self.slots_per_row, self.start.device, window)

    def map(self, change: Callable[[Tensor], Tensor]) -> KVSlots:
        """The same layout with every tensor passed through `change` (a copy, or a move to another device)."""
        out = object.__new__(KVSlots)
        out.heads, out.total, out.shared, out.slots_per_row = self.heads, self.total, self.shared, self.slots_per_row
        out.allocated, out.version = dict(self.allocated), self.version
        out.start, out.stride = change(self.start), change(self.stride)
        out.window = None if self.window is None else self.window.map(change)
        return out
