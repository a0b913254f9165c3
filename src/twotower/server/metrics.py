"""Prometheus metrics of a server."""

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
DECAY = 0.9  # of the moving average of a choice's time, per choice

Metric = TypeVar("Metric", Counter, Gauge)


class Metrics:
    """Metrics in a registry of their own, so that two servers in a process stay separate."""

    def __init__(self, engine: AsyncLLM) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._average_seconds = 1.0  # moving average of the time of a choice
        for name, text, read in (
            ("queue_requests", "Choices that wait for a slot", lambda: engine.stats.waiting),
            ("running_requests", "Choices that are being generated", lambda: engine.stats.running),
            (
                "state_bytes",
                "Bytes of KV caches and Mamba states of all slots",
                lambda: engine.stats.state_bytes,
            ),
            ("prefix_bytes", "Bytes of the prefix cache", lambda: engine.stats.prefix_bytes),
            ("prefix_query_tokens", "Prompt tokens looked up in the prefix cache", lambda: engine.stats.prompt_tokens),
            ("failures_in_a_row", "Failed choices since the last one that succeeded", lambda: engine.stats.failures),
            ("prefix_hit_tokens", "Prompt tokens found in the prefix cache", lambda: engine.stats.reused_tokens),
        ):
            self._metric(Gauge, name, text).set_function(read)
        self.requests = self._metric(Counter, "requests", "HTTP requests", ["route", "status"])
        self.tokens = self._metric(Counter, "tokens", "Prompt tokens and new tokens", ["kind"])
        self.passes = self._metric(Counter, "passes", "Passes of a sequence after the prefill", ["tower"])
        self.choices = self._metric(Counter, "choices", "Finished choices", ["mode", "reason"])
        self.drafted = self._metric(Counter, "drafted_tokens", "Tokens drafted in verified decoding")
        self.accepted = self._metric(Counter, "accepted_tokens", "Drafted tokens that were accepted")
        self.per_pass = self._histogram("tokens_per_pass", "New tokens per pass of a choice", PER_PASS, ["mode"])
        self.first_block_seconds = self._histogram(
            "time_to_first_block_seconds", "Time from the request to its first event", SECONDS
        )
        self.request_seconds = self._histogram(
            "request_seconds", "Time from the request to the end of the response", SECONDS, ["route"]
        )

    def _metric(self, kind: type[Metric], name: str, text: str, labels: Sequence[str] = ()) -> Metric:
        return kind(name, text, labels, namespace="twotower", registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float], labels: Sequence[str] = ()) -> Histogram:
        return Histogram(name, text, labels, namespace="twotower", registry=self.registry, buckets=buckets)

    def observe_result(self, result: Generation) -> None:
        """Counts a finished choice."""
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
        """Counts an HTTP request. started: `time.perf_counter()` at its start."""
        self.requests.labels(route, str(status)).inc()
        self.request_seconds.labels(route).observe(time.perf_counter() - started)

    def expected_wait(self, before: int, rows: int) -> int:
        """Expected whole seconds until `before` choices have finished, `rows` at a time; at least 1."""
        return max(1, math.ceil(before / max(rows, 1) * self._average_seconds))

    def exposition(self) -> bytes:
        """The metrics in the Prometheus text format."""
        return generate_latest(self.registry)
