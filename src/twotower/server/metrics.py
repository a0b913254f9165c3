"""What a server counts, in Prometheus's terms."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from twotower.decoding.output import Generation
from twotower.engine import AsyncLLM

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
PER_PASS = (1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 12, 16)
DECAY = 0.9  # of what is known about a choice's time, at each further one

Metric = TypeVar("Metric", Counter, Gauge)


class Metrics:
    """One registry a server, so that two of them in a process do not mix."""

    def __init__(self, engine: AsyncLLM) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._average_seconds = 1.0  # that a choice takes, of late
        for name, text, read in (
            ("queue_requests", "Choices that wait for a place", lambda: engine.stats.waiting),
            ("running_requests", "Choices at work", lambda: engine.stats.running),
            ("state_bytes", "Keys, values and states, for all texts", lambda: engine.stats.state_bytes),
            ("prefix_bytes", "Prompts' beginnings that are kept", lambda: engine.stats.prefix_bytes),
            ("prefix_query_tokens", "Prompt tokens that came", lambda: engine.stats.prompt_tokens),
            ("prefix_hit_tokens", "Prompt tokens that were known and not read", lambda: engine.stats.reused_tokens),
        ):
            self._metric(Gauge, name, text).set_function(read)
        self.requests = self._metric(Counter, "requests", "HTTP requests", ["route", "status"])
        self.tokens = self._metric(Counter, "tokens", "Tokens read and written", ["kind"])
        self.passes = self._metric(Counter, "passes", "A row's passes after its prompt", ["tower"])
        self.choices = self._metric(Counter, "choices", "Choices that ended", ["mode", "reason"])
        self.drafted = self._metric(Counter, "drafted_tokens", "Tokens drafted in verified decoding")
        self.accepted = self._metric(Counter, "accepted_tokens", "Drafted tokens that were kept")
        self.per_pass = self._histogram("tokens_per_pass", "Of a choice", PER_PASS, ["mode"])
        self.first = self._histogram("time_to_first_block_seconds", "From the request", SECONDS)
        self.whole = self._histogram("request_seconds", "From the request to its end", SECONDS, ["route"])

    def _metric(self, kind: type[Metric], name: str, text: str, labels: Sequence[str] = ()) -> Metric:
        return kind(name, text, labels, namespace="twotower", registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float], labels: Sequence[str] = ()) -> Histogram:
        return Histogram(name, text, labels, namespace="twotower", registry=self.registry, buckets=buckets)

    def observe_result(self, result: Generation) -> None:
        """Counts a choice."""
        self.tokens.labels("prompt").inc(result.prompt_tokens)
        self.tokens.labels("completion").inc(len(result.tokens))
        self.passes.labels("denoiser").inc(result.denoiser_passes)
        self.passes.labels("context").inc(result.context_passes)
        self.choices.labels(result.mode, result.finish_reason).inc()
        self.drafted.inc(result.drafted)
        self.accepted.inc(result.accepted)
        if result.passes:
            self.per_pass.labels(result.mode).observe(result.tokens_per_pass)
        taken = result.prefill_seconds + result.decode_seconds
        self._average_seconds = DECAY * self._average_seconds + (1 - DECAY) * taken

    def observe_request(self, route: str, status: int, started: float) -> None:
        """Counts an HTTP request that began at so much of `time.perf_counter`."""
        self.requests.labels(route, str(status)).inc()
        self.whole.labels(route).observe(time.perf_counter() - started)

    def expected_wait(self, before: int, rows: int) -> int:
        """Whole seconds until a place may be free, with so many choices before, `rows` at a time."""
        return max(1, math.ceil(before / max(rows, 1) * self._average_seconds))

    def exposition(self) -> bytes:
        """For a scraper."""
        return generate_latest(self.registry)
