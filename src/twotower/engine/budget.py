"""How an engine's memory is divided: Mamba states of all rows, keys and values that they share, prompts' beginnings."""

from __future__ import annotations

import math

from twotower.cache.hybrid_cache import state_bytes
from twotower.engine.towers import Towers
from twotower.errors import ArgumentError

PREFIX_SHARE = 0.2  # of the memory, for prompts' beginnings
MIN_PREFIXES = 8  # of their chunks are remembered at least where no memory is given


def memory_for(model: Towers, rows: int, longest: int) -> int:
    """Bytes in which `rows` texts of `longest` tokens fit, one block included."""
    per_row, per_token = state_bytes(model.backbone, model.dtype)
    return math.ceil(rows * (per_row + per_token * longest) / (1 - PREFIX_SHARE)) + 1


def divide_memory(model: Towers, rows: int, longest: int, chunk: int, memory: int | None) -> tuple[int, int, int]:
    """→ rows, as many of these as leave room for a text of `longest` tokens beside their states; KV slots
    for all of them; bytes for prompts' beginnings, in chunks of `chunk` tokens.

    memory: bytes for all of it; None: as much as `rows` of the longest texts need.

    Raises:
        ArgumentError: it holds no text at all.
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
