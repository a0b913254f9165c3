"""The places of a server: how many choices may run or wait at once, of all clients and of each API key."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from twotower.engine import AsyncLLM
from twotower.server.metrics import Metrics
from twotower.server.request_errors import RequestError
from twotower.server.settings import Limits


class ConcurrencyLimiter:
    """Counts the choices that run or wait; used from the event loop's thread only."""

    def __init__(self, engine: AsyncLLM, metrics: Metrics) -> None:
        self.engine, self.metrics = engine, metrics
        self._active: Counter[str | None] = Counter()  # by API key

    @property
    def active(self) -> int:
        """Choices that run or wait."""
        return self._active.total()

    @contextmanager
    def acquire(self, count: int, key: str | None, limits: Limits) -> Iterator[None]:
        """Holds places for so many choices.

        Raises:
            RequestError: the choices never fit (400), the queue is full, or the key has too many choices at once (429).
        """
        self._check(count, key, limits)
        self._active[key] += count
        try:
            yield
        finally:
            self._active[key] -= count
            if not self._active[key]:
                del self._active[key]

    def _check(self, count: int, key: str | None, limits: Limits) -> None:
        slots = self.engine.stats.slots
        most = slots + limits.queue
        if count > most:
            raise RequestError(f"{count} choices never fit this server's {most} places", param="n")
        if limits.per_key is not None and count > limits.per_key:
            raise RequestError(f"{count} choices are more than the {limits.per_key} that a key may have", param="n")
        wait = self.metrics.expected_wait(self.active, slots)
        if self.active + count > most:
            raise RequestError(
                "too many requests wait; try again later", status=429, code="overloaded", retry_after=wait
            )
        if limits.per_key is not None and self._active[key] + count > limits.per_key:
            words = (
                f"this key has {self._active[key]} choices at work and may have {limits.per_key}; wait for one to end"
            )
            raise RequestError(words, status=429, code="too_many_at_once", retry_after=wait)
