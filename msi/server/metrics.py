"""What Prometheus is told: requests as this edge saw them, and the workers' own counts as their heartbeats say.

msi_requests_total{outcome}                 stop, length, error or cancelled
msi_prompt_tokens_total, msi_generation_tokens_total
msi_time_to_first_token_seconds, msi_inter_token_seconds      histograms
msi_requests_in_flight, msi_micro_batches   in the whole instance; m
msi_attention_seconds, msi_expert_seconds, msi_comm_seconds   T_a, T_e and T_c of each worker, medians
msi_peer_delay_seconds{peer,quantile}, msi_peer_residence_seconds{peer,quantile}
                                            of each attention worker's last exchanges with each expert worker: the way
                                            there and back, and the time there; medians and 99th percentiles
msi_busy_ratio, msi_bubble_ratio            compute time over wall time; 1 - busy while work is admitted
msi_running, msi_waiting                    sequences of each attention worker
msi_kv_cache_used_ratio, msi_kv_cache_blocks
msi_wave_size_total{size}                   batches of each expert worker by the seats in them
msi_expert_rows_total{expert}               rows that an expert has computed on each worker that holds it, all layers
msi_plan_drift_ratio{stage}, msi_plan_drift_alarms_total      where a plan runs: stage times measured over planned
msi_connections, msi_connections_cut_total, msi_connections_refused_total
                                            of HTTP: open, cut for being late or not reading, without a place
msi_preparations_given_up_total             large requests that took too long or too much memory to understand
msi_dropped_total{kind}                     messages and connections that the coordinator did not take
msi_loop_stall_seconds, msi_loop_stalls_total, msi_loop_stall_max_seconds
                                            of each process: lateness of its event loop, stalls of a tenth of a second
                                            and more, and the longest since its start
msi_worker_..._total                        everything else a worker counts, such as evictions
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from msi.control.counters import by_name
from msi.control.messages import Stats, WorkerStats
from msi.types import Output
from msi.watchdog import BUCKETS_S

__all__ = ["CONTENT_TYPE_LATEST", "Metrics"]

TTFT_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
INTER_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5, 10)
# counters that are told in a form of their own
TOLD_APART = ("blocks", "seats", "at_s", "rss_bytes", "wave_sizes_", "expert_rows_")


class Metrics:
    """One edge's."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        registry = self._registry
        self._requests = Counter("msi_requests", "Requests that ended here.", ["outcome"], registry=registry)
        self._prompt_tokens = Counter("msi_prompt_tokens", "Tokens of prompts.", registry=registry)
        self._generation_tokens = Counter("msi_generation_tokens", "Tokens that were generated.", registry=registry)
        self._first_token = Histogram(
            "msi_time_to_first_token_seconds", "From request to first token.", buckets=TTFT_BUCKETS, registry=registry
        )
        self._inter_token = Histogram(
            "msi_inter_token_seconds", "From one token of a choice to its next.", buckets=INTER_TOKEN_BUCKETS,
            registry=registry,
        )  # fmt: skip

    async def observed(
        self, outputs: AsyncGenerator[Output, None], num_choices: int = 1
    ) -> AsyncGenerator[Output, None]:
        """The same outputs, counted and timed. Closing it closes them.

        A request that is closed before all its choices have ended was cancelled, whatever some of them ended with.
        """
        started = time.monotonic()
        last_at: dict[int, float] = {}  # by choice
        num_ended = 0
        outcome = "cancelled"
        try:
            async for output in outputs:
                now = time.monotonic()
                if not last_at:
                    self._first_token.observe(now - started)
                    self._prompt_tokens.inc(output.num_prompt_tokens)
                elif output.index in last_at:
                    self._inter_token.observe(now - last_at[output.index])
                last_at[output.index] = now
                self._generation_tokens.inc(len(output.token_ids))
                if output.finish_reason is not None:
                    num_ended += 1
                    outcome = output.finish_reason if num_ended == num_choices else "cancelled"
                yield output
        except Exception:
            outcome = "error"
            raise
        finally:
            self._requests.labels(outcome).inc()
            await outputs.aclose()

    def refused(self) -> None:
        """A request ended before it began."""
        self._requests.labels("error").inc()

    def exposition(self, stats: Stats, counters: Mapping[str, float]) -> bytes:
        """Everything, in Prometheus' text format; `counters` are the gateway's own."""
        return generate_latest(_Together(self._registry, stats, counters))


class _Together(Collector):
    """The edge's own metrics, then the instance's."""

    def __init__(self, own: CollectorRegistry, stats: Stats, counters: Mapping[str, float]) -> None:
        self._own = own
        self._stats = stats
        self._counters = counters

    def collect(self) -> Iterator[Metric]:
        yield from self._own.collect()
        yield from _instance_metrics(self._stats, self._counters)


def _instance_metrics(stats: Stats, gateway: Mapping[str, float]) -> Iterator[Metric]:
    yield GaugeMetricFamily("msi_requests_in_flight", "Requests in the instance now.", stats.num_requests)
    yield GaugeMetricFamily("msi_micro_batches", "Micro-batches in flight per attention worker: m.", stats.num_lanes)
    attention = [worker for worker in stats.workers if worker.role == "attention"]
    gauges = {
        "attention_seconds": ("T_a, one micro-batch through a layer's attention half.", "attention_s"),
        "expert_seconds": ("T_e, one wave through a layer's experts.", "expert_s"),
        "comm_seconds": ("T_c, one way.", "comm_s"),
        "busy_ratio": ("Compute time over wall time.", "busy"),
        "bubble_ratio": ("1 - busy while work was admitted.", "bubble"),
    }
    for name, (meaning, field) in gauges.items():
        values = [(worker, float(getattr(worker.status.times, field))) for worker in stats.workers]
        yield _gauge(name, meaning, values)
    yield from _peers(attention)
    yield _gauge("running", "Sequences that run.", [(one, one.status.num_running) for one in attention])
    yield _gauge("waiting", "Requests that wait.", [(one, one.status.num_waiting) for one in attention])
    counts = ((one, one.status.attention) for one in attention)
    blocks = [(one, float(count.blocks)) for one, count in counts if count is not None and count.blocks]
    yield _gauge("kv_cache_blocks", "KV blocks.", blocks)
    used = [(one, 1 - one.status.num_free_blocks / count) for one, count in blocks]
    yield _gauge("kv_cache_used_ratio", "Share of the KV blocks in use.", used)
    rss = [(one, float(one.status.process.rss_bytes)) for one in stats.workers]
    yield _gauge("resident_memory_bytes", "Memory of the process.", rss)
    yield from _counters(stats.workers)
    yield _expert_rows(stats.workers)
    dropped = CounterMetricFamily("msi_dropped", "What the coordinator did not take from its sockets.", labels=["kind"])
    for kind, count in stats.dropped.items():
        dropped.add_metric([kind], count)
    yield dropped
    watched = {one.worker_id: one.status.loop for one in stats.workers}
    yield from _stalls({**watched, "coordinator": stats.counters, "gateway": gateway})
    yield from _door(gateway)
    if stats.drift:
        yield from _drift(stats.drift)


def _peers(workers: list[WorkerStats]) -> Iterator[Metric]:
    labels = ["worker", "peer", "quantile"]
    delay = GaugeMetricFamily("msi_peer_delay_seconds", "From post to answer, less the time there.", labels=labels)
    residence = GaugeMetricFamily("msi_peer_residence_seconds", "Of an exchange, the time there.", labels=labels)
    for worker in workers:
        for peer in worker.status.peers:
            for gauge, median_s, p99_s in (
                (delay, peer.delay_s, peer.delay_p99_s),
                (residence, peer.residence_s, peer.residence_p99_s),
            ):
                gauge.add_metric([worker.worker_id, peer.worker_id, "0.5"], median_s)
                gauge.add_metric([worker.worker_id, peer.worker_id, "0.99"], p99_s)
    yield from (delay, residence)


def _drift(drift: Mapping[str, float]) -> Iterator[Metric]:
    ratios = GaugeMetricFamily("msi_plan_drift_ratio", "Stage time measured over the plan's.", labels=["stage"])
    for stage, ratio in drift.items():
        if stage != "alarms":
            ratios.add_metric([stage], ratio)
    yield ratios
    yield CounterMetricFamily("msi_plan_drift_alarms", "Stages that parted from the plan.", drift["alarms"])


def _gauge(name: str, meaning: str, values: list[tuple[WorkerStats, float]]) -> Metric:
    gauge = GaugeMetricFamily(f"msi_{name}", meaning, labels=["worker", "role"])
    for worker, value in values:
        gauge.add_metric([worker.worker_id, worker.role], value)
    return gauge


def _counters(workers: tuple[WorkerStats, ...]) -> Iterator[Metric]:
    """Whatever workers count, under its own name."""
    waves = CounterMetricFamily("msi_wave_size", "Batches by the seats in them.", labels=["worker", "size"])
    others: dict[str, CounterMetricFamily] = {}
    for worker in workers:
        status = worker.status
        for size, count in status.experts.wave_sizes.items() if status.experts is not None else ():
            waves.add_metric([worker.worker_id, str(size)], count)
        for name, value in (by_name(status.attention) | by_name(status.experts) | by_name(status.process)).items():
            if not name.startswith(TOLD_APART) and name.isidentifier():
                if name not in others:
                    others[name] = CounterMetricFamily(
                        f"msi_worker_{name}", f"The worker's count {name}.", labels=["worker", "role"]
                    )
                others[name].add_metric([worker.worker_id, worker.role], value)
    yield waves
    yield from others.values()


def _expert_rows(workers: tuple[WorkerStats, ...]) -> Metric:
    rows = CounterMetricFamily("msi_expert_rows", "Rows that an expert has computed.", labels=["worker", "expert"])
    for worker in workers:
        for expert, count in worker.status.experts.expert_rows.items() if worker.status.experts is not None else ():
            rows.add_metric([worker.worker_id, str(expert)], count)
    return rows


def _door(gateway: Mapping[str, float]) -> Iterator[Metric]:
    yield GaugeMetricFamily("msi_connections", "HTTP connections that are open.", gateway.get("connections", 0.0))
    counters = {
        "connections_cut": "Connections that kept the server waiting, or did not read.",
        "connections_refused": "Connections for which there was no place.",
        "preparations_given_up": "Large requests that took too much to understand.",
    }
    for name, meaning in counters.items():
        yield CounterMetricFamily(f"msi_{name}", meaning, gateway.get(name, 0.0))


def _stalls(counters: Mapping[str, Mapping[str, float]]) -> Iterator[Metric]:
    """What `msi.watchdog` measured, by process."""
    labels = ["process"]
    late = HistogramMetricFamily("msi_loop_stall_seconds", "How late the event loop was.", labels=labels)
    long = CounterMetricFamily("msi_loop_stalls", "Stalls of a tenth of a second and more.", labels=labels)
    worst = GaugeMetricFamily("msi_loop_stall_max_seconds", "The longest stall.", labels=labels)
    for process, values in counters.items():
        if "loop_stalls" not in values:  # not watched, or it has not said yet
            continue
        buckets = [(str(bound), values.get(f"loop_stall_le_{bound}", 0.0)) for bound in BUCKETS_S]
        buckets.append(("+Inf", values.get("loop_stall_le_inf", 0.0)))
        late.add_metric([process], buckets, values.get("loop_stall_sum_s", 0.0))
        long.add_metric([process], values["loop_stalls"])
        worst.add_metric([process], values.get("loop_stall_max_s", 0.0))
    yield from (late, long, worst)
