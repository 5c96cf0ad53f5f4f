"""Our transports: rows in slots, an immediate that announces them, and whoever takes it, as in a worker.

Over shared memory that is the thread that computes, asleep or polling first; elsewhere the event loop. There the
payload is copied into the receiver's memory within the round: that copy is the transport. Over the others it lies where
rows do that were computed into the outbox.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import uvloop

from msi.device.ready import Ready
from msi.net.landing import seat_rows
from msi.net.rdma.drivers import open_rdma
from msi.net.rdma.options import RdmaOptions
from msi.net.regions import HOST_MEMORY
from msi.net.shm import ShmTransport
from msi.net.slots import SlotLayout
from msi.net.tcp import TcpTransport
from msi.net.transport import Admission, CompletionKind, Endpoint, Poller, Transport
from tools.m2n.fabric import STAMP, Place, Task, check, stamp

ACKNOWLEDGED = 2**32 - 1
POLL_S = {"shm-poll": 200e-6}
TRANSPORTS: dict[str, Callable[[bytes, Poller], Transport]] = {
    "shm": lambda key, poller: ShmTransport(key=key, poller=poller),
    "shm-poll": lambda key, poller: ShmTransport(key=key, poller=poller),
    "tcp": lambda key, _: TcpTransport("127.0.0.1", key=key),
    "rdma": lambda key, _: open_rdma(RdmaOptions(), "127.0.0.1", key=key),
    "tls": lambda key, _: TcpTransport("127.0.0.1", key=key, encrypt=True),
}


class OurFabric:
    def __init__(self, place: Place) -> None:
        self._place = place
        self._runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
        self._is_mapped = place.system.startswith("shm")
        self._poller = Ready[bool](POLL_S.get(place.system, 0.0))
        self._payload = bytearray(place.max_bytes)
        self._endpoints: list[Endpoint] = []
        self._early: list[tuple[Endpoint, int]] = []  # what came before we were told of its task
        self._runner.run(self._open())

    def run(self, task: Task) -> list[float]:
        return self._runner.run(self._send(task) if self._place.is_sender else self._receive(task))

    def close(self) -> None:
        self._runner.run(self._transport.close())
        self._poller.close()
        self._runner.close()

    async def _open(self) -> None:
        place = self._place
        self._transport = TRANSPORTS[place.system](place.key, self._poller)
        layout = SlotLayout(1, place.max_bytes // place.row_bytes, place.row_bytes)
        landing = self._transport.register(len(place.peers), layout, HOST_MEMORY)
        self._rows = [seat_rows(landing, seat) for seat in range(len(place.peers))]
        self._left = 0
        self._ready = asyncio.Event()
        self._task = Task("", 0, 0)
        self._round = 0
        self._arrived = 0
        self._times: list[float] = []
        self._transport.deliver(self._landed)
        if place.is_sender:
            for seat, peer in enumerate(place.peers):
                address = (await asyncio.to_thread(place.published, peer)).decode()
                self._endpoints.append(await self._transport.connect(address, b"sender", landing, seat))
        else:
            seats = iter(range(place.num_senders))
            address = await self._transport.listen(lambda hello: Admission(landing, next(seats), b""))
            place.publish(address.encode())
            while len(self._endpoints) < place.num_senders:
                await asyncio.sleep(0.01)

    def _set_landed(self) -> None:
        if self._is_mapped:
            self._poller.put(True)
        else:
            self._ready.set()

    async def _all_landed(self) -> None:
        if self._is_mapped:
            self._poller.get()  # nothing else is on the loop
        else:
            await self._ready.wait()
            self._ready.clear()

    def _landed(self, endpoint: Endpoint, kind: CompletionKind, immediate: int, reason: str) -> None:
        if kind is CompletionKind.IMMEDIATE:
            if self._place.is_sender:
                self._answered(endpoint, immediate)
            else:
                self._dispatched(endpoint, immediate)
        elif kind is CompletionKind.CONNECTED:
            self._endpoints.append(endpoint)
        elif self._left:
            raise SystemExit(f"{self._place.system}: a peer is gone: {reason}")

    # -- the sending side --------------------------------------------------------------------------------------------

    async def _send(self, task: Task) -> list[float]:
        place, size, is_mapped = self._place, task.size, self._is_mapped
        num_rows = size // place.row_bytes
        outboxes = [endpoint.out_rows.host() for endpoint in self._endpoints]
        self._task, self._times = task, []
        for round_number in range(task.rounds):
            self._round, self._left = round_number, len(outboxes)
            started = time.monotonic()
            stamp(self._payload, size, started, round_number, place.rank)
            for endpoint, outbox in zip(self._endpoints, outboxes, strict=True):
                fill(outbox, self._payload, size, is_mapped)
                endpoint.post(0, round_number, num_rows=num_rows)
            await self._all_landed()
            if task.is_exchange:
                self._times.append(time.monotonic() - started)
        for endpoint in self._endpoints:
            endpoint.post(0, ACKNOWLEDGED)
        return self._times

    def _answered(self, endpoint: Endpoint, immediate: int) -> None:
        if self._task.is_exchange:
            check(self._rows[endpoint.seat], self._task.size, self._round)
        self._left -= 1
        if not self._left:
            self._set_landed()

    # -- the receiving side ------------------------------------------------------------------------------------------

    async def _receive(self, task: Task) -> list[float]:
        self._task, self._times, self._arrived = task, [], 0
        # with the last answers acknowledged: until then a loop has to run that writes what their sockets did not take
        self._left = (task.rounds + 1) * self._place.num_senders
        early, self._early = self._early, []
        for endpoint, immediate in early:
            self._dispatched(endpoint, immediate)
        await self._all_landed()
        return self._times

    def _dispatched(self, endpoint: Endpoint, round_number: int) -> None:
        if not self._left:  # a sender that was told of the task before we were
            self._early.append((endpoint, round_number))
            return
        now = time.monotonic()
        if round_number != ACKNOWLEDGED:
            self._take(endpoint, round_number, now)
        self._left -= 1
        if not self._left:
            self._set_landed()

    def _take(self, endpoint: Endpoint, round_number: int, now: float) -> None:
        started, _ = check(self._rows[endpoint.seat], self._task.size, round_number)
        if not self._task.is_exchange:
            self._times.append(now - started)
            endpoint.post(0, ACKNOWLEDGED)
            return
        self._arrived += 1
        if self._arrived == self._place.num_senders:
            self._arrived = 0
            self._answer(round_number)

    def _answer(self, round_number: int) -> None:
        place, size, is_mapped = self._place, self._task.size, self._is_mapped
        num_rows = size // place.row_bytes
        stamp(self._payload, size, 0.0, round_number, place.rank)
        for endpoint in self._endpoints:
            fill(endpoint.out_rows.host(), self._payload, size, is_mapped)
            endpoint.post(0, round_number, num_rows=num_rows)


def fill(outbox: memoryview, payload: bytearray, size: int, is_mapped: bool) -> None:
    """All of it where the outbox is the receiver's memory, else what differs from round to round."""
    if is_mapped:
        outbox[:size] = memoryview(payload)[:size]
    else:
        outbox[: STAMP.size] = payload[: STAMP.size]
        outbox[size - 1] = payload[size - 1]
