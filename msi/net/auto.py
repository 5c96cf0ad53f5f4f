"""Whichever transport reaches a peer best: shared memory on this host, TCP to another.

Both write into one landing, and tell one handler. Whoever listens announces both addresses in one string, the first
marked with its host; whoever connects takes shared memory if that is its own.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

from msi.errors import TransportError
from msi.net.complaints import Complaints
from msi.net.regions import Allocator
from msi.net.shm import ShmLanding, ShmTransport
from msi.net.slots import SlotLayout
from msi.net.tcp import TcpTransport
from msi.net.transport import CONNECT_TIMEOUT_S, Admission, Endpoint, Handler, Landing, Poller


def host_identity() -> str:
    """Equal where shared memory connects: one kernel, one network namespace (the handshake's sockets belong to it),
    one clock, one user. A host's name says none of that.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.stat("/proc/self/ns/net").st_ino
        clocks = Path("/proc/self/ns/time")  # not there before Linux 5.6
        clock = clocks.stat().st_ino if clocks.exists() else 0
    except OSError:
        return ""  # nobody's: TCP works everywhere
    return f"{boot}.{namespace}.{clock}.{os.geteuid()}"


class AutoTransport:
    """Implements `msi.net.transport.Transport`; create it on its event loop.

    Args:
        host: this host's address as peers on others reach it.
        key: what peers on other hosts have to prove that they hold.
        complain: told who is cut off.
        poller: takes immediates in place of the event loop, where it can.
    """

    def __init__(
        self, host: str, *, key: bytes | None = None, complain: Complaints | None = None, poller: Poller | None = None
    ) -> None:
        self._shm = ShmTransport(complain=complain, poller=poller)
        self._tcp = TcpTransport(host, key=key, complain=complain)
        self._identity = host_identity()

    def register(self, num_seats: int, layout: SlotLayout, allocator: Allocator) -> ShmLanding:
        return self._shm.register(num_seats, layout, allocator)

    def deliver(self, handler: Handler) -> None:
        self._shm.deliver(handler)
        self._tcp.deliver(handler)

    def take(self) -> None:
        self._shm.take()

    async def listen(self, accept: Callable[[bytes], Admission]) -> str:
        here, anywhere = await asyncio.gather(self._shm.listen(accept), self._tcp.listen(accept))
        return f"{here}@{self._identity} {anywhere}"

    async def connect(
        self, address: str, hello: bytes, landing: Landing, seat: int, *, timeout_s: float = CONNECT_TIMEOUT_S
    ) -> Endpoint:
        offered = dict(one.split("://", 1) for one in address.split() if "://" in one)
        name, _, identity = offered.get("shm", "").partition("@")
        if name and (not identity or identity == self._identity):
            return await self._shm.connect(f"shm://{name}", hello, landing, seat, timeout_s=timeout_s)
        if "tcp" in offered:
            return await self._tcp.connect(f"tcp://{offered['tcp']}", hello, landing, seat, timeout_s=timeout_s)
        raise TransportError(address, "is on another host and offers no TCP address; give it `transport=auto` or tcp")

    async def close(self) -> None:
        await self._shm.close()
        await self._tcp.close()
