"""A worker's or client's way to whichever coordinator it follows, where one stands by for another.

One connection at a time counts. While its coordinator is silent, and until any was heard, those at the other addresses
are asked, over connections of their own; the first that answers is followed, and the former connection is closed with
whatever of it was not read. `msi.control.succession` decides.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

from msi.control.client_messages import ClientHeartbeat, ClientHello
from msi.control.lateness import sleep_late
from msi.control.messages import Heartbeat, Superseded, WorkerHello
from msi.control.succession import Allegiance
from msi.errors import ConfigError
from msi.net.alarm import Alarm
from msi.net.codec import Codec
from msi.net.control import ControlClient, MessageClient, is_address
from msi.net.secret import Secret

log = logging.getLogger(__name__)

LOOK_S = 0.5
INTRODUCTIONS = (Heartbeat, WorkerHello, ClientHello, ClientHeartbeat)  # answered by whoever coordinates


def way_to(address: str, end: Codec, secret: Secret | None = None) -> MessageClient:
    """To the coordinator at an address, or to that one of several, with commas between them, which coordinates.

    Raises:
        ConfigError: one of them is no address.
    """
    addresses = [one.strip() for one in address.split(",")]
    if wrong := [one for one in addresses[1:] if not is_address(one)]:  # the first is looked at as it is connected to
        raise ConfigError(f"{wrong[0]!r} is not a coordinator's address; give tcp://HOST:PORT,tcp://HOST:PORT")
    if len(addresses) == 1:
        return ControlClient(addresses[0], end, secret)
    return Following(addresses, lambda one: ControlClient(one, end, secret))


class Following:
    """Implements `msi.net.control.MessageClient`.

    Args:
        connect: to a coordinator's address.
    """

    def __init__(
        self,
        addresses: list[str],
        connect: Callable[[str], MessageClient],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.num_sent = 0
        self.address = ",".join(addresses)
        self._connect = connect
        self._clock = clock
        self._allegiance = Allegiance(addresses, clock())
        self._ways = {addresses[0]: connect(addresses[0])}  # that of its coordinator, and of those that are asked
        self._reading: dict[str, asyncio.Task[Any]] = {}
        self._looking: asyncio.Task[None] | None = None
        self._introduction: Any = None
        self._pulse: tuple[Callable[[float], Any], float] | None = None
        self._something_came = Alarm()

    @property
    def _own(self) -> MessageClient:
        return self._ways[self._allegiance.address]

    def send(self, message: Any) -> None:
        self.num_sent += 1
        if isinstance(message, INTRODUCTIONS):
            self._introduction = message
        self._own.send(message)

    async def receive(self) -> Any:
        """The next message of the coordinator that is followed. Cancellation loses nothing. Raises ConfigError."""
        if self._looking is None:
            self._looking = asyncio.get_running_loop().create_task(self._look(), name="look for a coordinator")
        while True:
            self._read()
            own = self._allegiance.address
            done = [one for one in (own, *self._reading) if self._reading[one].done()]
            if not done:
                await self._something_came.wait()
            elif (message := self._heard(done[0], self._reading.pop(done[0]))) is not None:
                return message

    def _read(self) -> None:
        """Of each connection, the next message."""
        for address, way in self._ways.items():
            if address not in self._reading:
                self._reading[address] = asyncio.ensure_future(way.receive())
                self._reading[address].add_done_callback(lambda _: self._something_came.ring())

    def _heard(self, address: str, task: asyncio.Task[Any]) -> Any:
        """What it said, where that counts; None where it does not. Raises ConfigError: its coordinator refuses."""
        is_own = address == self._allegiance.address
        if (error := task.exception()) is not None:
            if is_own:
                raise error
            log.warning("the coordinator at %s cannot be asked: %s", address, error)
            self._leave(address)
            return None
        if not self._allegiance.hears(address, self._clock()):
            return None
        if not is_own:
            log.warning("the coordinator at %s is followed from now on", address)
        message = task.result()
        if isinstance(message, Superseded):
            self._allegiance.sent_on(message.address, self._clock())
            log.warning("the coordinator at %s was superseded; going on with %s", address, self._allegiance.address)
            message = None
        self._settle()
        return message

    def _settle(self) -> None:
        """One connection: to whom it follows."""
        own = self._allegiance.address
        is_new = own not in self._ways
        if is_new:
            self._ways[own] = self._connect(own)
        others = [one for one in self._ways if one != own]
        for address in others:
            self._leave(address)
        if (others or is_new) and self._pulse is not None:
            self._own.keep_alive(*self._pulse)
        if is_new and self._introduction is not None:
            self._own.send(self._introduction)

    def _leave(self, address: str) -> None:
        if (task := self._reading.pop(address, None)) is not None:
            task.cancel()
        self._ways.pop(address).close()

    async def _look(self) -> None:
        while True:
            late_s = await sleep_late(LOOK_S, self._clock)
            if self.has_unread:
                continue
            asked = self._allegiance.asked(self._clock(), late_s=late_s)
            for address in asked:
                if address not in self._ways:
                    try:
                        self._ways[address] = self._connect(address)
                    except ConfigError as error:
                        log.error("%s", error)
                        continue
                if self._introduction is not None:
                    self._ways[address].send(self._introduction)
            if asked:
                self._read()

    @property
    def has_unread(self) -> bool:
        return self._own.has_unread or any(one.done() for one in self._reading.values())

    def keep_alive(self, message: Callable[[float], Any], every_s: float) -> None:
        self._pulse = message, every_s
        self._own.keep_alive(message, every_s)

    def close(self) -> None:
        if self._looking is not None:
            self._looking.cancel()
        for address in list(self._ways):
            self._leave(address)
