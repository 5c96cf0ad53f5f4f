"""How a worker ends when several things end it at once."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

from msi.control.counters import ProcessCounters
from msi.control.messages import Assignment, Drain, Draining, Goodbye, HelloAgain, WorkerHello
from msi.placement import place_evenly
from msi.precision import Precision
from msi.settings import LinkShape, SchedulerLimits, Timeouts
from msi.types import Place
from msi.worker.worker import Worker, WorkerSettings

ASSIGNMENT = Assignment(
    instance="test",
    worker_id="attention-0",
    role="attention",
    place=Place(0),
    incarnation=0,
    placement=place_evenly(4, 1),
    num_seats=1,
    is_colocated=False,
    memory_share=1.0,
    limits=SchedulerLimits(64, 4, 16),
    link=LinkShape(1, 16),
    timeouts=Timeouts(),
    precision=Precision.of("float32"),
)


class Host:
    """Has loaded nothing, and needs nothing."""

    clock = staticmethod(lambda: 0.0)
    busy_s = 0.0
    loaded = (0, 0)
    products = ""

    async def prepare(self):
        pass

    def introduce(self):
        return "fingerprint", ASSIGNMENT.precision

    def free_former(self):
        pass

    async def load(self, assignment):
        return SimpleNamespace(has_attention=False, has_experts=False)

    def counters(self):
        return ProcessCounters()

    async def close(self):
        pass


class Coordinator:
    """Gives a worker up within its goodbye, and tells it so at once."""

    num_sent = 0

    def __init__(self):
        self.hellos = 0
        self._to_worker = asyncio.Queue()

    def send(self, message):
        match message:
            case WorkerHello():
                self.hellos += 1
                self._to_worker.put_nowait(ASSIGNMENT)
            case Draining():
                self._to_worker.put_nowait(Drain())
            case Goodbye():
                self._to_worker.put_nowait(HelloAgain("the coordinator gave it up: it was drained"))

    async def receive(self):
        return await self._to_worker.get()

    def has_unread(self):
        return not self._to_worker.empty()

    def keep_alive(self, message, every_s):
        pass

    def close(self):
        pass


async def test_who_has_said_goodbye_does_not_introduce_itself_again():
    coordinator = Coordinator()
    worker = Worker(WorkerSettings("nowhere", worker_id="attention-0"), Host(), coordinator)
    running = asyncio.create_task(worker.run())
    await worker.has_been_ready.wait()
    worker.drain()
    await asyncio.wait_for(running, 10)
    assert coordinator.hellos == 1
