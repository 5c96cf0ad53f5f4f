"""Simulated devices: work takes virtual time in the order in which it was enqueued, and computes nothing."""

from __future__ import annotations

import asyncio
import random
import struct
from collections import deque
from collections.abc import Callable

from msi.experts.waves import Finished, WaveBatch
from msi.meter import StageMeter
from msi.net.combine_link import CombineLink
from msi.net.dispatch_link import DispatchLink, Turn
from msi.net.slots import HEADER_BYTES
from msi.planner.stage_costs import StageCosts
from msi.simulator.clock import virtual_loop
from msi.simulator.popularity import Routing
from msi.tracing import Tracer
from msi.types import MicroBatch, Placement, Sampled

ROW_BYTES = 16  # of a simulated row, either way
DRAW = struct.Struct("<II")  # lies where the first row would: the mark of the draw, and the tokens it was for
_Work = tuple[float, str, int, Callable[..., None], tuple[object, ...]]  # seconds, name, lane, what to call with what

TOKEN_ID = 0  # what every simulated sequence says, again and again


class SimulatedQueue:
    """One device: durations, one after another.

    Attributes:
        busy_s: time spent computing since the start.
        slowness: multiplies the duration of what starts from now on.
    """

    def __init__(self) -> None:
        self.busy_s = 0.0
        self.slowness = 1.0
        self.tracer: Tracer | None = None
        self._waiting: deque[_Work] = deque()
        self._running: _Work | None = None
        self._free_at = 0.0
        self._stalled_s = 0.0  # by which what runs is to end later
        self._loop = virtual_loop()

    def enqueue(self, duration_s: float, name: str, lane: int, finished: Callable[..., None], *results: object) -> None:
        """Calls `finished(seconds computed, *results)` when the work is through."""
        work = (duration_s, name, lane, finished, results)
        if self._running is None:
            self._start(work)
        else:
            self._waiting.append(work)

    def stall(self, duration_s: float) -> None:
        """Nothing gets on for a while."""
        if self._running is None:
            self._free_at = max(self._free_at, self._loop.time()) + duration_s
        else:
            self._stalled_s += duration_s

    def close(self) -> None:
        """What runs is not finished, and what is queued dropped. Idempotent."""
        self._running = None
        self._waiting.clear()

    def _start(self, work: _Work) -> None:
        self._running = work
        duration_s = work[0] * self.slowness
        self._free_at = max(self._free_at, self._loop.time()) + duration_s
        self._loop.compute_until(self._free_at, self._done, work, duration_s)

    def _done(self, work: _Work, duration_s: float) -> None:
        if self._running is not work:
            return  # closed meanwhile
        if self._stalled_s:
            self._free_at, self._stalled_s = self._free_at + self._stalled_s, 0.0
            self._loop.compute_until(self._free_at, self._done, work, duration_s)
            return
        self.busy_s += duration_s
        _, name, lane, finished, results = work
        if self.tracer is not None:
            self.tracer.span(name, lane, self._free_at - duration_s, self._free_at)
        self._running = None
        if self._waiting:
            self._start(self._waiting.popleft())
        finished(duration_s, *results)


class SimulatedAttention:
    """An attention half whose stages take what `costs` says and whose rows go where `routing` says.

    Implements `msi.worker.host.AttentionPart`.
    """

    def __init__(
        self,
        link: DispatchLink,
        queue: SimulatedQueue,
        *,
        num_layers: int,
        costs: StageCosts,
        routing: Routing,
        chance: random.Random,
    ) -> None:
        self.num_layers = num_layers
        self.meter = StageMeter()
        self.shared_meter = StageMeter()
        self.pass_meter = StageMeter()
        self.weight_bytes_read = 0
        self.queue = queue
        self._costs = costs
        self._routing = routing
        self._chance = chance
        self._draw_at = [link.layout.offset(lane) + HEADER_BYTES for lane in range(link.layout.num_lanes)]
        self._outboxes: dict[int, memoryview] = {}
        self._lanes: dict[int, tuple[MicroBatch, int, int]] = {}  # in flight, with its tokens and their contexts

    def attach(self, node: int, outbox: memoryview) -> None:
        self._outboxes[node] = outbox

    def use_placement(self, placement: Placement) -> None:
        """Rows go where `routing` says."""

    def begin(self, lane: int, micro_batch: MicroBatch) -> None:
        self._lanes[lane] = micro_batch, micro_batch.num_tokens, sum(micro_batch.context_lens)

    def attention_route_pack(self, lane: int, layer: int, turn: Turn) -> None:
        _, num_tokens, num_context_tokens = self._lanes[lane]
        duration_s = self._costs.attention_s(num_tokens, num_context_tokens)
        self.queue.enqueue(duration_s, "attention", lane, self._post, lane, turn, num_tokens)

    def _post(self, duration_s: float, lane: int, turn: Turn, num_tokens: int) -> None:
        self.meter.add(duration_s)
        mark, num_rows = self._routing.draw(num_tokens, self._chance)
        at = self._draw_at[lane]
        for node, outbox in self._outboxes.items():
            if num_rows[node]:
                DRAW.pack_into(outbox, at, mark, num_tokens)
        turn.post(num_rows)

    def combine(self, lane: int, layer: int) -> None:
        pass

    async def sample(self, lane: int) -> Sampled:
        micro_batch, _, _ = self._lanes.pop(lane)
        num_rows = len(micro_batch.logit_rows)
        duration_s = self._costs.pass_s(num_rows)
        if duration_s:  # what costs nothing takes no turn of the device either
            done = asyncio.get_running_loop().create_future()
            self.queue.enqueue(duration_s, "sample", lane, _resolve, done)
            self.pass_meter.add(await done)
        return Sampled([TOKEN_ID] * num_rows)


def _resolve(duration_s: float, done: asyncio.Future[float]) -> None:
    if not done.done():
        done.set_result(duration_s)


class SimulatedExperts:
    """The experts of one node, whose batches take what `costs` says. Implements `msi.worker.host.ExpertPart`."""

    def __init__(
        self, link: CombineLink, queue: SimulatedQueue, *, node: int, costs: StageCosts, routing: Routing
    ) -> None:
        self.meter = StageMeter()
        self.weight_bytes_read = 0
        self.queue = queue
        self._node = node
        self._costs = costs
        self._routing = routing
        self._landing = link.landing.memory
        self._stride = link.landing.stride
        self._draw_at = [link.layout.offset(lane) + HEADER_BYTES for lane in range(link.layout.num_lanes)]

    def attach(self, seat: int, outbox: memoryview) -> None:
        pass

    def expert_rows(self) -> dict[int, int]:
        return {}

    def run(self, batch: WaveBatch, finished: Finished) -> None:
        at, stride, landing = self._draw_at[batch.lane], self._stride, self._landing
        draws = [DRAW.unpack_from(landing, rows.seat * stride + at) for rows in batch.rows]
        pairs, active = self._routing.load(self._node, draws)
        duration_s = self._costs.expert_s(pairs, active)
        self.queue.enqueue(duration_s, "experts", batch.lane, self._finished, batch, finished)

    def _finished(self, duration_s: float, batch: WaveBatch, finished: Finished) -> None:
        self.meter.add(duration_s)
        finished(batch, duration_s, None)
