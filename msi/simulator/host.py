"""The host of a simulated worker: no weights, a queue of durations for a device, a network of latencies."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache

from msi.control.counters import ProcessCounters
from msi.control.messages import Assignment
from msi.net.combine_link import CombineLink
from msi.net.dispatch_link import DispatchLink
from msi.net.regions import HOST_MEMORY, Allocator
from msi.net.slots import HEADER_BYTES
from msi.planner.stage_costs import StageCosts
from msi.precision import Precision
from msi.simulator.clock import virtual_loop
from msi.simulator.compute import ROW_BYTES, SimulatedAttention, SimulatedExperts
from msi.simulator.deployment import Deployment
from msi.simulator.device import SimulatedDevice
from msi.simulator.popularity import Routing
from msi.simulator.transport import SimulatedNetwork, SimulatedTransport
from msi.text.grammars import Grammars
from msi.tracing import Spans
from msi.worker.host import ExpertPart, ServedShape

VOCAB_SIZE = 32_000  # only calibration asks
COSTS_REMEMBERED = 4096


class RememberedCosts:
    """Stage costs asked once for each size: a pass asks the same of all its layers."""

    def __init__(self, costs: StageCosts) -> None:
        remember = lru_cache(COSTS_REMEMBERED)
        self.attention_s = remember(costs.attention_s)
        self.pass_s = remember(costs.pass_s)
        self.expert_s = remember(costs.expert_s)
        self.comm_s = remember(costs.comm_s)


@dataclass(frozen=True, slots=True)
class World:
    """What all simulated hosts share."""

    deployment: Deployment
    costs: StageCosts
    routing: Routing
    network: SimulatedNetwork
    seed: int


class SimulatedModel:
    """Implements `msi.worker.host.LoadedModel`."""

    def __init__(self, world: World, assignment: Assignment, device: SimulatedDevice) -> None:
        self.shape = ServedShape(world.deployment.num_layers, VOCAB_SIZE, (), ROW_BYTES, ROW_BYTES)
        self.memory: Allocator = HOST_MEMORY
        self.grammars: Grammars | None = None
        self.has_attention = assignment.role == "attention"
        self.has_experts = assignment.role == "expert" or assignment.is_colocated
        self._world = world
        self._assignment = assignment
        self._device = device

    def num_kv_blocks(self) -> int:
        return 1 + self._assignment.limits.num_gpu_blocks_override

    def attention_half(self, link: DispatchLink, num_blocks: int) -> SimulatedAttention:
        ours, world = self._assignment, self._world
        return SimulatedAttention(
            link,
            self._device,
            num_layers=world.deployment.num_layers,
            placement=ours.placement,
            costs=world.costs,
            routing=world.routing,
            chance=random.Random(f"{world.seed}/{ours.worker_id}/{ours.incarnation}"),
        )

    def expert_half(self, link: CombineLink, num_seats: int) -> SimulatedExperts:
        world = self._world
        return SimulatedExperts(
            link, self._device, node=self._assignment.place.node, costs=world.costs, routing=world.routing,
            counts_rows=world.deployment.rebalance.rebalance == "auto",
        )  # fmt: skip

    def lend_experts(self, half: ExpertPart) -> None:
        """Experts weigh nothing here."""


class SimulatedHost:
    """Implements `msi.worker.host.Host`; use it inside a virtual loop."""

    def __init__(self, world: World, role: str) -> None:
        self.clock = virtual_loop().time
        self.device = SimulatedDevice()
        self.loaded = (0, 0)
        self._world = world
        self._row_bytes = world.deployment.row_bytes if role == "attention" else world.deployment.answer_row_bytes
        self._num_transports = 0

    @property
    def busy_s(self) -> float:
        return self.device.busy_s

    products = ""

    async def prepare(self) -> None:
        """There is nothing to make."""

    def introduce(self) -> tuple[str, Precision]:
        return "simulated", Precision.of("bfloat16")

    def use_tracer(self, tracer: Spans | None) -> None:
        self.device.tracer = tracer

    def free_former(self) -> None:
        """The garbage collector frees all that is simulated."""

    async def load(self, assignment: Assignment) -> SimulatedModel:
        self._id = assignment.worker_id
        return SimulatedModel(self._world, assignment, self.device)

    def new_transport(self, assignment: Assignment) -> SimulatedTransport:
        self._num_transports += 1
        return SimulatedTransport(self._world.network, f"{self._id}/{self._num_transports}", self._wire_bytes)

    def new_block_transport(self, assignment: Assignment) -> SimulatedTransport:
        return self.new_transport(assignment)

    def _wire_bytes(self, num_rows: int) -> int:
        """Of a post: its header, and its rows as long as they would be in reality; nothing without rows."""
        return HEADER_BYTES + num_rows * self._row_bytes if num_rows else 0

    def counters(self) -> ProcessCounters:
        return ProcessCounters()

    async def close(self) -> None:
        self.device.close()
