"""Whichever transport reaches a peer best: shared memory on this host, RDMA where both have cards, TCP elsewhere.

All write into one landing, and tell one handler. Whoever listens announces all addresses in one string, those that not
everybody can use marked with whose they are; whoever connects takes the first that is its own, too. That two have cards
on one kind of fabric does not say that these reach each other: if they do not, TCP it is. What was chosen and why is
logged once for each peer.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from pathlib import Path

from msi.errors import TransportError
from msi.net.complaints import Complaints
from msi.net.rdma.landing import RdmaLanding
from msi.net.rdma.transport import RdmaTransport
from msi.net.regions import Allocator
from msi.net.shm import ShmTransport
from msi.net.slots import SlotLayout
from msi.net.tcp import TcpTransport
from msi.net.transport import CONNECT_TIMEOUT_S, Admission, Endpoint, Handler, Landing, Poller, Together

log = logging.getLogger(__name__)


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
        key: what peers have to prove that they hold.
        encrypt: what is said to those.
        complain: told who is cut off.
        poller: takes immediates in place of the event loop, where it can.
        rdma: where this host has a card; closed with this one.
    """

    def __init__(
        self,
        host: str,
        *,
        key: bytes | None = None,
        encrypt: bool = False,
        complain: Complaints | None = None,
        poller: Poller | None = None,
        rdma: RdmaTransport | None = None,
    ) -> None:
        self._shm = ShmTransport(key=key, complain=complain, poller=poller)
        self._tcp = TcpTransport(host, key=key, encrypt=encrypt, complain=complain)
        self._rdma = rdma
        self._identity = host_identity()
        self._told: set[str] = set()

    def register(self, num_seats: int, layout: SlotLayout, allocator: Allocator) -> Landing:
        landing = self._shm.register(num_seats, layout, allocator)
        return landing if self._rdma is None else self._rdma.landing_over(landing)

    def deliver(self, handler: Handler, together: Together | None = None) -> None:
        for transport in (self._shm, self._tcp, self._rdma):
            if transport is not None:
                transport.deliver(handler, together)

    def take(self) -> None:
        self._shm.take()
        if self._rdma is not None:
            self._rdma.take()

    async def listen(self, accept: Callable[[bytes], Admission]) -> str:
        def accept_here(hello: bytes) -> Admission:
            admission = accept(hello)
            return admission._replace(landing=_mapped(admission.landing))

        here, anywhere = await asyncio.gather(self._shm.listen(accept_here), self._tcp.listen(accept))
        address = f"{here}@{self._identity} {anywhere}"
        if self._rdma is not None:
            address += f" {await self._rdma.listen(accept)}@{self._rdma.place.fabric}"
        return address

    async def connect(
        self, address: str, hello: bytes, landing: Landing, seat: int, *, timeout_s: float = CONNECT_TIMEOUT_S
    ) -> Endpoint:
        offered = dict(one.split("://", 1) for one in address.split() if "://" in one)
        name, _, identity = offered.get("shm", "").partition("@")
        if name and (not identity or identity == self._identity):
            self._tell(address, f"shm://{name} is reached by shared memory: it is on this host")
            here = await self._shm.connect(f"shm://{name}", hello, _mapped(landing), seat, timeout_s=timeout_s)
            here.way = "shared memory: it is on this host"
            return here
        why = "this host has no RDMA device that can be used"
        if self._rdma is not None:
            at, _, fabric = offered.get("rdma", "").partition("@")
            ours = self._rdma.place.fabric
            why = f"its host is on the fabric {fabric!r}, ours on {ours!r}" if at else "its host offers no RDMA"
            if at and fabric == ours:
                try:
                    endpoint = await self._rdma.connect(f"rdma://{at}", hello, landing, seat, timeout_s=timeout_s / 2)
                except TransportError as error:
                    why = f"by RDMA {error.reason}"
                else:
                    self._tell(address, f"rdma://{at} is reached by RDMA: both hosts have cards on one fabric ({ours})")
                    endpoint.way = f"RDMA: both hosts have cards on one fabric ({ours})"
                    return endpoint
        if "tcp" in offered:
            self._tell(address, f"tcp://{offered['tcp']} is reached by TCP: it is on another host, and {why}")
            there = await self._tcp.connect(f"tcp://{offered['tcp']}", hello, landing, seat, timeout_s=timeout_s)
            there.way = f"TCP: it is on another host, and {why}"
            return there
        raise TransportError(address, "is on another host and offers no TCP address; give it `transport=auto` or tcp")

    def _tell(self, address: str, sentence: str) -> None:
        if address not in self._told:
            self._told.add(address)
            log.info("%s", sentence)

    async def close(self) -> None:
        await self._shm.close()
        await self._tcp.close()
        if self._rdma is not None:
            await self._rdma.close()


def _mapped(landing: Landing) -> Landing:
    """As the shared-memory transport made it."""
    return landing.inner if isinstance(landing, RdmaLanding) else landing
