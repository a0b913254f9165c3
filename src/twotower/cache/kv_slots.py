"""KV slots: where the keys and values of each row lie in a pool of vectors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from twotower.ops.reference.kv_write import write_indices


class KVSlots:
    """Assigns each row a contiguous range of KV slots. One KV slot holds one token's `heads` vectors.

    The vector of row r, head h, token t has index start[r] + h·stride[r] + t; start, stride (R,) are on its device.
    Two layouts: every row has `slots_per_row` slots, row after row (`contiguous`); or the rows share `total` slots
    (`shared`), and `allocate` assigns them. `allocated` is on the host: row → (first slot, count).
    """

    def __init__(
        self, rows: int, heads: int, total: int, device: torch.device, slots_per_row: int | None = None
    ) -> None:
        self.heads = heads
        self.total = total
        self.shared = slots_per_row is None
        self.slots_per_row = slots_per_row or 0
        self.allocated: dict[int, tuple[int, int]] = {}
        self.version = 0  # counts changes of start and stride, which a replica must copy
        order = torch.arange(rows, device=device)
        self.start = order * (heads * self.slots_per_row)
        self.stride = torch.full_like(order, self.slots_per_row)

    @classmethod
    def contiguous(cls, rows: int, heads: int, capacity: int, device: torch.device) -> KVSlots:
        """`capacity` slots for every row, row after row."""
        return cls(rows, heads, rows * capacity, device, slots_per_row=capacity)

    @property
    def rows(self) -> int:
        return self.start.shape[0]

    @property
    def num_vectors(self) -> int:
        """Vectors of the pool, without the spare last vector, which takes the writes of padding."""
        return self.total * self.heads

    def first_fit(self, length: int) -> int | None:
        """The start of the first gap of `length` shared slots; None if there is no such gap."""
        end = 0
        for first, count in sorted(self.allocated.values()):
            if first - end >= length:
                return end
            end = first + count
        return end if self.total - end >= length else None

    def allocate(self, row: int, length: int) -> None:
        """Assigns `length` shared slots to a row; `first_fit` must have found a gap."""
        first = self.first_fit(length)
        assert first is not None, "allocate without room"
        self.allocated[row] = (first, length)
        self.start[row] = first * self.heads
        self.stride[row] = length
        self.version += 1

    def free(self, row: int) -> None:
        """Returns the row's slots."""
        self.allocated.pop(row, None)

    def vectors_of(self, rows: Tensor | None, tokens: Tensor, exists: Tensor) -> Tensor:
        """Indices (B, W, heads) of the vectors of tokens (B, W) of the given rows (None: all).

        The index is that of the spare vector where `exists` (B, W) is False or the token is beyond the row's slots.
        """
        start, stride = (part if rows is None else part[rows] for part in (self.start, self.stride))
        return write_indices(start, stride, self.heads, tokens, exists, self.num_vectors)

    def map(self, change: Callable[[Tensor], Tensor]) -> KVSlots:
        """The same layout with every tensor passed through `change` (a copy, or a move to another device)."""
        out = object.__new__(KVSlots)
        out.heads, out.total, out.shared, out.slots_per_row = self.heads, self.total, self.shared, self.slots_per_row
        out.allocated, out.version = dict(self.allocated), self.version
        out.start, out.stride = change(self.start), change(self.stride)
        return out
