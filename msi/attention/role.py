"""What an attention worker hosts: its requests, the links to the expert workers, the lanes between both, measuring.

Requests come in, progress goes out through `report`; both are values, the control plane is somebody else's.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from msi.attention.block_exchange import BlockExchange
from msi.attention.expert_links import ExpertLinks
from msi.attention.lanes import run_lane
from msi.attention.measuring import Measuring
from msi.attention.requests import Requests
from msi.control.counters import AttentionCounters, PeerDelay, by_reason, peer_delays
from msi.control.messages import Assignment
from msi.control.move_messages import Release
from msi.errors import ConfigError, EngineError
from msi.net.transport import Transport
from msi.placement import Placement
from msi.placement_change import check_layers
from msi.request_spans import OpenSpans
from msi.tracing import Spans
from msi.worker.host import LoadedModel

log = logging.getLogger(__name__)


class AttentionRole:
    """One life (incarnation) of an attention worker; weights and device outlive it.

    Args:
        num_blocks: KV blocks, the padding block included.
        report: takes the messages for the coordinator.
        clock: seconds, monotonic.
        tracer: gets a span for each exchange with an expert worker.
        spans: of requests; None where they are not traced.

    Attributes:
        num_lanes: that run; 0 before they do.
    """

    def __init__(
        self,
        assignment: Assignment,
        model: LoadedModel,
        transport: Transport,
        num_blocks: int,
        report: Callable[[Any], None],
        *,
        clock: Callable[[], float],
        tracer: Spans | None = None,
        spans: OpenSpans | None = None,
    ) -> None:
        self.links = ExpertLinks(assignment, model.shape, transport, report, allocator=model.memory, clock=clock)
        self.trace(tracer)
        self._assignment = assignment
        self._clock = clock
        # First: it refuses more blocks than there is memory for, which a list of them all would only try for minutes.
        self.half = model.attention_half(self.links.link, num_blocks)
        self.requests = Requests(assignment, model.shape, num_blocks, report, clock, model.grammars, spans)
        self._spans = spans
        self.measuring = Measuring(assignment, model.shape, num_blocks, self.half, self.links.link)
        self.blocks: BlockExchange | None = None  # with other attention workers
        self.num_lanes = self._num_started = 0
        self._num_blocks = num_blocks
        self._num_layers = model.shape.num_sparse_layers
        self._tasks: asyncio.TaskGroup | None = None

    @property
    def placement(self) -> Placement:
        """Of passes that begin."""
        return self.links.placement

    async def exchange_blocks(self, new_transport: Callable[[], Transport]) -> str:
        """From now on requests that move take their KV blocks along; returns where ours are to come to.

        "" where they stay: the host does not reach them, they are not known by their contents, or nobody can connect.
        """
        memory, ours = self.half.block_memory, self._assignment
        if memory is None or not ours.limits.enable_prefix_caching or ours.is_colocated:
            return ""
        exchange = self.blocks = BlockExchange(
            ours.instance, memory, new_transport(), lambda: self.requests.scheduler.exchanged, self._clock
        )
        try:
            return await exchange.listen()
        except EngineError as error:
            self.blocks = None
            await exchange.close()
            log.info("%s: requests that move are computed again: %s", ours.worker_id, error)
            return ""

    async def release(self, wanted: Release) -> None:
        """A request goes on elsewhere: it runs on here until its KV blocks are there."""
        sequence = self.requests.scheduler.find(wanted.request_id)
        if sequence is not None and wanted.address and self.blocks is not None:
            await self.blocks.send(wanted.request_id, wanted.address, wanted.again_s)
        if self.requests.scheduler.find(wanted.request_id) is sequence:  # else it is another one that is called so
            self.requests.release(wanted)

    async def run(self) -> None:
        """Links and lanes, for ever. Cancel it to stop."""
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            tasks.create_task(self.links.keep_connected(self.half), name="connector")
            tasks.create_task(self.requests.compile_grammars(), name="grammars")
            tasks.create_task(self.requests.tell_progress(), name="progress")

    def close(self) -> None:
        """Lets go of the device, once `run` has ended. Idempotent."""
        self.half.close()
        self.links.link.close()
        if self._spans is not None:
            self._spans.end_where(lambda key: True, "its worker began anew, or ended")

    def trace(self, spans: Spans | None) -> None:
        """Each exchange with an expert worker gets a span from now on; None: no longer."""
        self.links.link.turns.exchange_watch = None if spans is None else partial(_trace_exchange, spans)

    def use_lanes(self, num_lanes: int) -> None:
        """Serves with this many micro-batches in flight; with fewer than before, once what runs on others has ended."""
        assert self._tasks is not None
        if not self.num_lanes:
            self.requests.spread_over(num_lanes)
        elif num_lanes != self.num_lanes:
            self.requests.use_lanes(num_lanes)
        self.num_lanes = num_lanes
        for lane in range(self._num_started, num_lanes):
            running = run_lane(lane, self.requests, self.half, self.links.link)
            self._tasks.create_task(running, name=f"lane {lane}")
        self._num_started = max(self._num_started, num_lanes)

    def use_placement(self, placement: Placement) -> None:
        """Passes that begin from now on send rows where it says; those in flight keep to the one they began with.

        Raises:
            ConfigError: it is one of other nodes, experts or layers.
        """
        ours = self.placement
        check_layers(placement, self._num_layers)
        if (placement.num_nodes, placement.num_experts) != (ours.num_nodes, ours.num_experts):
            raise ConfigError(
                f"a placement of {placement.num_experts} experts on {placement.num_nodes} nodes cannot follow one of "
                f"{ours.num_experts} on {ours.num_nodes}"
            )
        if placement.version > ours.version:
            self.half.use_placement(placement)
            self.links.use_placement(placement)

    def peers(self) -> tuple[PeerDelay, ...]:
        """The expert workers, the slowest first."""
        link = self.links.link
        return peer_delays(link.nodes.exchanges, link.nodes.num_bytes(link.layout))

    def counters(self) -> AttentionCounters:
        requests, scheduler, link, half = self.requests, self.requests.scheduler, self.links.link.counters, self.half
        return AttentionCounters(
            passes=requests.num_passes,
            batch_tokens=requests.batch_tokens,
            batch_contexts=requests.batch_contexts,
            blocks=self._num_blocks - 1,
            posts=link.posts,
            packed_again=link.packed_again,
            hedges=link.hedges,
            hedges_cancelled=link.hedges_cancelled,
            set_aside=self.links.link.late.hedging.num_set_aside,
            rows_sent=link.rows,
            answers=link.answers,
            attention_s=half.meter.total_s,
            shared_experts_s=half.shared_meter.total_s,
            sample_s=half.pass_meter.total_s,
            weight_bytes_read=half.weight_bytes_read,
            kv_blocks=scheduler.num_blocks,
            kv_blocks_lost=0 if scheduler.num_running else scheduler.num_blocks - scheduler.num_free_blocks,
            kv_blocks_sent=0 if self.blocks is None else self.blocks.num_sent,
            kv_blocks_received=0 if self.blocks is None else self.blocks.num_received,
            kv_blocks_sending_s=0.0 if self.blocks is None else self.blocks.sending_s,
            dropped=by_reason(link.dropped),
            **scheduler.counters,
        )


def _trace_exchange(spans: Spans, worker_id: str, lane: int, posted_at: float, now: float, residence_s: float) -> None:
    """Under the worker's own row, one for each lane: from a post to its answer, by whom, and what of it was the way."""
    spans.span(worker_id, lane, posted_at, now, row=1 + lane, delay_ms=1e3 * (now - posted_at - residence_s))
