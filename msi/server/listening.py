"""Where clients knock: the sockets that listen, how many connections there may be, and how fast they come in.

A flood of connections comes in a few at a time, so that whoever is inside is served between them; the others wait in
the queue of the system. Knows no HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import resource
import socket
from collections.abc import Callable, Sequence

from msi.errors import ConfigError

log = logging.getLogger(__name__)

BACKLOG = 1024  # connections that wait to be accepted
TAKEN_AT_ONCE = 8  # connections, in one turn of the loop
MAX_CONNECTIONS = 4096
KEPT_DESCRIPTORS = 128  # for what is no client's connection
AGAIN_AFTER_S = 1.0  # when the system has no descriptor left
NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Entrance:
    """Takes connections from sockets that listen, until it is closed.

    Args:
        factory: makes the protocol of a connection.
    """

    def __init__(self, sockets: Sequence[socket.socket], factory: Callable[[], asyncio.Protocol]) -> None:
        self._loop = asyncio.get_running_loop()
        self._sockets = sockets
        self._factory = factory
        self._entering: set[asyncio.Task[object]] = set()
        self._timers: dict[socket.socket, asyncio.TimerHandle] = {}
        for one in sockets:
            one.setblocking(False)
            self._loop.add_reader(one, self._take, one)

    def close(self) -> None:
        for one in self._sockets:
            if one in self._timers:
                self._timers.pop(one).cancel()
            self._loop.remove_reader(one)
            one.close()

    def _take(self, listener: socket.socket) -> None:
        for _ in range(TAKEN_AT_ONCE):
            try:
                client, _ = listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in NO_ROOM:
                    raise  # a bug: the loop says so
                log.error("no connection can be taken: %s; again in %g s", error.strerror, AGAIN_AFTER_S)
                self._loop.remove_reader(listener)
                self._timers[listener] = self._loop.call_later(AGAIN_AFTER_S, self._again, listener)
                return
            client.setblocking(False)
            task = self._loop.create_task(self._enter(client))
            self._entering.add(task)
            task.add_done_callback(self._entering.discard)

    async def _enter(self, client: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(self._factory, client)
        except OSError:  # it has left already
            client.close()

    def _again(self, listener: socket.socket) -> None:
        del self._timers[listener]
        self._loop.add_reader(listener, self._take, listener)


def max_connections() -> int:
    """As many as there are descriptors for."""
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_CONNECTIONS + KEPT_DESCRIPTORS
    if limit < wanted and limit != resource.RLIM_INFINITY:
        limit = wanted if most == resource.RLIM_INFINITY else min(wanted, most)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, most))
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return (
        MAX_CONNECTIONS if limit == resource.RLIM_INFINITY else max(8, min(MAX_CONNECTIONS, limit - KEPT_DESCRIPTORS))
    )


def listen(host: str, port: int) -> list[socket.socket]:
    """Sockets that listen at every address of a host, all at one port.

    Raises:
        ConfigError: names the host and the port, and says what to do.
    """
    sockets: list[socket.socket] = []
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        ):
            one = socket.socket(family, kind, protocol)
            sockets.append(one)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            one.bind((address[0], sockets[0].getsockname()[1] if len(sockets) > 1 else port, *address[2:]))
            one.listen(BACKLOG)
            one.setblocking(False)
    except OSError as error:
        for one in sockets:
            one.close()
        raise ConfigError(why_not(host, port, error)) from error
    return sockets


def url_of(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def why_not(host: str, port: int, error: OSError) -> str:
    """A sentence on a socket that cannot listen."""
    where = f"cannot serve HTTP on {url_of(host, port).removeprefix('http://')}"
    if isinstance(error, socket.gaierror):
        return f"{where}: {error.strerror}; give an address of this machine as `host`"
    number = error.errno or 0
    if number == errno.EADDRINUSE:
        return f"{where}: the port is in use; choose another `port`"
    if number == errno.EADDRNOTAVAIL:
        return f"{where}: this machine has no such address; give one of its own as `host`"
    reason = os.strerror(number) if number else str(error)
    return f"{where}: {reason}; choose another `port` or `host`"
