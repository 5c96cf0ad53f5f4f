"""What workers count and tell with their heartbeats. A field's name is its name in /metrics: msi_worker_FIELD_total.

Counts are since the start of a life; times are in seconds, `*_s`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Annotated

from msi.errors import shown
from msi.meter import percentile
from msi.placement import at_layer
from msi.types import Measured

MAX_KEYS = 4096  # of a map: an expert worker counts waves by their size, and rows by their expert
MAX_CELLS = 2**18  # layers times experts of a worker
MAX_LAYERS = 2**12
MAX_ID_CHARS = 256
MAX_SIZES = 34  # powers of two
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.]{0,63}")

Count = Annotated[int, range(2**62)]


@dataclass(frozen=True, slots=True)
class AttentionCounters:
    """Attributes:
    batch_tokens, batch_contexts: of the passes; see `msi.types.MicroBatch`.
    blocks, kv_blocks: KV blocks; those of sequences that are missing while none runs are `kv_blocks_lost`.
    prompt_tokens: of sequences that were admitted; `prefix_hit_tokens` of them were known.
    readmitted_tokens, readmission_hit_tokens: the same for sequences that were admitted again.
    kv_blocks_sent, kv_blocks_received: to and from other attention workers; see `msi.attention.block_exchange`.
    kv_blocks_sending_s: that it took to send them.
    packed_again, hedges, hedges_cancelled: see `msi.net.turns.DispatchCounters`.
    set_aside: how often expert workers were, as they were late or slow.
    dropped: immediates that were not used, by reason.
    """

    passes: Count = 0
    batch_tokens: Count = 0
    batch_contexts: Count = 0
    blocks: Count = 0
    posts: Count = 0
    packed_again: Count = 0
    hedges: Count = 0
    hedges_cancelled: Count = 0
    set_aside: Count = 0
    rows_sent: Count = 0
    answers: Count = 0
    attention_s: Measured = 0.0
    shared_experts_s: Measured = 0.0
    sample_s: Measured = 0.0
    weight_bytes_read: Count = 0
    kv_blocks: Count = 0
    kv_blocks_lost: Count = 0
    kv_blocks_evicted: Count = 0
    sequences_failed: Count = 0
    prompt_tokens: Count = 0
    prefix_hit_tokens: Count = 0
    readmitted_tokens: Count = 0
    readmission_hit_tokens: Count = 0
    preemptions: Count = 0
    overtakings: Count = 0
    kv_blocks_sent: Count = 0
    kv_blocks_received: Count = 0
    kv_blocks_sending_s: Measured = 0.0
    dropped: dict[str, Count] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        _check(self)


@dataclass(frozen=True, slots=True)
class ExpertCounters:
    """Attributes:
    alone_batches: of the batches, those of rows that were out of step.
    wait_s: W as it is now.
    seats: that are taken now.
    experts_loaded: of layers, since the start of the life, and `loading_s`, the time that it took.
    wave_sizes: batches by the seats in them.
    expert_rows: rows that each expert here has computed in all layers together, by its id in the model.
    dropped: immediates that were not used, by reason.
    """

    batches: Count = 0
    alone_batches: Count = 0
    evictions: Count = 0
    readmissions: Count = 0
    wait_s: Measured = 0.0
    rows_landed: Count = 0
    answers: Count = 0
    seats: Count = 0
    expert_batches_s: Measured = 0.0
    weight_bytes_read: Count = 0
    experts_loaded: Count = 0
    loading_s: Measured = 0.0
    wave_sizes: dict[int, Count] = field(default_factory=dict, hash=False)
    expert_rows: dict[int, Count] = field(default_factory=dict, hash=False)
    dropped: dict[str, Count] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        _check(self)


@dataclass(frozen=True, slots=True)
class ProcessCounters:
    """Attributes:
    at_s: when these were read, by the worker's clock.
    busy_s: that its device computed.
    loop_cpu_s: of the thread that the loop runs on.
    cut_off: connections that were, by reason.
    """

    at_s: Measured = 0.0
    busy_s: Measured = 0.0
    control_messages_sent: Count = 0
    loop_cpu_s: Measured = 0.0
    rss_bytes: Count = 0
    cut_off: dict[str, Count] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        _check(self)


@dataclass(frozen=True, slots=True)
class PeerDelay:
    """How an attention worker's last exchanges with one expert worker went; medians and 99th percentiles.

    Attributes:
        delay_s: from post to answer, less the time that the peer says it had the rows: network and event loops.
        residence_s: that time: the wait for a batch, and its computing.
        bytes_sent, bytes_received: of rows and of answers, since it was connected.
    """

    worker_id: str
    delay_s: Measured
    delay_p99_s: Measured
    residence_s: Measured
    residence_p99_s: Measured
    bytes_sent: Count = 0
    bytes_received: Count = 0


@dataclass(frozen=True, slots=True)
class LayerRows:
    """Rows that the experts of a worker have computed since the start of its life, layer by layer.

    Attributes:
        experts: of all layers, or of each, in the order of their rows.
        rows: of each layer.

    Raises:
        ValueError: they do not belong together, or are more than are told.
    """

    experts: tuple[tuple[int, ...], ...] = ()
    rows: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        num_cells = sum(map(len, self.rows))
        num_layers = len(self.rows)
        is_whole = len(self.experts) in (min(1, num_layers), num_layers)
        if num_cells > MAX_CELLS or num_layers > MAX_LAYERS or not is_whole:
            raise ValueError(f"{num_cells} rows of {num_layers} layers, experts of {len(self.experts)}")
        for layer, counts in enumerate(self.rows):
            held = at_layer(self.experts, layer)
            if (
                len(set(held)) != len(counts)
                or not all(0 <= one < MAX_KEYS for one in held)
                or min(counts, default=0) < 0
                or max(counts, default=0) >= 2**62
            ):
                raise ValueError(f"{len(counts)} rows of {len(held)} experts of layer {layer} are no such count")

    @staticmethod
    def of(by_layer: Sequence[Mapping[int, int]]) -> LayerRows:
        """By an expert's id; nothing of more than can be told."""
        if sum(map(len, by_layer)) > MAX_CELLS or len(by_layer) > MAX_LAYERS:
            return NO_ROWS
        experts = tuple(tuple(of_layer) for of_layer in by_layer)
        return LayerRows(
            experts if len(set(experts)) > 1 else experts[:1], tuple(tuple(one.values()) for one in by_layer)
        )

    def by_expert(self) -> list[dict[int, int]]:
        """Of each layer, by an expert's id."""
        held = (at_layer(self.experts, layer) for layer in range(len(self.rows)))
        return [dict(zip(experts, rows, strict=True)) for experts, rows in zip(held, self.rows, strict=True)]


NO_ROWS = LayerRows()


@dataclass(frozen=True, slots=True)
class BatchTimes:
    """What batches of an expert worker took for which about as many rows landed, since the start of its life.

    Attributes:
        most: rows of one of them; each has more than half as many.
        num_batches, rows, seconds: of all of them together.
    """

    most: Annotated[int, range(2**33)]
    num_batches: Count
    rows: Count
    seconds: Measured

    def since(self, before: BatchTimes | None) -> BatchTimes:
        """Without those of before."""
        if before is None or before.num_batches > self.num_batches:
            return self
        return BatchTimes(
            self.most, self.num_batches - before.num_batches, max(0, self.rows - before.rows),
            max(0.0, self.seconds - before.seconds),
        )  # fmt: skip

    def plus(self, other: BatchTimes | None) -> BatchTimes:
        if other is None:
            return self
        return BatchTimes(
            self.most, self.num_batches + other.num_batches, self.rows + other.rows, self.seconds + other.seconds
        )


def peer_delays(
    exchanges: Mapping[str, Iterable[tuple[float, float]]], num_bytes: Mapping[str, tuple[int, int]] | None = None
) -> tuple[PeerDelay, ...]:
    """The slowest way first.

    Args:
        exchanges: of each peer by its id: seconds from post to answer, and those at the peer.
        num_bytes: sent to each, and received from it.
    """
    found = []
    for worker_id, pairs in exchanges.items():
        sound = [(trip_s, there_s) for trip_s, there_s in pairs if 0.0 <= there_s < math.inf]  # bytes may say anything
        delays = [max(0.0, trip_s - there_s) for trip_s, there_s in sound]
        residences = [min(there_s, 1e9) for _, there_s in sound]
        if sound:
            delay_s, delay_p99_s, residence_s, residence_p99_s = (
                percentile(times, share) for times in (delays, residences) for share in (0.5, 0.99)
            )
            sent, received = (num_bytes or {}).get(worker_id, (0, 0))
            found.append(PeerDelay(worker_id, delay_s, delay_p99_s, residence_s, residence_p99_s, sent, received))
    return tuple(sorted(found, key=lambda one: -one.delay_s))


Counters = AttentionCounters | ExpertCounters | ProcessCounters


def by_name(counters: Counters | None) -> dict[str, float]:
    """All of them flat; what is counted by a key is called FIELD_KEY."""
    values: dict[str, float] = {}
    for one in fields(counters) if counters is not None else ():
        value = getattr(counters, one.name)
        if isinstance(value, dict):
            values |= {f"{one.name}_{key}": count for key, count in value.items()}
        else:
            values[one.name] = value
    return values


def by_reason(counts: dict[str, int]) -> dict[str, int]:
    """Counts of reasons that are words, as /metrics can name them."""
    return {reason.replace(" ", "_"): count for reason, count in counts.items()}


def check_names(names: dict[str, float] | dict[str, int]) -> None:
    """Raises ValueError: /metrics could not show these."""
    if len(names) > MAX_KEYS:
        raise ValueError(f"{len(names)} counters; at most {MAX_KEYS} are told")
    for name in names:
        if not NAME.fullmatch(name):
            raise ValueError(f"{shown(name)} is no counter's name")


def check_peers(peers: tuple[PeerDelay, ...]) -> None:
    """Raises ValueError: /metrics could not show these."""
    ids = {peer.worker_id for peer in peers}
    if len(ids) != len(peers) or len(peers) > MAX_KEYS:
        raise ValueError(f"{len(peers)} peers by {len(ids)} ids; each is told of once, and at most {MAX_KEYS}")
    for worker_id in ids:
        if not worker_id.isprintable() or len(worker_id) > MAX_ID_CHARS:
            raise ValueError(f"{shown(worker_id)} is no worker's id")


def check_batches(batches: tuple[BatchTimes, ...]) -> None:
    """Raises ValueError: they are of more sizes than there are."""
    if len({one.most for one in batches}) != len(batches) or len(batches) > MAX_SIZES:
        raise ValueError(f"{len(batches)} sizes of batches; each is told of once, and at most {MAX_SIZES}")


def _check(counters: Counters) -> None:
    for one in fields(counters):
        value = getattr(counters, one.name)
        if not isinstance(value, dict):
            continue
        words = {key: count for key, count in value.items() if isinstance(key, str)}
        check_names(words)
        numbers = value.keys() - words.keys()
        if len(numbers) > MAX_KEYS or not all(0 <= number < MAX_KEYS for number in numbers):
            raise ValueError(f"{one.name} has {len(numbers)} keys; at most {MAX_KEYS} are told of, from 0 on")


NOT_COUNTED = ProcessCounters()
