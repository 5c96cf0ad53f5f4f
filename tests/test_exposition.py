"""GET /metrics by values: vLLM's names and meanings, ours for the rest; the dashboard names what is there."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from functools import partial
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from msi.control.client_messages import Stats, WorkerStats
from msi.control.counters import AttentionCounters, ExpertCounters, PeerDelay, ProcessCounters
from msi.control.worker_status import WorkerStatus
from msi.server.calls import observed
from msi.server.edge_counters import EdgeCounters, Histogram
from msi.server.metrics import Metrics
from msi.types import Output, StageTimes
from msi.watchdog import LoopWatch

DASHBOARD = Path(__file__).parent.parent / "tools" / "grafana.json"
TIMES = StageTimes(0.01, 0.02, 0.003, 0.5, 0.5)
GATEWAY = {"connections": 3.0, **LoopWatch("gateway").counters()}


def worker(worker_id, role, **told):
    process = ProcessCounters(rss_bytes=5)
    status = WorkerStatus(0, 0, 3, 2, 25, TIMES, process, loop=LoopWatch(worker_id).counters(), **told)
    return WorkerStats(worker_id, role, 1, "here", 0, "ready", status)


def stats():
    """Of an instance in which everything has happened."""
    attention = AttentionCounters(blocks=100, prompt_tokens=1000, prefix_hit_tokens=400, preemptions=7)
    peers = (PeerDelay("expert-0", 0.1, 0.2, 0.3, 0.4, 5000, 6000),)
    experts = [ExpertCounters(evictions=1, wave_sizes={1: 2}, expert_rows=rows) for rows in ({0: 30, 1: 10}, {2: 20})]
    workers = [worker(f"attention-{number}", "attention", attention=attention, peers=peers) for number in range(2)]
    workers += [worker(f"expert-{number}", "expert", experts=one) for number, one in enumerate(experts)]
    drift = {"attention": 1.1, "alarms": 2.0}
    return Stats(2, 9, tuple(workers), drift, {"not_a_message": 1.0}, LoopWatch("coordinator").counters(), 4)


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


async def told(metrics, clock, *pieces, num_choices=1, leaves=False):
    """Passes outputs: each is (seconds before it, choice, tokens, reason)."""

    async def outputs():
        for after_s, index, num_tokens, reason in pieces:
            clock.now += after_s
            yield Output("r", "", (1,) * num_tokens, reason, 10, index, queued_s=0.5)

    async with contextlib.aclosing(observed(outputs(), partial(metrics.request, num_choices))) as seen:
        async for _ in seen:
            if leaves:
                break


def samples(metrics):
    """Value by name and labels, of text that Prometheus' own parser takes."""
    found = {}
    for family in text_string_to_metric_families(metrics.exposition(stats(), GATEWAY).decode()):
        for sample in family.samples:
            key = (sample.name, *(f"{name}={value}" for name, value in sorted(sample.labels.items())))
            assert key not in found
            found[key] = sample.value
    return found


async def test_requests_are_timed_and_counted_as_vllm_does():
    clock = Clock()
    metrics = Metrics("tiny", clock)
    await told(metrics, clock, (2.0, 0, 1, None), (0.25, 0, 1, None), (0.25, 0, 1, "stop"))
    await told(
        metrics,
        clock,
        (1.0, 0, 1, None),
        (1.0, 1, 1, None),
        (1.0, 0, 1, "length"),
        (1.0, 1, 2, "length"),
        num_choices=2,
    )
    await told(metrics, clock, (1.0, 0, 1, None), leaves=True)
    metrics.refused()
    found = samples(metrics)

    def value(name, **labels):
        labels = {"model_name": "tiny", **labels}
        return found[f"vllm:{name}", *(f"{key}={one}" for key, one in sorted(labels.items()))]

    sums = {
        "time_to_first_token_seconds": (3, 4.0),
        "inter_token_latency_seconds": (4, 4.5),
        "time_per_output_token_seconds": (4, 4.5),
        "e2e_request_latency_seconds": (2, 6.5),
        "request_queue_time_seconds": (2, 1.0),
        "request_prefill_time_seconds": (2, 2.0),
        "request_decode_time_seconds": (2, 3.5),
        "request_inference_time_seconds": (2, 5.5),
        "request_prompt_tokens": (2, 20),
        "request_generation_tokens": (2, 8),
        "request_time_per_output_token_seconds": (2, 0.25 + 5 / 3),
    }
    for name, (count, total) in sums.items():
        assert value(f"{name}_count") == count, name
        assert value(f"{name}_sum") == pytest.approx(total), name
        assert value(f"{name}_bucket", le="+Inf") == count
    assert value("prompt_tokens_total") == 30
    assert value("generation_tokens_total") == 9
    ended = {reason: value("request_success_total", finished_reason=reason) for reason in ("stop", "length", "abort")}
    assert ended == {"stop": 1, "length": 1, "abort": 1}
    assert value("request_success_total", finished_reason="error") == 1
    assert found["msi_requests_total", "outcome=cancelled"] == 1
    assert found["msi_inter_token_seconds_count",] == 4


async def test_each_attention_worker_is_an_engine_of_vllms():
    found = samples(Metrics("tiny"))
    for number in range(2):
        labels = (f"engine=attention-{number}", "model_name=tiny")
        assert found["vllm:num_requests_running", *labels] == 3
        assert found["vllm:num_requests_waiting", *labels] == 2
        assert found["vllm:kv_cache_usage_perc", *labels] == 0.75
        assert found["vllm:prefix_cache_queries_total", *labels] == 1000
        assert found["vllm:prefix_cache_hits_total", *labels] == 400
        assert found["vllm:num_preemptions_total", *labels] == 7
    assert found["vllm:num_requests_waiting", "engine=coordinator", "model_name=tiny"] == 4
    assert found["msi_peer_bytes_total", "direction=received", "peer=expert-0", "worker=attention-0"] == 6000
    assert found["msi_expert_imbalance_ratio", "scope=expert"] == 1.5
    assert found["msi_expert_imbalance_ratio", "scope=worker"] == pytest.approx(4 / 3)


async def test_of_an_engine_that_is_gone_nothing_runs_or_is_used():
    first, *others = (told_of := stats()).workers
    told_of = dataclasses.replace(told_of, workers=(dataclasses.replace(first, state="lost"), *others))
    text = Metrics("tiny").exposition(told_of, GATEWAY).decode()
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert f'vllm:{name}{{engine="attention-1",model_name="tiny"}}' in text
        assert f'vllm:{name}{{engine="attention-0"' not in text


def test_every_field_that_the_edge_counts_is_told_under_its_name():
    names = {name.removesuffix("_total").removesuffix("_count") for name, *_ in samples(_with_one_of_each())}
    assert {f"vllm:{field.name}" for field in dataclasses.fields(EdgeCounters)} <= names


def _with_one_of_each():
    metrics = Metrics("tiny")
    metrics.refused()
    return metrics


def test_the_dashboard_names_metrics_and_labels_that_are_there():
    labels_of: dict[str, set[str]] = {}
    for name, *labels in samples(_with_one_of_each()):
        labels_of.setdefault(name, set()).update(label.partition("=")[0] for label in labels)
    dashboard = json.loads(DASHBOARD.read_text())
    shown = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    shown.append(dashboard["templating"]["list"][1]["query"]["query"])
    named = set()
    for expression in shown:
        names = re.findall(r"(?:vllm:|msi_)\w+", expression)
        assert names, expression
        named.update(names)
        for group in re.findall(r"by \(([^)]*)\)", expression):
            for label in group.split(", "):
                assert all(label in labels_of[name] for name in names), (label, expression)
    assert named <= labels_of.keys(), named - labels_of.keys()
    assert any(name.startswith("vllm:") for name in named)
    assert any(name.startswith("msi_") for name in named)
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            for label in re.findall(r"{{(\w+)}}", target["legendFormat"]):
                (name, *_) = re.findall(r"(?:vllm:|msi_)\w+", target["expr"])
                assert label in labels_of[name], (label, target)


@pytest.mark.parametrize(
    ("value", "bucket"), [(0.0, "1"), (1.0, "1"), (1.5, "2"), (2.0, "2"), (2.5, "+Inf"), (1e9, "+Inf")]
)
def test_a_value_counts_from_the_first_bucket_that_holds_it(value, bucket):
    histogram = Histogram((1, 2))
    histogram.observe(value)
    counts = dict(histogram.cumulative())
    bounds = [bound for bound, count in counts.items() if count]
    assert bounds[0] == bucket
    assert counts["+Inf"] == 1
