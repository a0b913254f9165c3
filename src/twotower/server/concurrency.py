"""Limits the choices that run or wait at once, of all clients and of each API key."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from twotower.engine import AsyncLLM
from twotower.server.metrics import Metrics
from twotower.server.request_errors import RequestError
from twotower.server.settings import Limits


class ConcurrencyLimiter:
    """Counts the choices that run or wait. Only the thread of the event loop may use it."""

    def __init__(self, engine: AsyncLLM, metrics: Metrics) -> None:
        self.engine, self.metrics = engine, metrics
        self._active: Counter[str | None] = Counter()  # by API key

    @property
    def active(self) -> int:
        """Number of choices that run or wait."""
        return self._active.total()

    @contextmanager
    def acquire(self, count: int, key: str | None, limits: Limits) -> Iterator[None]:
        """Counts `count` choices as active while the context is open.

        Raises:
            RequestError: The request exceeds the limits even of an idle server (400), the queue is full, or the key has
                too many active choices (429).
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
            words = f"the request has {count} choices; this server runs and queues at most {most}, so reduce n"
            raise RequestError(words, param="n")
        if limits.per_key is not None and count > limits.per_key:
            words = (
                f"the request has {count} choices; an API key may have at most {limits.per_key} at once, so reduce n"
            )
            raise RequestError(words, param="n")
        wait = self.metrics.expected_wait(self.active, slots)
        if self.active + count > most:
            raise RequestError(
                f"the queue is full; try again in {wait} s", status=429, code="overloaded", retry_after=wait
            )
        if limits.per_key is not None and self._active[key] + count > limits.per_key:
            active = self._active[key]
            words = f"this API key has {active} of at most {limits.per_key} choices at once; try again in {wait} s"
            raise RequestError(words, status=429, code="too_many_at_once", retry_after=wait)
