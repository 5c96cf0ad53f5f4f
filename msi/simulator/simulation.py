"""The whole product under a virtual clock: coordinator, workers and a client, as they are in reality.

Only what they run on is simulated: devices and networks whose work takes the time that `StageCosts` says. Equal inputs
and seeds give equal results to the bit.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

from msi.control.client import CoordinatorClient
from msi.control.client_messages import Welcome
from msi.control.coordinator import Coordinator
from msi.errors import EngineError, Unavailable
from msi.net.control import MessageClient
from msi.net.control_inproc import InprocServer
from msi.planner.drift import DriftWatch
from msi.planner.stage_costs import StageCosts
from msi.simulator.clock import run_virtual, virtual_loop
from msi.simulator.deployment import COORDINATOR, Deployment, Fault, check_faults
from msi.simulator.histories import answer_to
from msi.simulator.host import VOCAB_SIZE, RememberedCosts, SimulatedHost, World
from msi.simulator.popularity import Popularity, Routing, build_routing
from msi.simulator.report import Report, RequestResult, build_report
from msi.simulator.transport import SimulatedNetwork
from msi.simulator.workload import Arrival, check_arrivals
from msi.tracing import merge
from msi.types import Request, SamplingParams
from msi.worker.worker import Worker, WorkerSettings

DAY_S = 86_400.0

ReportProgress = Callable[[int, int], None]  # tokens generated, and that all requests want


def simulate(
    deployment: Deployment,
    costs: StageCosts,
    arrivals: Sequence[Arrival],
    *,
    popularity: Popularity = "uniform",
    faults: Sequence[Fault] = (),
    seed: int = 0,
    trace: Path | None = None,
    drift: DriftWatch | None = None,
    report_progress: ReportProgress = lambda done, wanted: None,
    is_collapsing: bool = True,
    limit_s: float = DAY_S,
) -> Report:
    """Serves the requests and says how it went.

    Args:
        popularity: see `msi.simulator.popularity.build_routing`.
        trace: a file for a Chrome trace, as the real run writes it.
        drift: for the coordinator, which holds what the simulated workers measure against it.
        is_collapsing: messages that land together are one event; changes the cost of simulating alone.
        limit_s: virtual time that may pass.

    Raises:
        ConfigError: requests, faults or popularity that cannot be.
        SimulationStalled: `limit_s` was not enough.
    """
    check_arrivals(arrivals)
    check_faults(faults, deployment)
    plan = deployment.plan
    most_tokens = plan.limits.max_num_batched_tokens
    routing = build_routing(
        popularity, plan.placement, deployment.top_k, most_tokens=most_tokens, seed=seed,
        num_layers=deployment.num_layers,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as parts:
        simulation = _Simulation(
            deployment, routing, faults, None if trace is None else Path(parts), drift, report_progress
        )
        report = run_virtual(simulation.run(costs, arrivals, seed, is_collapsing), limit_s)
        if trace is not None:
            merge(Path(parts), trace)
    return report


class _Simulation:
    def __init__(
        self,
        deployment: Deployment,
        routing: Routing,
        faults: Sequence[Fault],
        trace_dir: Path | None,
        drift: DriftWatch | None,
        report_progress: ReportProgress,
    ) -> None:
        self._deployment = deployment
        self._routing = routing
        self._faults = faults
        self._trace_dir = trace_dir
        self._drift = drift
        self._report_progress = report_progress
        self._hosts: dict[str, SimulatedHost] = {}
        self._workers: dict[str, Worker] = {}
        self._running: dict[str, asyncio.Task[None]] = {}
        self._kill: dict[str, Callable[[], None]] = {}
        self._num_tokens = 0
        self._num_wanted = 0

    async def run(self, costs: StageCosts, arrivals: Sequence[Arrival], seed: int, is_collapsing: bool) -> Report:
        deployment, loop = self._deployment, virtual_loop()
        costs = RememberedCosts(costs)
        latency = (lambda num_bytes: 0.0) if deployment.is_colocated else costs.comm_s
        network = SimulatedNetwork(latency, is_collapsing=is_collapsing)
        server = self._new_server()
        client = CoordinatorClient(self._connect(server, "client"), clock=loop.time)
        world = World(deployment, costs, self._routing, network, seed)
        async with asyncio.TaskGroup() as tasks:
            self._coordinate(tasks, server)
            for role, worker_id in deployment.workers:
                self._start(tasks, world, server, role, worker_id)
            await client.start()
            await _ready(client)
            started_at = loop.time()
            busy_before = {worker_id: host.busy_s for worker_id, host in self._hosts.items()}
            num_messages = network.num_messages
            causing = [loop.call_at(started_at + fault.at_s, self._cause, fault, tasks) for fault in self._faults]
            results = await self._serve(client, arrivals, started_at)
            num_lanes = (await client.stats()).num_lanes
            num_messages = network.num_messages - num_messages
            busy_s = {name: max(0.0, host.busy_s - busy_before.get(name, 0.0)) for name, host in self._hosts.items()}
            for timer in causing:
                timer.cancel()
            for running in self._running.values():
                running.cancel()
        await client.close()
        self._check_integrity()
        return build_report(results, busy_s, num_messages=num_messages, num_micro_batches=num_lanes)

    def _new_server(self) -> InprocServer:
        return InprocServer(hand_over=partial(virtual_loop().call_later, self._deployment.control_latency_s))

    def _connect(self, server: InprocServer, name: str) -> MessageClient:
        """A worker's or client's way to the coordinator."""
        return server.connect(name)

    def _coordinate(self, tasks: asyncio.TaskGroup, server: InprocServer) -> None:
        self._server = server
        self._running[COORDINATOR] = tasks.create_task(self._coordinator(server).run(), name=COORDINATOR)

    def _coordinator(
        self, server: InprocServer, term: int = 0, clock: Callable[[], float] | None = None
    ) -> Coordinator:
        deployment = self._deployment
        return Coordinator(
            server,
            replace(deployment.plan, term=term),
            Welcome("simulated", VOCAB_SIZE, deployment.limits.max_model_len),
            num_micro_batches=deployment.num_micro_batches,
            num_layers=deployment.num_layers,
            drift=self._drift,
            is_private=True,
            clock=clock or virtual_loop().time,
        )

    def _replace_coordinator(self, tasks: asyncio.TaskGroup, after_s: float) -> None:
        """It says nothing any more, and hears nothing; nor does anybody until another one has come."""
        dead, nobody, coming = self._server, self._new_server(), self._new_server()
        if not dead.is_connected:
            return  # it is gone already
        nobody.succeed(dead)
        self._running[COORDINATOR].cancel()

        def come() -> None:
            coming.succeed(nobody)
            self._coordinate(tasks, coming)

        virtual_loop().call_later(after_s, come)

    def _start(self, tasks: asyncio.TaskGroup, world: World, server: InprocServer, role: str, worker_id: str) -> None:
        host = self._hosts[worker_id] = SimulatedHost(world, role)
        control = self._connect(server, worker_id)
        settings = WorkerSettings(server.address, role, worker_id, trace_dir=self._trace_dir)
        worker = self._workers[worker_id] = Worker(settings, host, control)
        running = self._running[worker_id] = tasks.create_task(worker.run(), name=worker_id)

        def kill() -> None:
            """It says nothing any more; its connections break."""
            control.close()
            running.cancel()

        self._kill[worker_id] = kill

    def _cause(self, fault: Fault, tasks: asyncio.TaskGroup) -> None:
        match fault.kind:
            case _ if fault.worker == COORDINATOR:
                self._replace_coordinator(tasks, fault.amount)
            case "slow":
                self._hosts[fault.worker].device.slowness = fault.amount
            case "stalled":
                self._hosts[fault.worker].device.stall(fault.amount)
            case "dead":
                self._kill[fault.worker]()

    # -- requests ----------------------------------------------------------------------------------------------------

    async def _serve(
        self, client: CoordinatorClient, arrivals: Sequence[Arrival], started_at: float
    ) -> list[RequestResult]:
        loop = asyncio.get_running_loop()
        self._num_wanted = sum(arrival.output_len for arrival in arrivals)
        async with asyncio.TaskGroup() as tasks:
            requests = []
            for index, arrival in enumerate(sorted(arrivals, key=lambda one: one.arrival_s)):
                if (early_s := started_at + arrival.arrival_s - loop.time()) > 0:
                    await asyncio.sleep(early_s)
                requests.append(tasks.create_task(self._request(client, index, arrival, started_at)))
        return [request.result() for request in requests]

    async def _request(
        self, client: CoordinatorClient, index: int, arrival: Arrival, started_at: float
    ) -> RequestResult:
        clock = asyncio.get_running_loop().time
        prompt = (index % VOCAB_SIZE,) * arrival.input_len
        params = SamplingParams(max_tokens=arrival.output_len, temperature=0, seed=index, ignore_eos=True)
        request = Request(
            f"request-{index}", prompt, params, flow=arrival.flow, priority=arrival.priority,
            timeout_s=arrival.timeout_s,
        )  # fmt: skip
        answer = answer_to(prompt, index)
        num_tokens, first_at, kind, error = 0, None, "", ""
        try:
            async for update in client.generate([request]):
                wanted = tuple(islice(answer, len(update.token_ids)))
                assert update.token_ids == wanted, (update, num_tokens, wanted)
                num_tokens += len(update.token_ids)
                first_at = clock() - started_at if first_at is None else first_at
                self._num_tokens += len(update.token_ids)
                self._report_progress(self._num_tokens, self._num_wanted)
        except EngineError as failure:
            kind, error = type(failure).__name__, str(failure)
        self._num_wanted -= arrival.output_len - num_tokens
        return RequestResult(
            request.request_id, arrival.arrival_s, first_at, clock() - started_at, arrival.input_len, num_tokens, kind,
            error,
        )  # fmt: skip

    # -- the end -----------------------------------------------------------------------------------------------------

    def _check_integrity(self) -> None:
        for worker in self._workers.values():
            if worker.life is not None and worker.life.attention is not None:
                worker.life.attention.requests.check_integrity()


async def _ready(client: CoordinatorClient) -> None:
    status = client.status
    while not status.is_ready:
        status = await client.wait_status(status)
        if status.failure:
            raise Unavailable(status.failure)
