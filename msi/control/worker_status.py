"""How a worker is: what its heartbeats carry to the coordinator, and the coordinator's Stats to clients."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated

from msi.control.counters import (
    NO_ROWS,
    NOT_COUNTED,
    AttentionCounters,
    BatchTimes,
    ExpertCounters,
    LayerRows,
    PeerDelay,
    ProcessCounters,
    by_name,
    check_batches,
    check_names,
    check_peers,
)
from msi.control.watched import Watched
from msi.types import Measured, StageTimes

Count = Annotated[int, range(2**40)]
Seconds = Annotated[float, (0.0, math.inf)]


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """What a heartbeat carries.

    Attributes:
        loaded_bytes: of `total_bytes` of weights, while loading.
        attention, experts: of the roles that run.
        loop: what `msi.watchdog` measured, by name.
        peers: of an attention worker, the expert workers by their delay, the slowest first.
        watched: while somebody watches.
        batches: of an expert worker, by their size.
        layer_rows: of an expert worker.

    Raises:
        ValueError: /metrics could not show a name of `loop`, or a peer; or a size comes twice.
    """

    loaded_bytes: Annotated[int, range(2**60)]
    total_bytes: Annotated[int, range(2**60)]
    num_running: Count
    num_waiting: Count
    num_free_blocks: Count
    times: StageTimes
    process: ProcessCounters = NOT_COUNTED
    attention: AttentionCounters | None = None
    experts: ExpertCounters | None = None
    loop: dict[str, Measured] = field(default_factory=dict, hash=False)
    peers: tuple[PeerDelay, ...] = ()
    watched: Watched | None = None
    batches: tuple[BatchTimes, ...] = ()
    layer_rows: LayerRows = NO_ROWS

    def __post_init__(self) -> None:
        check_names(self.loop)
        check_peers(self.peers)
        check_batches(self.batches)

    @property
    def counters(self) -> dict[str, float]:
        """Everything countable, by name."""
        return {**by_name(self.attention), **by_name(self.experts), **by_name(self.process), **self.loop}
