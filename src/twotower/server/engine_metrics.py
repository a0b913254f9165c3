"""Metrics that are read from the engine when they are asked for: gauges, and counters of the engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from twotower.engine import AsyncLLM
from twotower.engine.stats import EngineStats

Read = Callable[[EngineStats], float]

GAUGES: dict[str, tuple[str, Read]] = {
    "twotower_queue_requests": ("Choices that wait for a slot", lambda stats: stats.waiting),
    "twotower_running_requests": ("Choices that are being generated", lambda stats: stats.running),
    "twotower_state_bytes": ("Bytes of KV caches and Mamba states of all slots", lambda stats: stats.state_bytes),
    "twotower_prefix_bytes": ("Bytes of the prefix cache", lambda stats: stats.prefix_bytes),
    "twotower_failures_in_a_row": (
        "Failed choices since the last one that succeeded",
        lambda stats: stats.failures,
    ),
    "vllm:num_requests_waiting": ("As twotower_queue_requests", lambda stats: stats.waiting),
    "vllm:num_requests_running": ("As twotower_running_requests", lambda stats: stats.running),
    "vllm:kv_cache_usage_perc": (
        "Share of the slots that are in use, from 0 to 1",
        lambda stats: 1 - stats.free_slots / stats.slots,
    ),
}
COUNTERS: dict[str, tuple[str, Read]] = {
    "twotower_prefix_query_tokens": (
        "Prompt tokens looked up in the prefix cache",
        lambda stats: stats.prompt_tokens,
    ),
    "twotower_prefix_hit_tokens": ("Prompt tokens found in the prefix cache", lambda stats: stats.reused_tokens),
    "vllm:prefix_cache_queries": ("As twotower_prefix_query_tokens_total", lambda stats: stats.prompt_tokens),
    "vllm:prefix_cache_hits": ("As twotower_prefix_hit_tokens_total", lambda stats: stats.reused_tokens),
}


class EngineCollector(Collector):
    """Reads the last snapshot of an engine. model: value of the label `model_name`."""

    def __init__(self, engine: AsyncLLM, model: str) -> None:
        self.engine, self.model = engine, model

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        stats = self.engine.stats
        for name, (text, read) in GAUGES.items():
            gauge = GaugeMetricFamily(name, text, labels=("model_name",))
            gauge.add_metric((self.model,), read(stats))
            yield gauge
        for name, (text, read) in COUNTERS.items():
            counter = CounterMetricFamily(name, text, labels=("model_name",))
            counter.add_metric((self.model,), read(stats))
            yield counter
