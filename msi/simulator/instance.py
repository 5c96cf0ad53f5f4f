"""Bare lanes: attention and expert workers of constant (or drawn) stage times, without requests or a coordinator.

The lanes, links, waves and expert servers are the product's; only device, transport and clock are simulated. Used to
prove the pipeline's timing, and what disturbances cost. `msi.simulator.simulation` has the whole product.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from msi.attention.lanes import run_lane
from msi.errors import TransportError
from msi.experts.server import ExpertServer
from msi.experts.waves import Waves
from msi.net.combine_link import CombineLink
from msi.net.dispatch_link import DispatchLink
from msi.net.link_hello import PROTOCOL_VERSION, LinkHello
from msi.placement import Placement, place_evenly
from msi.planner.pipeline import Stages
from msi.simulator.compute import ROW_BYTES, SimulatedAttention, SimulatedExperts
from msi.simulator.device import SimulatedDevice
from msi.simulator.popularity import Draw
from msi.simulator.transport import SimulatedNetwork, SimulatedTransport
from msi.types import MicroBatch, Sampled

MICRO_BATCH = MicroBatch((0,), (0,), (1,), (1,), ((0,),))
PEER_TIMEOUT_S = 1e6  # virtual; a test that wants a loss causes it


@dataclass(frozen=True)
class Shape:
    """What is simulated.

    Attributes:
        stages: T_a, T_e, T_c in seconds.
        pass_s: head and sampling, once per pass.
        jitter: each stage's duration is multiplied by a factor drawn from [1 - jitter, 1 + jitter].
        empty: share of dispatches without rows for a node.
        wait_for_all: W without end: nobody is ever evicted.
        is_colocated: the attention workers compute on the device of the first expert worker.
    """

    num_attention: int
    num_experts: int
    num_lanes: int
    num_layers: int
    stages: Stages
    pass_s: float = 0.0
    jitter: float = 0.0
    empty: float = 0.0
    seed: int = 0
    wait_for_all: bool = False
    is_colocated: bool = False


@dataclass
class PassLog:
    """When each pass of each lane of one attention worker ended."""

    started_at: float = 0.0
    ended_at: dict[int, list[float]] = field(default_factory=dict)

    def mean_pass_s(self, skip: int = 0) -> float:
        """Mean time per pass over all lanes, the first `skip` passes of each left out."""
        spans = []
        for times in self.ended_at.values():
            first = times[skip - 1] if skip else self.started_at
            spans.append((times[-1] - first) / (len(times) - skip))
        return sum(spans) / len(spans)

    @property
    def last_end(self) -> float:
        return max(times[-1] for times in self.ended_at.values())


class Passes:
    """Gives each lane a number of equal micro-batches, with a gap between them."""

    def __init__(self, num_lanes: int, num_passes: int, gap_s: Callable[[], float]) -> None:
        self.log = PassLog(ended_at={lane: [] for lane in range(num_lanes)})
        self.failures: list[Exception] = []
        self.done = asyncio.Event()
        self._num_passes = num_passes
        self._left = [num_passes] * num_lanes
        self._gap_s = gap_s

    async def next(self, lane: int) -> MicroBatch:
        if self._left[lane] == 0:
            await asyncio.get_running_loop().create_future()
        if self.log.ended_at[lane] and (gap_s := self._gap_s()):
            await asyncio.sleep(gap_s)
        self._left[lane] -= 1
        return MICRO_BATCH

    def may_continue(self, lane: int) -> bool:
        return self._left[lane] > 0

    def finish(self, lane: int, micro_batch: MicroBatch, sampled: Sampled) -> None:
        self.log.ended_at[lane].append(asyncio.get_running_loop().time())
        if all(len(ended) == self._num_passes for ended in self.log.ended_at.values()):
            self.done.set()

    def fail(self, lane: int, micro_batch: MicroBatch, error: Exception) -> None:
        self.failures.append(error)
        self._left[lane] += 1  # tried again

    def hold_is_over(self, error: TransportError) -> None:
        self.failures.append(error)


class SimulatedAttentionWorker:
    def __init__(self, instance: SimulatedInstance, index: int) -> None:
        shape = instance.shape
        self._instance = instance
        self._transport = SimulatedTransport(instance.network, f"attention-{index}")
        self.link = DispatchLink(
            self._transport,
            hello=instance.hello(f"attention-{index}", index),
            num_nodes=shape.num_experts,
            report_loss=lambda node, worker_id, reason: None,
            timeout_s=PEER_TIMEOUT_S,
            clock=asyncio.get_running_loop().time,
        )
        self.compute = SimulatedAttention(
            self.link,
            instance.experts[0].compute.device if shape.is_colocated else SimulatedDevice(),
            num_layers=shape.num_layers,
            placement=place_evenly(shape.num_experts, shape.num_experts),
            costs=instance,
            routing=instance,
            chance=instance.random,
        )
        self.passes: Passes | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self, num_passes: int, gap_s: Callable[[], float] = lambda: 0.0) -> Passes:
        """Connects to all expert workers and runs `num_passes` on each lane."""
        loop = asyncio.get_running_loop()
        for node in range(self._instance.shape.num_experts):
            self.compute.attach(node, await self.link.connect(node, f"expert-{node}"))
        self.passes = Passes(self._instance.shape.num_lanes, num_passes, gap_s)
        self.passes.log.started_at = loop.time()
        for lane in range(self._instance.shape.num_lanes):
            self._tasks.append(loop.create_task(run_lane(lane, self.passes, self.compute, self.link)))
        return self.passes

    async def stop(self) -> None:
        """Ends it as a kill would: connections close, nothing is said."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._transport.close()

    def raise_failures(self) -> None:
        """A lane that ended with an exception is a bug; raise it."""
        for task in self._tasks:
            if task.done() and not task.cancelled() and task.exception() is not None:
                raise task.exception()  # type: ignore[misc]


class SimulatedExpertWorker:
    def __init__(self, instance: SimulatedInstance, index: int) -> None:
        shape = instance.shape
        clock = asyncio.get_running_loop().time
        self.answered: dict[tuple[int, int, int], int] = {}  # (seat, lane, seq) -> times
        self.waves = Waves(
            num_layers=shape.num_layers,
            num_lanes=shape.num_lanes,
            default_wait_s=1e9 if shape.wait_for_all else 0.020,
            min_wait_s=1e9 if shape.wait_for_all else 0.0,
        )
        self._transport = SimulatedTransport(instance.network, f"expert-{index}")
        self.link = CombineLink(
            self._transport,
            expected=instance.hello(f"expert-{index}", 0),
            worker_id=f"expert-{index}",
            incarnation=0,
            num_seats=shape.num_attention + 2,
            max_skip=2 * shape.num_layers,
            clock=clock,
        )
        self.compute = SimulatedExperts(self.link, SimulatedDevice(), node=index, costs=instance, routing=instance)
        self._server = ExpertServer(self.link, self.waves, self.compute, clock=clock)

    async def start(self) -> None:
        await self.link.listen(self._server)

    async def stop(self) -> None:
        self._server.close()
        await self._transport.close()


class SimulatedInstance:
    """Workers of one shape on one simulated network; use as an async context manager inside a virtual loop.

    It is its own stage costs (`msi.planner.stage_costs.StageCosts`) and routing (`msi.simulator.popularity.Routing`).
    """

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.random = random.Random(shape.seed)
        self.network = SimulatedNetwork(self.comm_s)
        self.experts = [SimulatedExpertWorker(self, index) for index in range(shape.num_experts)]
        self.attention = [SimulatedAttentionWorker(self, index) for index in range(shape.num_attention)]

    async def __aenter__(self) -> SimulatedInstance:
        for expert in self.experts:
            await expert.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        for worker in self.attention:
            await worker.stop()
        for expert in self.experts:
            await expert.stop()
        for worker in self.attention:
            worker.raise_failures()

    def hello(self, worker_id: str, node: int) -> LinkHello:
        return LinkHello(
            protocol_version=PROTOCOL_VERSION,
            instance="simulated",
            worker_id=worker_id,
            incarnation=0,
            node=node,
            rank=0,
            size=1,
            placement_version=0,
            num_lanes=self.shape.num_lanes,
            slot_rows=1,
            row_bytes=ROW_BYTES,
            answer_row_bytes=ROW_BYTES,
            next_seqs=(0,) * self.shape.num_lanes,
        )

    def attention_s(self, num_tokens: int, num_context_tokens: int) -> float:
        return self._jittered(self.shape.stages.attention_s)

    def pass_s(self, num_logit_rows: int) -> float:
        return self.shape.pass_s

    def expert_s(self, num_expert_rows: float, num_active_experts: int) -> float:
        return self._jittered(self.shape.stages.expert_s)

    def comm_s(self, num_bytes: int) -> float:
        return self.shape.stages.comm_s

    def _jittered(self, duration_s: float) -> float:
        jitter = self.shape.jitter
        return duration_s * self.random.uniform(1 - jitter, 1 + jitter) if jitter else duration_s

    def view(self, placement: Placement, missing: Collection[int] = ()) -> int:
        return 0

    def chosen(self) -> list[list[float]]:
        return [[1.0] * self.shape.num_experts]

    def draw(
        self, num_tokens: int, chance: random.Random, view: int = 0, layer: int = 0
    ) -> tuple[int, tuple[int, ...]]:
        """One row for each expert node; none for some, when the shape has empty dispatches, but never none at all."""
        num_nodes = self.shape.num_experts
        rows = tuple(int(chance.random() >= self.shape.empty) for _ in range(num_nodes))
        if any(rows):
            return 0, rows
        kept = chance.randrange(num_nodes)
        return 0, tuple(int(node == kept) for node in range(num_nodes))

    def load(self, node: int, draws: Iterable[Draw], layer: int = 0) -> tuple[float, int]:
        return 1.0, 1

    def rows(self, node: int, draws: Iterable[Draw], layer: int = 0) -> NDArray[np.float64]:
        return np.ones(1)
