"""A simulated instance with a launcher and an operator: workers are killed, drained, removed and added, and
coordinators die, in any order.

Coordinator, workers and client are the product's; what they run on is simulated, and so is the launcher. That every
token is the right one, and told once, the simulation itself asserts.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial

from msi.control.client_messages import Welcome
from msi.control.coordinator import Coordinator
from msi.control.orders import Order
from msi.errors import EngineError
from msi.placement_change import padded
from msi.settings import Timeouts
from msi.simulator.clock import run_virtual, virtual_loop
from msi.simulator.host import VOCAB_SIZE
from msi.simulator.popularity import build_routing
from msi.simulator.simulation import COORDINATOR, _Simulation

NOTICED_S = 0.05  # a launcher sees a process end
STARTS_S = 1.5
SETTLES_S = 300.0


@dataclass(frozen=True)
class Act:
    """At `at_s`: "kill", "drain", "remove" or "ask" (to end, by a signal) the worker of this number and role;
    "add" one; "rebalance"; the coordinator "dies".
    """

    at_s: float
    kind: str
    role: str = ""
    number: int = 0
    amount: float = 0.0  # within which a drain ends; for how long there is no coordinator


class ComingsAndGoings(_Simulation):
    """Attributes: complaints: of orders that were not carried out."""

    def __init__(self, deployment, acts, seed, has_launcher=True, faults=()):
        self.plan = replace(
            deployment.plan, max_attention=deployment.num_attention + 2, max_expert=deployment.num_expert + 2,
            placement=padded(deployment.plan.placement, deployment.num_expert + 2), max_resumptions=100,
            timeouts=Timeouts(reload_after_s=2.0, start_timeout_s=30.0),
        )  # fmt: skip
        routing = build_routing("uniform", self.plan.placement, deployment.top_k, most_tokens=512, seed=seed)
        super().__init__(deployment, routing, faults, None, None, lambda done, wanted: None)
        self.acts = acts
        self.has_launcher = has_launcher  # else each process is started again by somebody who tells nobody
        self.complaints = []
        self.pids = {}
        self._num_processes = self._num_orders = 0
        self._leaving = set()
        self._roles = {name: role for role, name in deployment.workers}
        self._is_coordinating = False

    # -- processes ---------------------------------------------------------------------------------------------------

    def _coordinator(self, server, term=0, clock=None):
        welcome = Welcome("simulated", VOCAB_SIZE, self._deployment.limits.max_model_len)
        return Coordinator(
            server, replace(self.plan, term=term), welcome,
            num_micro_batches=self._deployment.num_micro_batches, num_layers=self._deployment.num_layers,
            is_private=True, clock=virtual_loop().time,
        )  # fmt: skip

    def _coordinate(self, tasks, server):
        self._server, self._tasks = server, tasks
        self.coordinator = self._coordinator(server)
        serving = [name for name in self.pids if self._workers[name].has_been_ready.is_set()]
        if self.has_launcher:
            self.coordinator.operator.launcher = self._told
            self.coordinator.launched(serving, Counter(self._roles.values()), self._leaving)
        self._is_coordinating = True
        self._running[COORDINATOR] = tasks.create_task(self.coordinator.run(), name=COORDINATOR)

    def _told(self, start="", forget="", keep=""):
        """By the coordinator."""
        if start:
            number = next(at for at in range(100) if f"{start}-{at}" not in self._roles)
            self._roles[f"{start}-{number}"] = start
            self._leaving.discard(f"{start}-{number}")
            virtual_loop().call_later(STARTS_S, self._launch, f"{start}-{number}")
        self._leaving |= {forget} - {""}
        self._leaving -= {keep}

    def _start(self, tasks, world, server, role, worker_id):
        self._world = world
        self._launch(worker_id)

    def _launch(self, worker_id):
        if not self._is_coordinating:  # it waits until somebody listens
            virtual_loop().call_later(NOTICED_S, self._launch, worker_id)
            return
        self._num_processes += 1
        pid = self.pids[worker_id] = self._num_processes
        super()._start(self._tasks, self._world, self._server, self._roles[worker_id], worker_id)
        worker = self._workers[worker_id]
        introduce = worker._hello
        worker._hello = lambda: replace(introduce(), pid=pid)
        self._running[worker_id].add_done_callback(partial(self._ended, worker_id, pid))

    def _ended(self, worker_id, pid, task):
        if not self._is_over:
            virtual_loop().call_later(NOTICED_S, self._notice, worker_id, pid)

    def _notice(self, worker_id, pid):
        if self.pids.get(worker_id) != pid or self._is_over:
            return
        del self.pids[worker_id]
        if self._is_coordinating and self.has_launcher:
            self.coordinator.worker_exited(worker_id, pid, "it was killed by signal 9", False)
        if worker_id in self._leaving:
            del self._roles[worker_id]
        else:
            virtual_loop().call_later(STARTS_S, self._launch, worker_id)

    _is_over = False

    # -- what happens ------------------------------------------------------------------------------------------------

    async def _serve(self, client, arrivals, started_at):
        self._client = client
        for act in self.acts:
            virtual_loop().call_at(started_at + act.at_s, self._act, act)
        results = await super()._serve(client, arrivals, started_at)
        await self._settle(started_at + max(act.at_s for act in self.acts))
        self._is_over = True
        return results

    def _act(self, act):
        if act.kind == "dies":
            self._replace_coordinator(self._tasks, act.amount)
            self._is_coordinating = False
            return
        if act.kind in ("add", "rebalance"):
            role = act.role if act.kind == "add" else ""
            self._tasks.create_task(self._order(Order(0, act.kind, role=role)))
            return
        names = sorted(name for name in self.pids if self._roles[name] == act.role)
        if not names:
            return
        name = names[act.number % len(names)]
        if act.kind == "kill":
            self._kill[name]()
        elif act.kind == "ask":
            others = (one for one in self.coordinator._cluster.live(act.role) if one.worker_id != name)
            if any(one.state == "ready" for one in others):  # else new requests are refused after a while, as is said
                self._workers[name].drain()
        else:
            self._tasks.create_task(self._order(Order(0, act.kind, name, within_s=act.amount)))

    async def _order(self, order):
        self._num_orders += 1
        try:
            await self._client.order(order)
        except EngineError as error:
            self.complaints.append(str(error))
        self._num_orders -= 1

    async def _settle(self, last_act_at):
        """Once nothing happens any more, all is well again: nobody is waited for who does not come."""
        loop = virtual_loop()
        deadline = max(loop.time(), last_act_at) + SETTLES_S
        while loop.time() < last_act_at or not self.is_well:
            assert loop.time() < deadline, (self.sentence, self.coordinator.operator._status())
            await asyncio.sleep(1.0)

    @property
    def sentence(self):
        return self.coordinator._cluster.sentence(virtual_loop().time())

    @property
    def is_well(self):
        cluster = self.coordinator._cluster
        there = {role: len(cluster.live(role)) for role in cluster.plan.wanted}
        running = {role: sum(one == role for one in self._roles.values()) for role in there}
        return (
            self._is_coordinating and self.sentence == "ready" and not cluster.placing.is_changing
            and there == cluster.plan.wanted == running and self.pids.keys() == self._roles.keys()
            and not self._num_orders
        )  # fmt: skip


def lived_through(deployment, costs, arrivals, acts, seed, *, has_launcher=True, limit_s=2000.0, faults=()):
    """The report, and the world that it happened in."""
    worlds = []

    async def run():
        worlds.append(ComingsAndGoings(deployment, acts, seed, has_launcher, faults))
        return await worlds[0].run(costs, arrivals, seed, True)

    return run_virtual(run(), limit_s), worlds[0]
