"""The memory of an engine: compared with the free memory, and divided among its parts.

The parts are Mamba states, the shared KV slots and the prefix cache.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from twotower.cache.sliding_window import longest_pass_of
from twotower.cache.state_bytes import StateBytes, state_bytes
from twotower.engine.towers import Towers
from twotower.errors import ArgumentError, LengthError
from twotower.system_memory import available_memory

PREFIX_SHARE = 0.2  # of the memory, for the prefix cache
ALWAYS_FREE = 2**28  # bytes; smaller needs are not compared with the free memory
FILLED_SHARE = 0.9  # of the free memory, for rows whose number the engine chooses
MIN_PREFIXES = 8  # chunks that the prefix cache holds at least, if no memory is given


def memory_for(model: Towers, rows: int, longest: int, block_size: int = 1) -> int:
    """Bytes that `rows` texts of `longest` tokens need. `longest` includes one block of `block_size`."""
    size = state_bytes(model.spec, model.dtype)
    text = size.of_text(longest, longest_pass_of(model.spec, block_size))
    return math.ceil(rows * text / (1 - PREFIX_SHARE)) + 1


def block_bytes(model: Towers, positions: int) -> int:
    """Bytes of the logits of a denoiser pass over `positions` positions: in the model's dtype, and two fp32 copies."""
    return positions * model.spec.vocab_size * (model.dtype.itemsize + 8)


class Need(NamedTuple):
    """Bytes that an engine needs on a device: in any case, for the logits of each row, and for the text of each row.

    text: tokens → bytes of a text. longest: tokens of a text, one block included.
    """

    device: torch.device
    fixed: int
    logits: int
    text: Callable[[int], int]
    longest: int

    @property
    def row(self) -> int:
        return self.logits + self.text(self.longest)

    def bytes_of(self, rows: int) -> int:
        return self.fixed + rows * self.row

    def tokens_that_fit(self, free: int) -> int:
        """The tokens of one text that fit `free` bytes, one block included; less than `longest`."""
        return max(bisect_right(range(self.longest), free - self.fixed - self.logits, key=self.text) - 1, 0)

    def missing_in(self, rows: int) -> int | None:
        """The free bytes of the device, if `rows` rows need more; None: they fit, or the free memory is unknown."""
        need = self.bytes_of(rows)
        free = None if need < ALWAYS_FREE else free_memory(self.device)
        return free if free is not None and need > free else None


def needs_of(
    model: Towers, longest: int, block_size: int, logit_positions: int, memory: int | None, prefix_cache: bool
) -> list[Need]:
    """What an engine needs on each device of the towers: states, their replica, prefix cache and logits of blocks.

    longest: tokens of a row, one block of `block_size` included. logit_positions: of a row. memory: bytes of all states
    and the prefix cache, if they are given.
    """
    factor = 1 + PREFIX_SHARE if prefix_cache else 1
    exact = state_bytes(model.spec, model.dtype)
    size = StateBytes(*(round(part * factor) for part in exact))._replace(keep=exact.keep)
    longest_pass = longest_pass_of(model.spec, block_size)

    def text(tokens: int) -> int:
        return size.of_text(tokens, longest_pass) if memory is None else 0

    states = Need(model.device, memory or 0, 0, text, longest)
    there, logits = model.denoiser_device, block_bytes(model, logit_positions)
    if there == states.device:
        return [states._replace(logits=logits)]
    return [states, states._replace(device=there, logits=logits)]


def rows_that_fit(needs: Sequence[Need], rows: int) -> int:
    """The number of rows, at most `rows`, whose states and blocks fit the free memory together; 0: not even one fits.

    A share of the free memory is left, because it changes.
    """
    for need in needs:
        if (free := need.missing_in(rows)) is not None:
            rows = min(rows, max(int(free * FILLED_SHARE) - need.fixed, 0) // need.row)
    return rows


def check_block(model: Towers, block_size: int) -> None:
    """Raises ArgumentError if one block does not fit the free memory, with the size that would fit."""
    need = block_bytes(model, block_size)
    if need < ALWAYS_FREE or (free := free_memory(model.denoiser_device)) is None or need <= free:
        return
    raise ArgumentError(
        f"block_size {block_size} takes about {need / 2**30:.1f} GiB for logits, and {free / 2**30:.1f} GiB are free; "
        f"give at most {max(free // block_bytes(model, 1), 1)}",
        param="block_size",
    )


def check_text(model: Towers, prompt: int, new_tokens: int, block_size: int) -> None:
    """Raises LengthError if the state of one text does not fit the free memory, with the tokens that would fit."""
    tokens = prompt + new_tokens
    for need in needs_of(model, tokens + block_size, block_size, 0, None, prefix_cache=False):
        if (free := need.missing_in(1)) is not None:
            most = max(need.tokens_that_fit(free) - block_size, 0)
            raise LengthError(
                f"a prompt of {prompt} tokens plus max_new_tokens {new_tokens} takes about {need.row / 2**30:.1f} GiB "
                f"of state, and {free / 2**30:.1f} GiB are free on {need.device}; shorten them to {most} together",
                prompt_tokens=prompt,
                new_tokens=new_tokens,
                most=most,
            )


def check_engine(
    model: Towers, rows: int, length: int, block_size: int, memory: int | None, prefix_cache: bool
) -> None:
    """Raises ArgumentError if the states and blocks of `rows` texts do not fit the free memory, with what would fit.

    length: tokens of a text. block_size: positions of its longest block. On accelerators, one block has to fit: passes
    over more blocks are divided when memory runs out.
    """
    check_block(model, block_size)
    logits = block_size if model.denoiser_device.type == "cpu" else 0
    needs = needs_of(model, length + block_size, block_size, logits, memory, prefix_cache)
    rows = rows if memory is None else divide_memory(model, rows, length, block_size, 1, memory)[0]
    for need in needs:
        if (free := need.missing_in(rows)) is None:
            continue
        if need.fixed > free:
            raise ArgumentError(
                f"memory is {need.fixed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free on {need.device}; "
                f"give at most {free * FILLED_SHARE / 2**30:.1f}",
                param="memory",
            )
        words = f"{rows} rows of {length} tokens, with blocks of {block_size}, take about "
        words += f"{need.bytes_of(rows) / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free on {need.device}"
        if fit := rows_that_fit(needs, rows):
            raise ArgumentError(f"{words}; give at most {fit} rows, or a smaller length", param="rows")
        most = need.tokens_that_fit(int(free * FILLED_SHARE)) - block_size
        raise ArgumentError(f"{words}; give 1 row and a length of at most {max(most, 1)}", param="length")


def free_memory(device: torch.device) -> int | None:
    """Bytes that a process can still allocate on a device; None: unknown."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return available_memory() if device.type == "cpu" else None


def divide_memory(
    model: Towers, rows: int, length: int, block_size: int, chunk: int, memory: int | None
) -> tuple[int, int, int]:
    """Returns the number of rows, the KV slots that they share, and the bytes of the prefix cache.

    The number of rows is reduced until one text of `length` tokens and a block fits beside their Mamba states. Slots of
    layers with a window: as many as KV slots, and at most those that the windows of all rows need. chunk: tokens of a
    chunk of the prefix cache.

    memory: bytes in all; None: as many as `rows` of the longest texts need.

    Raises:
        ArgumentError: the memory is too small for one text.
    """
    size, longest = state_bytes(model.spec, model.dtype), length + block_size
    longest_pass = longest_pass_of(model.spec, block_size)
    if memory is None:
        prefix = size.of_text(chunk, 0)
        whole = rows * size.of_text(longest, longest_pass)
        return rows, rows * longest, max(round(whole * PREFIX_SHARE), MIN_PREFIXES * prefix)
    kept, window = int(memory * (1 - PREFIX_SHARE)), size.keep + longest_pass

    def kv_slots(count: int) -> int:
        """The KV slots beside the states of `count` rows."""
        left = kept - count * size.row
        found = left // max(size.token + size.window_token, 1)
        if size.window_token and found >= count * window:  # the windows of all rows
            left -= count * window * size.window_token
            found = left // size.token if size.token else count * longest
        return min(found, count * longest)

    fitting = bisect_left(range(1, rows + 1), True, key=lambda count: kv_slots(count) < longest)
    rows = max(fitting, 1)
    if kv_slots(rows) < 1:
        raise ArgumentError(
            f"{memory / 2**20:.1f} MiB hold no text: one takes {size.row / 2**20:.1f} MiB, and "
            f"{size.token + size.window_token} bytes for each of its tokens; raise memory"
        )
    return rows, kv_slots(rows), memory - kept
