"""How a launcher, or a coordinator started by hand, keeps the process that serves HTTP; that runs `gateway.py`.

It stands apart so that nothing a client sends can delay the coordinator, and nothing that the coordinator does a
client. Whoever keeps it holds the listening sockets and passes them on: when the gateway dies another one takes its
place, at the same port, and who connects meanwhile waits instead of being refused. A launcher's gateway survives the
coordinator, which the launcher starts again: streams go on.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time

from msi.control.restarts import Restarts
from msi.errors import ConfigError, Unavailable
from msi.instance.children import Child
from msi.net.secret import Secret
from msi.server.listening import listen, url_of

from .arguments import LaunchArguments

log = logging.getLogger(__name__)

READY_WITHIN_S = 60.0
ENDS_WITHIN_S = 6.0


def gateway_of(arguments: LaunchArguments) -> GatewayProcess:
    """As the arguments say. Raises ConfigError: nobody can listen there."""
    flags = (*arguments.serving_flags, *arguments.log_flags)
    if endpoint := arguments.options.otlp_traces_endpoint:
        flags += ("--otlp-traces-endpoint", endpoint)
    return GatewayProcess(arguments.host, arguments.port, flags, arguments.trust.secret)


class GatewayProcess:
    """One gateway, and its successors.

    Args:
        flags: for its command line.

    Raises:
        ConfigError: nobody can listen at `host` and `port`.
    """

    def __init__(self, host: str, port: int, flags: tuple[str, ...], secret: Secret | None = None) -> None:
        self._flags = flags
        self._address = ""
        self._secret = secret
        self._sockets = listen(host, port)
        self.url = url_of(host, self._sockets[0].getsockname()[1])
        self._child: Child | None = None
        self._ending = asyncio.Event()

    @property
    def pid(self) -> int:
        """0 before its start."""
        return 0 if self._child is None else self._child.pid

    async def start(self, address: str) -> None:
        """Of the coordinator, which may come later. Raises ConfigError, in the gateway's own words, or Unavailable."""
        self._address = address
        fds = tuple(one.fileno() for one in self._sockets)
        words = ("--role", "gateway", "--coordinator", address, "--http-sockets", ",".join(map(str, fds)))
        child = self._child = await Child.start((*self._flags, *words), self._secret, pass_fds=fds)
        try:
            async with asyncio.timeout(READY_WITHIN_S):
                while (message := await child.hear()) is not None:
                    if message.get("ready"):
                        return
                await child.process.wait()
        except TimeoutError:
            child.signal(signal.SIGKILL)
            raise Unavailable(f"the gateway did not start within {READY_WITHIN_S:g} s") from None
        raise ConfigError(child.failure or f"the gateway did not start: {child.end}; what it said is above")

    async def keep_alive(self) -> None:
        """Starts it again when it ends, for ever."""
        restarts = Restarts()
        while True:
            assert self._child is not None
            restarts.ready(time.monotonic())
            await self._child.process.wait()
            self._child.close()
            if self._ending.is_set():
                return
            delay_s = restarts.ended(time.monotonic(), has_said_why=False) or 0.0
            log.error(
                "the gateway (pid %d) is gone: %s; starting it again in %g s", self._child.pid, self._child.end, delay_s
            )
            await asyncio.sleep(delay_s)
            if self._ending.is_set():
                return
            with contextlib.suppress(ConfigError, Unavailable, OSError):
                await self.start(self._address)
                log.info("the gateway serves again (pid %d)", self.pid)
            if self._ending.is_set():  # asked while it started: it has not heard
                self._child.tell(drain=True)
                self._child.signal(signal.SIGTERM)

    def drain(self) -> None:
        """It takes nothing new from now on, and ends when what runs has; the second time, at once."""
        was_ending = self._ending.is_set()
        self._ending.set()
        for one in self._sockets:
            one.close()
        self._sockets = []
        if self._child is not None:
            self._child.tell(drain=True, end=was_ending)
            self._child.signal(signal.SIGTERM)  # where it has not come so far that it listens

    def fail(self, reason: str) -> None:
        """There is nothing to serve any more: what runs ends with this sentence, and the gateway with it."""
        if self._child is not None:
            self._child.tell(failure=reason)
        self.drain()

    async def wait(self) -> None:
        """Until the gateway that was told to drain has ended."""
        if self._child is not None:
            await self._child.process.wait()

    async def stop(self) -> None:
        """Until it has ended; it is killed if it does not. Idempotent."""
        if not self._ending.is_set():
            self.drain()
        if self._child is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._child.process.wait(), ENDS_WITHIN_S)
            self._child.signal(signal.SIGKILL)
            await self._child.process.wait()
            self._child.close()
