"""Passes of the context tower with LongRoPE, whose frequencies depend on the length of a row's own text.

A text of up to `original_length` tokens has the short frequencies, a longer one the long ones at all positions, as in
transformers' forward pass over the whole text. A pass over several tokens computes the logits after each of them as if
the text ended there. A row that reaches the original length is read again once, with the long frequencies: the next
token makes it longer. A row that was rolled back below the original length is read again with the short ones.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from twotower.cache.hybrid_cache import TowerState

# One pass over tokens (B, L), of which lengths (B,) are no padding, of the slots rows (B,) → hidden states (B, L, H).
Read = Callable[[Tensor, Tensor | None, TowerState, Tensor | None], Tensor]


def extend(
    read: Read, tokens: Tensor, lengths: Tensor | None, state: TowerState, rows: Tensor | None, chunk: int
) -> Tensor:
    """As `read`, and reads rows again whose frequencies change. chunk: tokens of one pass over a text.

    After an exception the state has its old lengths, and the next pass reads again what this pass had begun to.
    """
    texts, width = state.texts, tokens.shape[1]
    assert texts is not None
    limit, most, old = texts.original_length, state.max_seq_len, state.lengths
    slots = torch.arange(state.rows, device=tokens.device) if rows is None else rows
    counts = torch.full_like(slots, width) if lengths is None else lengths
    before = old[slots]
    texts.put(slots, before, tokens, most + width)
    if not texts.some_long and most + width < limit:
        return read(tokens, lengths, state, rows)
    stale = texts.of(slots) != (before >= limit)
    crosses = (before < limit) & (before + counts >= limit)
    try:
        if stale.any():
            _read_again(read, state, slots[stale], before[stale], before[stale] >= limit, chunk)
            state.max_seq_len = most
        hidden = read(tokens, lengths, state, rows)
        if not crosses.any():
            return hidden
        appended, most_after = state.uncommitted, state.max_seq_len
        at = crosses.nonzero()[:, 0]
        _read_again(read, state, slots[at], before[at], torch.ones_like(at, dtype=torch.bool), chunk)
        longer = read(tokens[at], counts[at], state, slots[at])
        state.uncommitted, state.step_rows, state.max_seq_len = appended, rows, most_after
        after = before[at, None] + torch.arange(1, width + 1, device=tokens.device)
        return hidden.index_copy(0, at, torch.where((after > limit)[..., None], longer, hidden[at]))
    except BaseException:  # also KeyboardInterrupt during a pass
        state.lengths, state.max_seq_len, state.uncommitted = old, most, torch.zeros_like(old)
        texts.mark(slots[stale], before[stale] < limit)  # rows that cross are marked so when their reading begins
        raise


def _read_again(read: Read, state: TowerState, slots: Tensor, lengths: Tensor, long: Tensor, chunk: int) -> None:
    """Reads the first lengths (n,) tokens of the slots (n,) from the beginning. long: (n,), with which frequencies."""
    assert state.texts is not None
    state.texts.mark(slots, long)
    state.lengths = state.lengths.index_fill(0, slots, 0)
    state.reset_count = state.reset_count.index_add(0, slots, torch.ones_like(slots))
    state.max_seq_len = 0
    text = state.texts.tokens[slots, : int(lengths.max())]
    for start in range(0, text.shape[1], chunk):
        part = text[:, start : start + chunk]
        read(part, (lengths - start).clamp(0, part.shape[1]), state, slots)
