"""`EngineStats`: a snapshot of an engine's load and sizes, for other threads to read."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineStats:
    """An immutable snapshot. With `AsyncLLM`, the engine's thread makes one after each step.

    slots: requests that can run at once. free_slots: slots without a request. running, waiting: requests in a slot, and
    requests that wait for a slot or for memory. max_seq_len: tokens of the longest text, its prompt included;
    max_block_size: positions of the longest block. state_bytes: memory of the slots. prefix_bytes, prefix_tokens: the
    prefix cache's memory, and the prompt tokens it holds. prompt_tokens: prompt tokens of all admitted requests.
    reused_tokens: prompt tokens that came from the prefix cache. failures: requests that ended with an error since the
    last one that did not; errors that a request itself caused do not count. last_failure: the last of these errors.
    """

    slots: int
    free_slots: int
    running: int
    waiting: int
    max_seq_len: int
    max_block_size: int
    state_bytes: int
    prefix_bytes: int
    prefix_tokens: int
    prompt_tokens: int
    reused_tokens: int
    failures: int = 0
    last_failure: str = ""
