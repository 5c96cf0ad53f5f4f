"""What GET /metrics says, in Prometheus' text format: under vLLM's names what vLLM has too, under ours the rest.

vllm:FIELD{model_name}                      each field of `msi.server.edge_counters.EdgeCounters`: requests as this edge
                                            saw them; vllm:request_success_total has a finished_reason, too
vllm:time_per_output_token_seconds          the older name of vllm:inter_token_latency_seconds
vllm:num_requests_running, vllm:num_requests_waiting, vllm:kv_cache_usage_perc (a share of 1),
vllm:prefix_cache_queries_total, vllm:prefix_cache_hits_total (tokens), vllm:num_preemptions_total
                                            {model_name,engine}: of each attention worker, which is vLLM's engine
vllm:cache_config_info{engine,block_size,num_gpu_blocks}

msi_requests_total{outcome}, msi_prompt_tokens_total, msi_generation_tokens_total,
msi_time_to_first_token_seconds, msi_inter_token_seconds
                                            the same counts; outcome: stop, length, error or cancelled
msi_requests_in_flight, msi_micro_batches   in the whole instance; m
msi_workers{role,state}                     how many there are: loading, ready, draining or lost
msi_resumptions_total                       requests that went on elsewhere when their attention worker was lost
msi_moves_total                             requests that went on elsewhere while theirs lived, see --balance-attention
msi_requests_refused_as_too_late_total, msi_requests_shed_total
                                            requests whose first token was predicted to come too late, when they came
                                            and as they waited
msi_requests_out_of_time_total              requests whose own time was over
msi_requests_displaced_total                requests whose place in a full queue was given to one that goes first
msi_attention_seconds, msi_expert_seconds, msi_comm_seconds   T_a, T_e and T_c of each worker, medians
msi_peer_delay_seconds{peer,quantile}, msi_peer_residence_seconds{peer,quantile}
                                            of each attention worker's last exchanges with each expert worker: the way
                                            there and back, and the time there; medians and 99th percentiles
msi_peer_bytes_total{peer,direction}        rows that went there and answers that came back, "sent" and "received"
msi_busy_ratio, msi_bubble_ratio            compute time over wall time; 1 - busy while work is admitted
msi_running, msi_waiting                    sequences of each attention worker
msi_kv_cache_used_ratio, msi_kv_cache_blocks
msi_wave_size_total{size}                   batches of each expert worker by the seats in them
msi_expert_rows_total{expert}               rows that an expert has computed on each worker that holds it, all layers
msi_expert_imbalance_ratio{scope}           rows since the start, busiest over mean: of all experts ("expert"), or
                                            of the workers that hold them ("worker")
msi_rebalances_total, msi_rebalanced_experts_total, msi_rebalance_gain_ratio, msi_placement_version
                                            experts that were placed anew by load: how often, how many loaded, by layer,
                                            what the slowest expert worker was to gain by the last; which placement runs
msi_slow_workers, msi_slow_workers_drained_total
                                            workers that take several times as long as the others of their role, and
                                            those that were told to leave as they did so for long
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

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST as CONTENT_TYPE_LATEST
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from msi.control.client_messages import Stats, WorkerStats
from msi.control.counters import by_name
from msi.kernels import BLOCK_TOKENS
from msi.server.edge_counters import EdgeCounters, Histogram
from msi.watchdog import BUCKETS_S

# counters that are told in a form of their own
TOLD_APART = ("blocks", "seats", "at_s", "rss_bytes", "wave_sizes_", "expert_rows_")
TURNED_AWAY = {
    "requests_refused_as_too_late": "Requests that were predicted to have their first token too late.",
    "requests_shed": "Requests that waited until their first token could not come in time.",
    "requests_out_of_time": "Requests whose own time was over.",
    "requests_displaced": "Requests that lost their place in a full queue to one that goes first.",
}
OLDER_NAMES = {  # of fields of EdgeCounters
    "inter_token_latency_seconds": ("vllm:time_per_output_token_seconds", "msi_inter_token_seconds"),
    "time_to_first_token_seconds": ("msi_time_to_first_token_seconds",),
    "prompt_tokens": ("msi_prompt_tokens",),
    "generation_tokens": ("msi_generation_tokens",),
}
MODEL = "model_name"
COORDINATOR = "coordinator"  # where requests wait that no engine has yet


def exposition(model_name: str, edge: EdgeCounters, stats: Stats, gateway: Mapping[str, float]) -> bytes:
    """Everything; `gateway` are the gateway's own counters."""
    return generate_latest(_Metrics(model_name, edge, stats, gateway))


class _Metrics(Collector):
    """The edge's own metrics, then the instance's."""

    def __init__(self, model_name: str, edge: EdgeCounters, stats: Stats, gateway: Mapping[str, float]) -> None:
        self._model_name = model_name
        self._edge = edge
        self._stats = stats
        self._gateway = gateway

    def collect(self) -> Iterator[Metric]:
        yield from _edge_metrics(self._model_name, self._edge)
        yield from _as_vllm(self._model_name, self._stats)
        yield from _instance_metrics(self._stats, self._gateway)


# -- as vLLM ---------------------------------------------------------------------------------------------------------


def _edge_metrics(model_name: str, edge: EdgeCounters) -> Iterator[Metric]:
    for one in fields(edge):
        value, meaning = getattr(edge, one.name), one.metadata["meaning"]
        names = (f"vllm:{one.name}", *OLDER_NAMES.get(one.name, ()))
        for name in names:
            labels = {MODEL: model_name} if name.startswith("vllm:") else {}
            keys = tuple(labels.values())
            match value:
                case Histogram():
                    yield _histogram(name, meaning, value, labels)
                case dict():
                    counts = [((*keys, reason), count) for reason, count in value.items()]
                    yield _counter(name, meaning, counts, (*labels, "finished_reason"))
                case _:
                    yield _counter(name, meaning, [(keys, value)], tuple(labels))
    outcomes = [
        (("cancelled" if reason == "abort" else reason,), count) for reason, count in edge.request_success.items()
    ]
    yield _counter("msi_requests", "Requests that ended here.", outcomes, ("outcome",))


def _histogram(name: str, meaning: str, values: Histogram, labels: Mapping[str, str]) -> Metric:
    family = HistogramMetricFamily(name, meaning, labels=tuple(labels))
    family.add_metric(tuple(labels.values()), values.cumulative(), values.sum)
    return family


def _counter(name: str, meaning: str, counts: Iterable[tuple[Sequence[str], float]], labels: Sequence[str]) -> Metric:
    family = CounterMetricFamily(name, meaning, labels=labels)
    for values, count in counts:
        family.add_metric(values, count)
    return family


def _as_vllm(model_name: str, stats: Stats) -> Iterator[Metric]:
    """What vLLM tells of each of its engines: each attention worker is one. Requests may wait at the coordinator."""
    engines = {(model_name, one.worker_id): one.status for one in stats.workers if one.role == "attention"}
    counted = {labels: one.attention for labels, one in engines.items() if one.attention is not None}
    running, waiting, used = (
        GaugeMetricFamily(f"vllm:{name}", meaning, labels=(MODEL, "engine"))
        for name, meaning in (
            ("num_requests_running", "Requests that run."),
            ("num_requests_waiting", "Requests that wait."),
            ("kv_cache_usage_perc", "Share of the KV blocks in use; 1 is all."),
        )
    )
    waiting.add_metric((model_name, COORDINATOR), stats.num_waiting)
    gone = {one.worker_id for one in stats.workers if one.state == "lost"}  # whose last words are about what is no more
    for labels, status in engines.items():
        if labels[1] in gone:
            continue
        running.add_metric(labels, status.num_running)
        waiting.add_metric(labels, status.num_waiting)
        if status.attention is not None and status.attention.blocks:
            used.add_metric(labels, 1 - status.num_free_blocks / status.attention.blocks)
    yield from (running, waiting, used)
    counters = {
        "prefix_cache_queries": ("Tokens of prompts that were looked for in the prefix cache.", "prompt_tokens"),
        "prefix_cache_hits": ("Tokens of prompts that the prefix cache had.", "prefix_hit_tokens"),
        "num_preemptions": ("Sequences that gave their blocks up and were computed again.", "preemptions"),
    }
    for name, (meaning, field) in counters.items():
        counts = [(labels, float(getattr(one, field))) for labels, one in counted.items()]
        yield _counter(f"vllm:{name}", meaning, counts, (MODEL, "engine"))
    config = GaugeMetricFamily(
        "vllm:cache_config_info", "The KV cache.", labels=(MODEL, "engine", "block_size", "num_gpu_blocks")
    )
    for labels, one in counted.items():
        config.add_metric((*labels, str(BLOCK_TOKENS), str(one.blocks)), 1)
    yield config


# -- ours ------------------------------------------------------------------------------------------------------------


def _instance_metrics(stats: Stats, gateway: Mapping[str, float]) -> Iterator[Metric]:
    yield GaugeMetricFamily("msi_requests_in_flight", "Requests in the instance now.", stats.num_requests)
    states = GaugeMetricFamily("msi_workers", "Workers by role and state.", labels=["role", "state"])
    for (role, state), number in sorted(Counter((one.role, one.state) for one in stats.workers).items()):
        states.add_metric([role, state], number)
    yield states
    resumptions = stats.counters.get("resumptions", 0.0)
    yield CounterMetricFamily("msi_resumptions", "Requests that went on elsewhere.", resumptions)
    moves = stats.counters.get("moves", 0.0)
    yield CounterMetricFamily("msi_moves", "Requests that moved to another attention worker.", moves)
    for name, meaning in TURNED_AWAY.items():
        yield CounterMetricFamily(f"msi_{name}", meaning, stats.counters.get(name, 0.0))
    yield from _rebalances(stats.counters)
    yield from _slow(stats.counters)
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
    yield _imbalance(stats.workers)
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
    counts = [
        ((worker.worker_id, peer.worker_id, direction), float(count))
        for worker in workers
        for peer in worker.status.peers
        for direction, count in (("sent", peer.bytes_sent), ("received", peer.bytes_received))
    ]
    yield _counter("msi_peer_bytes", "Rows there, and answers back.", counts, ("worker", "peer", "direction"))


def _rebalances(counters: Mapping[str, float]) -> Iterator[Metric]:
    done, moved, gain, version = (
        counters.get(name, 0.0) for name in ("rebalances", "rebalanced_experts", "rebalance_gain", "placement_version")
    )
    yield CounterMetricFamily("msi_rebalances", "Placements of experts by load.", done)
    yield CounterMetricFamily("msi_rebalanced_experts", "Experts that workers loaded for them.", moved)
    yield GaugeMetricFamily("msi_rebalance_gain_ratio", "Of the slowest worker's time, predicted of the last.", gain)
    yield GaugeMetricFamily("msi_placement_version", "The placement of experts that is used.", version)


def _slow(counters: Mapping[str, float]) -> Iterator[Metric]:
    slow, drained = (counters.get(name, 0.0) for name in ("slow_workers", "slow_workers_drained"))
    yield GaugeMetricFamily("msi_slow_workers", "Take several times as long as the others of their role.", slow)
    yield CounterMetricFamily(
        "msi_slow_workers_drained", "That were told to leave as they were slow for long.", drained
    )


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


def _imbalance(workers: tuple[WorkerStats, ...]) -> Metric:
    gauge = GaugeMetricFamily("msi_expert_imbalance_ratio", "Rows of the busiest over the mean.", labels=["scope"])
    of_experts: Counter[int] = Counter()
    of_workers: Counter[str] = Counter()
    for worker in workers:
        if worker.status.experts is not None:
            of_experts.update(worker.status.experts.expert_rows)
            of_workers[worker.worker_id] += sum(worker.status.experts.expert_rows.values())
    for scope, counts in (("expert", of_experts.values()), ("worker", of_workers.values())):
        if total := sum(counts):
            gauge.add_metric([scope], max(counts) * len(counts) / total)
    return gauge


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
