"""Divides an engine's memory among Mamba states, the shared KV slots and the prefix cache."""

from __future__ import annotations

import math

import torch

from twotower.cache.hybrid_cache import state_bytes
from twotower.engine.towers import Towers
from twotower.errors import ArgumentError
from twotower.runners.packed_weights import available_memory

PREFIX_SHARE = 0.2  # of the memory, for the prefix cache
ALWAYS_FREE = 2**28  # bytes; smaller logits are not compared with the free memory
MIN_PREFIXES = 8  # chunks that the prefix cache holds at least, if no memory is given


def memory_for(model: Towers, rows: int, longest: int) -> int:
    """Bytes that `rows` texts of `longest` tokens need. `longest` includes one block."""
    per_row, per_token = state_bytes(model.backbone, model.dtype)
    return math.ceil(rows * (per_row + per_token * longest) / (1 - PREFIX_SHARE)) + 1


def block_bytes(model: Towers, positions: int) -> int:
    """Bytes of the logits of a denoiser pass over `positions` positions: in the model's dtype, and two fp32 copies."""
    return positions * model.backbone.vocab_size * (model.dtype.itemsize + 8)


def rows_that_fit(model: Towers, block_size: int, rows: int) -> int:
    """The number of rows, at most `rows`, whose blocks fit the free memory together; 0: not even one fits."""
    if block_bytes(model, rows * block_size) < ALWAYS_FREE or (free := free_memory(_denoiser_device(model))) is None:
        return rows
    return min(rows, free // block_bytes(model, block_size))


def check_block(model: Towers, block_size: int) -> None:
    """Raises ArgumentError if one block does not fit the free memory, with the size that would fit."""
    if rows_that_fit(model, block_size, 1):
        return
    need, free = block_bytes(model, block_size), free_memory(_denoiser_device(model)) or 0
    raise ArgumentError(
        f"block_size {block_size} takes about {need / 2**30:.1f} GiB for logits, and {free / 2**30:.1f} GiB are free; "
        f"give at most {max(free // block_bytes(model, 1), 1)}",
        param="block_size",
    )


def free_memory(device: torch.device) -> int | None:
    """Bytes that a process can still allocate on a device; None: unknown."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return available_memory() if device.type == "cpu" else None


def _denoiser_device(model: Towers) -> torch.device:
    return model.device if model.denoiser is None else model.denoiser.device


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
