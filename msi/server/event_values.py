"""What the page is told: typed values, which become JSON field by field, and how they follow from the instance's stats.

Pure. Times are in seconds (`*_s`) or, within a window of spans, in microseconds (`*_us`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from msi.control.client_messages import Stats, WorkerStats
from msi.meter import percentile

MAX_SENTENCE_CHARS = 500


@dataclass(frozen=True, slots=True)
class Hello:
    """What does not change. Event "hello", the first of a stream."""

    version: str
    model: str
    has_chat: bool
    max_model_len: int
    needs_key: bool


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Of the last minute; zeros of none."""

    count: int = 0
    p50_s: float = 0.0
    p99_s: float = 0.0

    @staticmethod
    def of(values: Iterable[float]) -> Percentiles:
        kept = list(values)
        return Percentiles(len(kept), percentile(kept, 0.5), percentile(kept, 0.99))


@dataclass(frozen=True, slots=True)
class Load:
    """Requests as this gateway saw them.

    Attributes:
        first_token: TTFT, from a request to its first token.
        per_token: TPOT, from one token of a choice to its next, in the mean of each request.
    """

    prompt_tokens_per_s: float
    tokens_per_s: float
    first_token: Percentiles
    per_token: Percentiles


@dataclass(frozen=True, slots=True)
class WorkerNow:
    """Of one worker, as its last heartbeat says.

    Attributes:
        loaded: share of its weights.
        reason: why it is lost.
    """

    worker_id: str
    role: str
    host: str
    pid: int
    incarnation: int
    state: str
    reason: str
    loaded: float
    busy: float
    bubble: float
    attention_s: float
    expert_s: float
    comm_s: float
    num_running: int
    num_waiting: int
    kv_blocks: int
    kv_blocks_free: int
    rss_bytes: int
    evictions: int
    preemptions: int


@dataclass(frozen=True, slots=True)
class Link:
    """Between an attention worker and a peer: how rows travel, and how its last exchanges went."""

    worker_id: str
    peer: str
    way: str
    delay_s: float = 0.0
    delay_p99_s: float = 0.0
    residence_s: float = 0.0
    residence_p99_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Numbers:
    """Event "numbers", twice a second.

    Attributes:
        sentence: how things are: "ready", or what is waited for.
        num_lanes: m.
        links: the slowest way first.
        drift: stage times measured over planned, by stage, where a plan runs.
    """

    is_ready: bool
    sentence: str
    num_lanes: int
    num_requests: int
    load: Load
    workers: tuple[WorkerNow, ...] = ()
    links: tuple[Link, ...] = ()
    drift: dict[str, float] | None = None


def numbers(is_ready: bool, sentence: str, load: Load, stats: Stats | None) -> Numbers:
    """Args: stats: None where nobody answers."""
    sentence = sentence[:MAX_SENTENCE_CHARS]
    if stats is None:
        return Numbers(is_ready, sentence, 0, 0, load)
    workers = in_order(stats.workers)
    return Numbers(
        is_ready, sentence, stats.num_lanes, stats.num_requests, load, tuple(map(worker_now, workers)), links(workers),
        stats.drift or None,
    )  # fmt: skip


def in_order(workers: Iterable[WorkerStats]) -> list[WorkerStats]:
    """Attention before experts, each by number."""

    def key(worker: WorkerStats) -> tuple[bool, list[tuple[int, str]]]:
        return worker.role != "attention", [
            (int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d{1,18})", worker.worker_id)
        ]

    return sorted(workers, key=key)


def worker_now(worker: WorkerStats) -> WorkerNow:
    status, attention, experts = worker.status, worker.status.attention, worker.status.experts
    times = status.times
    return WorkerNow(
        worker_id=worker.worker_id,
        role=worker.role,
        host=worker.host,
        pid=worker.pid,
        incarnation=worker.incarnation,
        state=worker.state,
        reason=worker.reason[:MAX_SENTENCE_CHARS],
        loaded=status.loaded_bytes / status.total_bytes if status.total_bytes else 0.0,
        busy=times.busy,
        bubble=times.bubble,
        attention_s=times.attention_s,
        expert_s=times.expert_s,
        comm_s=times.comm_s,
        num_running=status.num_running,
        num_waiting=status.num_waiting,
        kv_blocks=0 if attention is None else attention.blocks,
        kv_blocks_free=status.num_free_blocks,
        rss_bytes=status.process.rss_bytes,
        evictions=0 if experts is None else experts.evictions,
        preemptions=0 if attention is None else attention.preemptions,
    )


def links(workers: Iterable[WorkerStats]) -> tuple[Link, ...]:
    """Of attention workers that live, whether they exchanged anything yet or not."""
    found = []
    for worker in workers:
        if worker.state == "lost":
            continue
        watched = worker.status.watched
        ways = {} if watched is None else {one.worker_id: one.way for one in watched.ways}
        for peer in worker.status.peers:
            found.append(
                Link(
                    worker.worker_id, peer.worker_id, ways.pop(peer.worker_id, ""), peer.delay_s, peer.delay_p99_s,
                    peer.residence_s, peer.residence_p99_s,
                )
            )  # fmt: skip
        found += [Link(worker.worker_id, peer, way) for peer, way in ways.items()]
    return tuple(sorted(found, key=lambda link: -link.delay_s))
