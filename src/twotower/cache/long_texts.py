"""`LongTexts`: what a state keeps of its texts if their rotary embedding depends on their length (LongRoPE).

Cached keys are turned, and the hidden states of later layers depend on them. A row that changes its frequencies is
therefore read again, from its tokens (`model/long_rope.py`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class LongTexts:
    """The tokens of each row, and the frequencies of its cached keys.

    original_length: a row has the long frequencies from this length on, because the next token makes it longer.
    tokens: (R, C), valid up to the length of each row. long: (R,), whether the keys of a row have the long frequencies.
    some_long: whether a row may have them, known on the host.
    """

    def __init__(self, rows: int, original_length: int, device: torch.device) -> None:
        self.original_length = original_length
        self.tokens = torch.zeros(rows, 0, dtype=torch.long, device=device)
        self.long = torch.zeros(rows, dtype=torch.bool, device=device)
        self.some_long = False

    def of(self, rows: Tensor | None) -> Tensor:
        """`long` of all rows, or of the given slots (B,)."""
        return self.long if rows is None else self.long[rows]

    def mark(self, rows: Tensor, long: Tensor | bool) -> None:
        """Sets `long` of the slots (B,) to a value or to values (B,)."""
        values = long if isinstance(long, Tensor) else torch.full(rows.shape, long, device=rows.device)
        self.long = self.long.index_copy(0, rows, values)
        self.some_long = self.some_long or long is not False

    def put(self, rows: Tensor, lengths: Tensor, tokens: Tensor, most: int) -> None:
        """Writes tokens (B, L) after the first lengths (B,) tokens of the slots `rows` (B,).

        most: an upper bound of lengths + L.
        """
        held = self.tokens
        if most > held.shape[1]:
            held = held.new_zeros(len(held), max(most, held.shape[1] * 3 // 2))
            held[:, : self.tokens.shape[1]] = self.tokens
        elif held.is_inference() and not torch.is_inference_mode_enabled():
            held = held.clone()
        columns = lengths[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
        held[rows[:, None], columns] = tokens
        self.tokens = held

    def map(self, change: Callable[[Tensor], Tensor]) -> LongTexts:
        """The same texts with both tensors passed through `change`."""
        out = object.__new__(LongTexts)
        out.original_length, out.some_long = self.original_length, self.some_long
        out.tokens, out.long = change(self.tokens), change(self.long)
        return out
