"""Divides an engine's memory among Mamba states, the shared KV slots and the prefix cache."""

from __future__ import annotations

import math

from twotower.cache.hybrid_cache import state_bytes
from twotower.engine.towers import Towers
from twotower.errors import ArgumentError

PREFIX_SHARE = 0.2  # of the memory, for the prefix cache
MIN_PREFIXES = 8  # chunks that the prefix cache holds at least, if no memory is given


def memory_for(model: Towers, rows: int, longest: int) -> int:
    """Bytes that `rows` texts of `longest` tokens need. `longest` includes one block."""
    per_row, per_token = state_bytes(model.backbone, model.dtype)
    return math.ceil(rows * (per_row + per_token * longest) / (1 - PREFIX_SHARE)) + 1


def divide_memory(model: Towers, rows: int, longest: int, chunk: int, memory: int | None) -> tuple[int, int, int]:
    """Returns the number of rows, the KV slots that they share, and the bytes of the prefix cache.

    The number of rows is reduced until one text of `longest` tokens fits beside their Mamba states. chunk: tokens of a
    chunk of the prefix cache.

    memory: bytes in all; None: as many as `rows` of the longest texts need.

    Raises:
        ArgumentError: the memory is too small for one text.
    """
    per_row, per_token = state_bytes(model.backbone, model.dtype)
    if memory is None:
        whole = rows * (per_row + per_token * longest)
        return rows, rows * longest, max(round(whole * PREFIX_SHARE), MIN_PREFIXES * (per_row + per_token * chunk))
    kept = int(memory * (1 - PREFIX_SHARE))
    rows = min(rows, max((kept - per_token * longest) // max(per_row, 1), 1))
    kv_slots = min((kept - rows * per_row) // max(per_token, 1), rows * longest)
    if kv_slots < 1:
        raise ArgumentError(
            f"{memory / 2**20:.1f} MiB hold no text: one takes {per_row / 2**20:.1f} MiB, and {per_token} bytes for "
            "each of its tokens; raise memory"
        )
    return rows, kv_slots, memory - kept
