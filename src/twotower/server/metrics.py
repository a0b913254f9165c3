"""Prometheus metrics of a server: own names, and beside them those of vLLM, for its public dashboards."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest

from twotower.decoding.output import Generation
from twotower.engine import AsyncLLM
from twotower.server.engine_metrics import EngineCollector

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
TOKEN_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5, 10)
PER_PASS = (1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 12, 16)
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
DECAY = 0.9  # of the moving average of a choice's time, per choice

Metric = TypeVar("Metric", Counter, Histogram)


@dataclass
class ChoiceTimes:
    """Times of a choice by `time.perf_counter`: of its submission, of its first and of its last tokens."""

    submitted: float = field(default_factory=time.perf_counter)
    first: float | None = None
    last: float = 0.0


class Metrics:
    """Metrics in a registry of their own, so that two servers in a process stay separate.

    model: name of the served model, the label `model_name` of every metric.
    """

    def __init__(self, engine: AsyncLLM, model: str) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.registry.register(EngineCollector(engine, model))
        self._model = model
        self._average_seconds = 1.0  # moving average of the time of a choice
        counter, histogram = self._counter, self._histogram
        self.requests = counter("twotower_requests", "HTTP requests", ["route", "status"])
        self.tokens = counter("twotower_tokens", "Prompt tokens and new tokens", ["kind"])
        self.passes = counter("twotower_passes", "Passes of a sequence after the prefill", ["tower"])
        self.choices = counter("twotower_choices", "Finished choices", ["mode", "reason"])
        self.drafted = counter("twotower_drafted_tokens", "Tokens drafted in verified decoding")
        self.accepted = counter("twotower_accepted_tokens", "Drafted tokens that were accepted")
        self.per_pass = histogram("twotower_tokens_per_pass", "New tokens per pass of a choice", PER_PASS, ["mode"])
        self.acceptance = histogram(
            "twotower_acceptance", "Share of the drafted tokens of a choice that were accepted", SHARES
        )
        self.first_block_seconds = histogram(
            "twotower_time_to_first_block_seconds", "Time from the request to its first event", SECONDS
        )
        self.first_token_seconds = histogram(
            "twotower_time_to_first_token_seconds", "Time from the request to the first tokens of a choice", SECONDS
        )
        self.token_seconds = histogram(
            "twotower_time_per_output_token_seconds", "Mean time of a token after the first ones", TOKEN_SECONDS
        )
        self.queue_seconds = histogram("twotower_queue_seconds", "Time that a choice waited for a slot", SECONDS)
        self.request_seconds = histogram(
            "twotower_request_seconds",
            "Time from the request to the end of the response",
            SECONDS,
            ["route", "status"],
        )
        self._vllm = _VllmMetrics(self)

    def _counter(self, name: str, text: str, labels: Sequence[str] = ()) -> Counter:
        return self._of_model(Counter(name, text, ("model_name", *labels), registry=self.registry), labels)

    def _histogram(self, name: str, text: str, buckets: Sequence[float], labels: Sequence[str] = ()) -> Histogram:
        made = Histogram(name, text, ("model_name", *labels), registry=self.registry, buckets=buckets)
        return self._of_model(made, labels)

    def _of_model(self, metric: Metric, labels: Sequence[str]) -> Metric:
        return metric if labels else metric.labels(self._model)

    def observe_tokens(self, times: ChoiceTimes, count: int) -> None:
        """Counts new tokens of a choice, as they arrive. Updates `times`."""
        now = time.perf_counter()
        if times.first is None:
            times.first = now
            self.first_token_seconds.observe(now - times.submitted)
            self._vllm.first_token_seconds.observe(now - times.submitted)
        else:
            for _ in range(count):
                self._vllm.token_seconds.observe((now - times.last) / count)
        times.last = now

    def observe_result(self, result: Generation, times: ChoiceTimes, max_tokens: int) -> None:
        """Counts a finished choice. max_tokens: the most new tokens that it could have."""
        model, written = self._model, len(result.tokens)
        self.tokens.labels(model, "prompt").inc(result.prompt_tokens)
        self.tokens.labels(model, "completion").inc(written)
        self.passes.labels(model, "denoiser").inc(result.denoiser_passes)
        self.passes.labels(model, "context").inc(result.context_passes)
        self.choices.labels(model, result.mode, result.finish_reason).inc()
        self.drafted.inc(result.drafted)
        self.accepted.inc(result.accepted)
        if result.passes:
            self.per_pass.labels(model, result.mode).observe(result.tokens_per_pass)
        if result.drafted:
            self.acceptance.observe(result.accepted / result.drafted)
        taken = result.prefill_seconds + result.decode_seconds
        self._average_seconds = DECAY * self._average_seconds + (1 - DECAY) * taken
        total = time.perf_counter() - times.submitted
        waited = max(total - taken, 0.0)
        self.queue_seconds.observe(waited)
        if written > 1 and times.first is not None and result.decode_seconds:
            self.token_seconds.observe(result.decode_seconds / written)
        self._vllm.observe_result(result, waited, total, max_tokens)

    def observe_request(self, route: str, status: int, started: float) -> None:
        """Counts an HTTP request. started: `time.perf_counter()` at its start."""
        self.requests.labels(self._model, route, str(status)).inc()
        self.request_seconds.labels(self._model, route, str(status)).observe(time.perf_counter() - started)

    def expected_wait(self, before: int, rows: int) -> int:
        """Expected whole seconds until `before` choices have finished, `rows` at a time; at least 1."""
        return max(1, math.ceil(before / max(rows, 1) * self._average_seconds))

    def exposition(self) -> bytes:
        """The metrics in the Prometheus text format."""
        return generate_latest(self.registry)


class _VllmMetrics:
    """The metrics of vLLM that its public dashboards read. A request of vLLM is a choice here."""

    def __init__(self, metrics: Metrics) -> None:
        counter, histogram = metrics._counter, metrics._histogram
        self._model = metrics._model
        self.prompt_tokens = counter("vllm:prompt_tokens", "Prompt tokens")
        self.new_tokens = counter("vllm:generation_tokens", "New tokens")
        self.success = counter("vllm:request_success", "Finished choices", ["finished_reason"])
        self.drafts = counter("vllm:spec_decode_num_drafts", "Rounds with a draft")
        self.drafted = counter("vllm:spec_decode_num_draft_tokens", "Drafted tokens")
        self.accepted = counter("vllm:spec_decode_num_accepted_tokens", "Accepted tokens")
        self.first_token_seconds = histogram("vllm:time_to_first_token_seconds", "Time to the first tokens", SECONDS)
        self.token_seconds = histogram("vllm:inter_token_latency_seconds", "Time between tokens", TOKEN_SECONDS)
        self.mean_token_seconds = histogram(
            "vllm:request_time_per_output_token_seconds", "Mean time of a token of a choice", TOKEN_SECONDS
        )
        self.total_seconds = histogram("vllm:e2e_request_latency_seconds", "Time of a choice", SECONDS)
        self.queue_seconds = histogram("vllm:request_queue_time_seconds", "Time before a slot", SECONDS)
        self.slot_seconds = histogram("vllm:request_inference_time_seconds", "Time in a slot", SECONDS)
        self.prefill_seconds = histogram("vllm:request_prefill_time_seconds", "Time of the prefill", SECONDS)
        self.decode_seconds = histogram("vllm:request_decode_time_seconds", "Time after the prefill", SECONDS)
        self.prompt_lengths = histogram("vllm:request_prompt_tokens", "Prompt tokens of a choice", TOKENS)
        self.new_lengths = histogram("vllm:request_generation_tokens", "New tokens of a choice", TOKENS)
        self.max_lengths = histogram("vllm:request_params_max_tokens", "Most new tokens of a choice", TOKENS)

    def observe_result(self, result: Generation, waited: float, total: float, max_tokens: int) -> None:
        """Counts a finished choice. waited: seconds before a slot; total: seconds since its submission."""
        written = len(result.tokens)
        self.prompt_tokens.inc(result.prompt_tokens)
        self.new_tokens.inc(written)
        self.success.labels(self._model, "stop" if result.finish_reason == "eos" else result.finish_reason).inc()
        self.drafts.inc(result.drafts)
        self.drafted.inc(result.drafted)
        self.accepted.inc(result.accepted)
        if written:
            self.mean_token_seconds.observe(result.decode_seconds / written)
        self.total_seconds.observe(total)
        self.queue_seconds.observe(waited)
        self.slot_seconds.observe(result.prefill_seconds + result.decode_seconds)
        self.prefill_seconds.observe(result.prefill_seconds)
        self.decode_seconds.observe(result.decode_seconds)
        self.prompt_lengths.observe(result.prompt_tokens)
        self.new_lengths.observe(written)
        self.max_lengths.observe(max_tokens)
