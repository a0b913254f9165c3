"""The metrics of several replicas as one page for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

LABEL = "replica"


class _Merged(Collector):
    def __init__(self, metrics: Sequence[Metric]) -> None:
        self.metrics = metrics

    def collect(self) -> Iterator[Metric]:
        return iter(self.metrics)


def merged(expositions: Sequence[tuple[str, bytes]]) -> bytes:
    """Metrics of several replicas in the text format: each metric once, each sample with the label of its replica.

    expositions: the name of a replica and its metrics.
    """
    found: dict[str, Metric] = {}
    for replica, text in sorted(expositions):
        for metric in text_string_to_metric_families(text.decode()):
            own = found.setdefault(metric.name, Metric(metric.name, metric.documentation, metric.type))
            for sample in metric.samples:
                own.samples.append(sample._replace(labels={**sample.labels, LABEL: replica}))
    registry = CollectorRegistry()
    registry.register(_Merged(list(found.values())))
    return generate_latest(registry)
