"""Metrics as Prometheus reads them: types, labels, histograms of choices, and the names of vLLM."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families as parse
from serving import NAME, RunningServer, serving, wait_until

# What the public dashboards of vLLM read.
OF_VLLM = {
    "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc", "vllm:prompt_tokens",
    "vllm:generation_tokens", "vllm:request_success", "vllm:time_to_first_token_seconds",
    "vllm:inter_token_latency_seconds", "vllm:e2e_request_latency_seconds", "vllm:request_queue_time_seconds",
    "vllm:request_prefill_time_seconds", "vllm:request_decode_time_seconds", "vllm:request_prompt_tokens",
    "vllm:request_generation_tokens", "vllm:prefix_cache_queries", "vllm:prefix_cache_hits",
    "vllm:spec_decode_num_drafts", "vllm:spec_decode_num_draft_tokens", "vllm:spec_decode_num_accepted_tokens",
}  # fmt: skip


@pytest.fixture(scope="module")
def served() -> Iterator[RunningServer]:
    with serving(rows=1) as found:
        for mode in ("verified", "ar"):
            assert found.complete(mode=mode, max_tokens=12, seed=1).status_code == 200
        found.complete(5)
        found.complete(mode="ar", max_tokens=0)
        yield found
        wait_until(found.is_idle)


def test_types_and_labels(served: RunningServer) -> None:
    families = {family.name: family for family in parse(served.get("/metrics").text)}
    for name, family in families.items():
        if not name.startswith("process_"):
            assert {sample.labels["model_name"] for sample in family.samples} <= {NAME}, name
        for sample in family.samples:
            if sample.name.endswith("_total"):
                assert family.type == "counter", sample.name
    for name in ("twotower_prefix_query_tokens", "twotower_prefix_hit_tokens", "twotower_requests", "twotower_tokens"):
        assert families[name].type == "counter"
    for name in ("tokens_per_pass", "acceptance", "queue_seconds", "time_to_first_token_seconds", "request_seconds"):
        assert families[f"twotower_{name}"].type == "histogram"
    statuses = {sample.labels["status"] for sample in families["twotower_request_seconds"].samples}
    assert {"200", "400"} <= statuses
    assert families.keys() >= OF_VLLM


def test_the_dashboard_of_grafana_reads_these_metrics(served: RunningServer) -> None:
    """Every name and label of its queries is one of a sample of the server."""
    file = Path(__file__).resolve().parents[2] / "containers" / "grafana" / "dashboards" / "twotower.json"
    board = json.loads(file.read_text(encoding="utf-8"))
    labels: dict[str, set[str]] = {}
    for family in parse(served.get("/metrics").text):
        for sample in family.samples:
            labels.setdefault(sample.name, {"job"}).update(sample.labels)
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    for variable in board["templating"]["list"]:
        queries.append(re.sub(r"label_values\((.*), (\w+)\)", r"sum by (\2) (\1)", variable["query"]["query"]))
    read: set[str] = set()
    for query in queries:
        names = set(re.findall(r"\b(?:twotower|vllm|process)[_:]\w+", query))
        assert names, query
        assert labels.keys() >= names, query
        grouped = {label.strip() for group in re.findall(r" by \(([^)]*)\)", query) for label in group.split(",")}
        assert all(labels[name] >= grouped for name in names), query
        for name, selected in re.findall(r"(\w+)\{([^}]*)\}", query):
            assert labels[name] >= set(re.findall(r"(\w+)=~?\"", selected)), query
        read |= names
    needed = {"tokens_total", "tokens_per_pass_sum", "accepted_tokens_total", "queue_requests", "queue_seconds_bucket"}
    assert {name.removeprefix("twotower_") for name in read} >= needed | {"request_seconds_bucket"}


def test_histograms_of_choices(served: RunningServer) -> None:
    served.finish_requests()
    counts = served.counts()
    assert counts["twotower_queue_seconds_count",] == 3
    assert counts["twotower_time_to_first_token_seconds_count",] == 2  # one choice has no tokens
    assert counts["twotower_time_per_output_token_seconds_count",] == 2
    assert counts["twotower_acceptance_count",] == 1
    assert counts["twotower_acceptance_sum",] == pytest.approx(
        counts["twotower_accepted_tokens_total",] / counts["twotower_drafted_tokens_total",]
    )
    assert counts["twotower_request_seconds_count", "/v1/completions", "200"] == 3
    assert counts["vllm:request_success_total", "length"] + counts.get(("vllm:request_success_total", "stop"), 0) == 3
    assert counts["vllm:generation_tokens_total",] == counts["twotower_tokens_total", "completion"]
    assert counts["vllm:prompt_tokens_total",] == counts["twotower_tokens_total", "prompt"]
    first = counts["twotower_time_to_first_token_seconds_sum",]
    assert 0 < first < counts["vllm:e2e_request_latency_seconds_sum",]


def test_queue_time_is_the_time_before_a_slot(served: RunningServer) -> None:
    """With one slot, the second choice waits until the first one ends."""
    served.finish_requests()
    before = served.counts()["twotower_queue_seconds_sum",]
    with ThreadPoolExecutor(2) as pool, served.step_gate.closed():
        asked = [pool.submit(served.complete, mode="ar", max_tokens=2) for _ in range(2)]
        wait_until(lambda: served.service.active_choices == 2)
        served.step_gate.wait_blocked()
        served.step_gate.allow(None)
        assert [found.result().status_code for found in asked] == [200, 200]
    served.finish_requests()
    counts = served.counts()
    assert counts["twotower_queue_seconds_sum",] > before
    assert counts["vllm:request_queue_time_seconds_sum",] == pytest.approx(counts["twotower_queue_seconds_sum",])
