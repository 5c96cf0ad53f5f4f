"""Simulated devices: work takes virtual time in the order in which it was enqueued, and computes nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from msi.net.dispatch_link import Turn
from msi.types import MicroBatch, Sampled
from msi.waves import Finished, WaveBatch


class SimulatedQueue:
    """One device: a queue of durations."""

    def __init__(self) -> None:
        self.free_at = 0.0
        self.busy_s = 0.0

    def enqueue(self, duration_s: float, finished: Callable[..., None], *results: object) -> None:
        """Calls `finished(*results)` when the work is through."""
        loop = asyncio.get_running_loop()
        self.free_at = max(self.free_at, loop.time()) + duration_s
        self.busy_s += duration_s
        loop.call_at(self.free_at, finished, *results)

    def stall(self, duration_s: float) -> None:
        """Nothing runs for a while; what is enqueued waits."""
        self.free_at = max(self.free_at, asyncio.get_running_loop().time()) + duration_s


class SimulatedAttention:
    """An attention half whose layers take `layer_s()` and send `route()` rows to each expert node."""

    def __init__(self, *, num_layers: int, layer_s: Callable[[], float], route: Callable[[], tuple[int, ...]]) -> None:
        self.num_layers = num_layers
        self.queue = SimulatedQueue()
        self._layer_s = layer_s
        self._route = route

    def begin(self, lane: int, micro_batch: MicroBatch) -> None:
        pass

    def attention_route_pack(self, lane: int, layer: int, turn: Turn) -> None:
        self.queue.enqueue(self._layer_s(), turn.post, self._route())

    def combine(self, lane: int, layer: int) -> None:
        pass

    async def sample(self, lane: int) -> Sampled:
        return Sampled([])


class SimulatedExperts:
    """Experts whose batches take `batch_s(batch)`."""

    def __init__(self, *, batch_s: Callable[[WaveBatch], float]) -> None:
        self.queue = SimulatedQueue()
        self._batch_s = batch_s

    def attach(self, seat: int, outbox: memoryview) -> None:
        pass

    def run(self, batch: WaveBatch, finished: Finished) -> None:
        duration_s = self._batch_s(batch)
        self.queue.enqueue(duration_s, finished, batch, duration_s, None)
