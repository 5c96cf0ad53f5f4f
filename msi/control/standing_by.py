"""A coordinator that stands by for another: it listens nowhere until that one is silent, then it takes its place.

It is a client of the other one, so that it hears that it lives and which term it has, and tells it, once it wakes, that
it is superseded. `msi.control.succession` decides.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Callable

from msi.control.client_messages import ClientHeartbeat, ClientHello
from msi.control.coordinator import Coordinator
from msi.control.lateness import read_first, sleep_late
from msi.control.messages import PROTOCOL_VERSION, HeartbeatAck, HelloAgain, Refused, Superseded
from msi.control.succession import Step, Succession
from msi.errors import ConfigError, Unavailable
from msi.net.control import MessageClient

log = logging.getLogger(__name__)

LOOK_S = 0.5


class StandBy:
    """Args:
    other: the way to the coordinator that is stood by for; closed when `run` ends.
    create: a coordinator of this term, which listens where nobody does yet.
    clock: seconds, monotonic.

    Attributes:
        coordinator: while this one coordinates.
    """

    def __init__(
        self,
        other: MessageClient,
        create: Callable[[int], Coordinator],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.coordinator: Coordinator | None = None
        self._other = other
        self._create = create
        self._clock = clock
        self._succession = Succession(clock())
        self._serving: asyncio.Task[None] | None = None
        self._token = secrets.token_hex(8)
        self._seen = 0

    async def run(self) -> None:
        """For ever; cancelled, it ends the coordinator that it has become, and that its workers.

        Raises:
            ConfigError: the other one does not take it, or it cannot listen where it is to.
        """
        listening = asyncio.ensure_future(self._listen())
        try:
            while True:
                self._other.send(ClientHeartbeat(0))
                late_s = await sleep_late(LOOK_S, self._clock)
                if not await read_first(self._other, self._clock):
                    late_s += LOOK_S  # the other one may have spoken
                if listening.done():
                    listening.result()
                await self._advance(late_s)
        finally:
            listening.cancel()
            if self._serving is not None:
                self._serving.cancel()
                await asyncio.gather(self._serving, return_exceptions=True)
            self._other.close()

    async def _listen(self) -> None:
        while True:
            message = await self._other.receive()
            if isinstance(message, Refused):
                raise ConfigError(message.reason)
            if isinstance(message, HelloAgain):
                self._other.send(ClientHello(PROTOCOL_VERSION, self._token))
            if isinstance(message, HeartbeatAck | HelloAgain):
                self._seen = message.term
            self._succession.hears(self._seen, self._clock())

    async def _advance(self, late_s: float) -> None:
        coordinator, succession = self.coordinator, self._succession
        if self._serving is not None and self._serving.done():
            await self._stand_by()
            coordinator = None
        if coordinator is not None:
            succession.follows(coordinator.term)
        has_workers = coordinator is not None and coordinator.has_workers
        match succession.next(self._clock(), late_s=late_s, has_followers=has_workers):
            case Step.TAKE_OVER:
                self.coordinator = self._create(succession.term)
                log.warning("the coordinator at %s is silent; this one takes over, at %s",
                            self._other.address, self.coordinator.address)  # fmt: skip
                self._serving = asyncio.ensure_future(self.coordinator.run())
            case Step.CLAIM if coordinator is not None:
                self._other.send(Superseded(coordinator.term, coordinator.address))
            case Step.GIVE_WAY if coordinator is not None:
                coordinator.give_way(Superseded(self._seen, self._other.address))
                await self._stand_by()
            case _:
                pass

    async def _stand_by(self) -> None:
        """Once it coordinates no more. Raises whatever else than another coordinator ended it."""
        assert self._serving is not None
        with contextlib.suppress(Unavailable):
            await self._serving
        log.warning("the coordinator at %s serves again; this one stands by for it", self._other.address)
        self._serving = self.coordinator = None
        self._succession = Succession(self._clock())
