"""A simulated instance with a coordinator that stands by for another: both die, sleep, and do not hear each other.

Coordinators, workers, the client and their ways to each other are the product's; only what they run on is simulated.
That every token is the right one, and told once, the simulation itself asserts.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from dataclasses import dataclass
from functools import partial

from msi.control.following import Following
from msi.control.messages import Superseded
from msi.control.standing_by import StandBy
from msi.errors import Unavailable
from msi.net.alarm import Alarm
from msi.net.control_inproc import InprocServer
from msi.simulator.clock import run_virtual, virtual_loop
from msi.simulator.popularity import build_routing
from msi.simulator.simulation import _Simulation

FIRST, SECOND = "inproc://first", "inproc://second"


@dataclass(frozen=True)
class Blow:
    """What happens to a coordinator `at_s`: it is "dead" (and started again), "asleep", or "cut" from the other one."""

    at_s: float
    address: str
    kind: str
    for_s: float


class Door(InprocServer):
    """A coordinator's end, at an address. While it sleeps nothing is read, and what it says waits."""

    def __init__(self, address, said, latency_s):
        super().__init__(hand_over=partial(virtual_loop().call_later, latency_s))
        self.address = address
        self.is_asleep = False
        self._said, self._held, self._woken = said, [], Alarm()

    def send(self, route, message):
        if self.is_asleep:
            self._held.append((route, message))
            return
        if getattr(message, "term", 0) and not isinstance(message, Superseded):
            self._said[message.term].add(self.address)
        super().send(route, message)

    async def receive(self):
        while self.is_asleep:
            await self._woken.wait()
        return await super().receive()

    @property
    def has_unread(self):
        return not self.is_asleep and super().has_unread

    def sleep(self):
        self.is_asleep = True

    def wake(self):
        self.is_asleep = False
        self._woken.ring()
        for route, message in self._held:
            self.send(route, message)
        self._held = []

    def close(self):
        """Whoever was connected waits for whoever comes to that address next."""


class TwoCoordinators(_Simulation):
    def __init__(self, deployment, blows, seed=0):
        plan = deployment.plan
        routing = build_routing("uniform", plan.placement, deployment.top_k, most_tokens=512, seed=seed)
        super().__init__(deployment, routing, (), None, None, lambda done, wanted: None)
        self.blows = blows
        self.said = defaultdict(set)  # terms, each with the addresses that named it their own
        self.doors = {}
        self.is_cut = False
        self.num_taken_over = 0
        self._asleep_since = {}
        self._dead = set()
        self._num_connected = 0
        self._standing_by = None

    def _new_server(self):
        return self._open(FIRST)

    def _open(self, address):
        """Somebody begins to listen there."""
        door = Door(address, self.said, self._deployment.control_latency_s)
        if address in self.doors:
            door.succeed(self.doors[address])
        self.doors[address] = door
        return door

    def _connect(self, server, name):
        return Following([FIRST, SECOND], partial(self._way, name), clock=virtual_loop().time)

    def _way(self, name, address):
        self._num_connected += 1
        return self.doors[address].connect(f"{name} {self._num_connected}")

    def _coordinate(self, tasks, server):
        self._open(SECOND)  # where nobody listens
        self._tasks = tasks
        self._begin(server)
        self._stand_by()
        for blow in self.blows:
            virtual_loop().call_later(blow.at_s, self._strike, blow)

    def _begin(self, server):
        self._dead.discard(FIRST)
        self._running[FIRST] = self._tasks.create_task(
            self._until_superseded(self._coordinator(server, clock=partial(self._clock, FIRST)))
        )

    async def _until_superseded(self, coordinator):
        """Whoever runs it starts it again, which it does not know to be of no use."""
        try:
            await coordinator.run()
        except Unavailable:
            await asyncio.sleep(1.0)
            self._begin(self._open(FIRST))

    def _stand_by(self):
        self._dead.discard(SECOND)
        way = CutWay(self, self._way("second", FIRST))
        self._standing_by = StandBy(way, self._take_over, clock=partial(self._clock, SECOND))
        self._running[SECOND] = self._tasks.create_task(self._standing_by.run())

    def _take_over(self, term):
        self.num_taken_over += 1
        return self._coordinator(self._open(SECOND), term, partial(self._clock, SECOND))

    def _clock(self, address):
        """Of a coordinator: who sleeps does not notice that time passes."""
        return self._asleep_since.get(address, virtual_loop().time())

    def _wake(self, address):
        self._asleep_since.pop(address, None)
        self.doors[address].wake()

    def _strike(self, blow):
        loop, door = virtual_loop(), self.doors[blow.address]
        if blow.kind == "cut":
            self.is_cut = True
            loop.call_later(blow.for_s, setattr, self, "is_cut", False)
        elif blow.kind == "asleep":
            door.sleep()
            self._asleep_since.setdefault(blow.address, loop.time())
            loop.call_later(blow.for_s, self._wake, blow.address)
        elif blow.address not in self._dead:
            self._dead.add(blow.address)
            self._asleep_since.pop(blow.address, None)
            self._open(blow.address).sleep()  # nobody hears those who connect, nor does the dead one
            self._running[blow.address].cancel()
            self._running[blow.address] = self._tasks.create_task(asyncio.sleep(0))
            again = self._stand_by if blow.address == SECOND else lambda: self._begin(self._open(FIRST))
            loop.call_later(blow.for_s, again)


class CutWay:
    """The standby's way to the first coordinator, on which nothing comes while it is cut."""

    def __init__(self, world, way):
        self._world, self._way = world, way
        self.address = way.address

    def send(self, message):
        if not self._world.is_cut:
            self._way.send(message)

    async def receive(self):
        while True:
            message = await self._way.receive()
            if not self._world.is_cut:
                return message

    @property
    def has_unread(self):
        return self._way.has_unread

    def close(self):
        self._way.close()


def stormed(deployment, costs, arrivals, blows, seed, limit_s=600.0):
    """The report, and the world that it happened in."""
    worlds = []

    async def run():
        worlds.append(TwoCoordinators(deployment, blows, seed))
        return await worlds[0].run(costs, arrivals, seed, True)

    return run_virtual(run(), limit_s), worlds[0]
