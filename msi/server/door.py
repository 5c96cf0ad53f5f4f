"""Connections of the HTTP server: how many there may be, and how long one may keep the server waiting.

A client has ten seconds for the headers of a request, and one that does not read what it was sent is cut after thirty.
When all places are taken, the connection that has waited longest without a request gives its place to a new one. One
that says nothing costs next to nothing: HTTP begins at its first byte. What is not HTTP is answered with an error in
JSON, like everything else. Knows no endpoints.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, cast

import orjson
from aiohttp import web

from msi.server.answers import error_object
from msi.server.listening import MAX_CONNECTIONS

log = logging.getLogger(__name__)

HEADERS_WITHIN_S = 10.0
IDLE_S = 75.0  # between two requests
UNREAD_S = 30.0  # without a byte read of what waits to be read
LOOK_EVERY_S = 1.0
MAX_LINE_BYTES = 16 * 1024  # of the request line, and of each header
MAX_HEADERS = 128

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


class Door(web.Server):
    """A factory of connections, for an `Entrance`. `open` before, `shutdown` after everything.

    Args:
        handler: answers a request; cancelled when its client leaves. It raises nothing but cancellation.
    """

    def __init__(self, handler: Handler, max_connections: int = MAX_CONNECTIONS) -> None:
        super().__init__(
            self._handle,
            handler_cancellation=True,
            access_log=None,
            keepalive_timeout=IDLE_S,
            lingering_time=0.0,  # whoever refuses a body unread decides how it ends
            max_line_size=MAX_LINE_BYTES,
            max_field_size=MAX_LINE_BYTES,
            max_headers=MAX_HEADERS,
            auto_decompress=False,
        )
        self._num_cut = 0  # for being late, or for not reading
        self._num_refused = 0  # for want of a place
        self._answer = handler
        self._max_connections = max_connections
        self._open: set[Connection] = set()
        self._waiting: dict[Connection, None] = {}  # without a request, longest first
        self._timer: asyncio.TimerHandle | None = None

    def __call__(self) -> Connection:  # type: ignore[override]  # what stands before aiohttp's
        return Connection(self, self._loop)

    def begin_http(self, connection: Connection) -> Http:
        """A client has spoken."""
        return Http(connection, self, self._loop, **self._kwargs)

    def counters(self) -> dict[str, float]:
        """Everything countable, by name."""
        return {
            "connections": len(self._open),
            "connections_cut": self._num_cut,
            "connections_refused": self._num_refused,
        }

    def open(self) -> None:
        """From now on late ones are cut."""
        self._timer = asyncio.get_running_loop().call_later(LOOK_EVERY_S, self._look)

    async def shutdown(self, timeout: float | None = None) -> None:
        """Ends every connection; what is being answered has `timeout` seconds."""
        if self._timer is not None:
            self._timer.cancel()
        self.pre_shutdown()  # idle connections do not wait for it
        await super().shutdown(timeout)
        for connection in list(self._open):
            connection.abort()

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        connection = connection_of(request)
        self._waiting.pop(connection, None)
        connection.begins()
        try:
            return await self._answer(request)
        finally:
            if connection in self._open:
                connection.ends()
                self._waiting[connection] = None

    def _look(self) -> None:
        now = asyncio.get_running_loop().time()
        for connection in list(self._open):
            if connection.is_late(now):
                self._num_cut += 1
                connection.cut()
        self.open()

    # -- what connections say ----------------------------------------------------------------------------------------

    def entered(self, connection: Connection) -> bool:
        """Whether there is a place for it."""
        if len(self._open) >= self._max_connections:
            self._num_refused += 1
            longest = next(iter(self._waiting), None)
            if longest is None:
                return False
            self.left(longest)
            longest.cut()
        self._open.add(connection)
        self._waiting[connection] = None
        return True

    def left(self, connection: Connection) -> None:
        self._open.discard(connection)
        self._waiting.pop(connection, None)


class Connection(asyncio.Protocol):
    """One connection. aiohttp's part of it, which is the costly one, is made when the client speaks."""

    __slots__ = (
        "_client", "_door", "_expects_since", "_http", "_is_busy", "_loop", "_unread_bytes", "_unread_since",
        "_writable",
    )  # fmt: skip

    def __init__(self, door: Door, loop: asyncio.AbstractEventLoop) -> None:
        self._door = door
        self._loop = loop
        self._client: asyncio.Transport | None = None
        self._http: Http | None = None
        self._is_busy = False
        self._expects_since: float | None = None  # headers
        self._unread_bytes = 0
        self._unread_since = 0.0
        self._writable: asyncio.Future[None] | None = None  # while the client reads too slowly

    @property
    def is_behind(self) -> bool:
        """The client has not read what it was sent: `caught_up` before more of an answer is made for it."""
        return self._writable is not None

    async def caught_up(self) -> None:
        """Until the client has read most of what it was sent. Raises ConnectionResetError: it has left."""
        while self._writable is not None:
            await asyncio.shield(self._writable)
        if self._client is None:
            raise ConnectionResetError("the client has left")

    def write(self, data: bytes) -> None:
        """Sends at once, behind what was sent before. Raises ConnectionResetError: the client has left."""
        if self._client is None or self._client.is_closing():
            raise ConnectionResetError("the client has left")
        self._client.write(data)

    @property
    def unread_bytes(self) -> int:
        """That wait here to be read."""
        return 0 if self._client is None else self._client.get_write_buffer_size()

    def begins(self) -> None:
        """A request has come."""
        self._is_busy = True
        self._expects_since = None

    def ends(self) -> None:
        """It has been answered."""
        self._is_busy = False

    def is_late(self, now: float) -> bool:
        """Whether it keeps the server waiting for too long; asked about once a second."""
        if self._expects_since is not None and now - self._expects_since > HEADERS_WITHIN_S:
            return True
        before, self._unread_bytes = self._unread_bytes, self.unread_bytes
        if not self._unread_bytes or self._unread_bytes < before or not before:
            self._unread_since = now
            return False
        return now - self._unread_since > UNREAD_S

    def cut(self) -> None:
        """Ends it, with a sentence if there is nothing before it to read."""
        if self._client is None:
            return
        if self._client.get_write_buffer_size() or self._is_busy:
            self.abort()
            return
        if self._expects_since is not None:
            self._client.write(raw_error(408, f"the headers of a request must come within {HEADERS_WITHIN_S:g} s"))
        if self._http is not None:
            self._http.force_close()
        else:
            self._client.close()

    def abort(self) -> None:
        if self._client is not None:
            self._client.abort()

    # -- asyncio's side ----------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._client = cast(asyncio.Transport, transport)
        self._expects_since = self._loop.time()
        if not self._door.entered(self):
            self._client.write(raw_error(503, "this server has as many connections as it takes", "Retry-After: 1\r\n"))
            self._client.close()
            self._client = None

    def data_received(self, data: bytes) -> None:
        if self._client is None:  # it was refused
            return
        if self._http is None:
            self._http = self._door.begin_http(self)
            self._http.connection_made(self._client)
        if not self._is_busy and self._expects_since is None:
            self._expects_since = self._loop.time()
        self._http.data_received(data)

    def pause_writing(self) -> None:
        if self._writable is None:
            self._writable = self._loop.create_future()
        if self._http is not None:
            self._http.pause_writing()

    def resume_writing(self) -> None:
        self._may_write()
        if self._http is not None:
            self._http.resume_writing()

    def eof_received(self) -> None:
        if self._http is not None:
            self._http.eof_received()

    def _may_write(self) -> None:
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)
        self._writable = None

    def connection_lost(self, exc: BaseException | None) -> None:
        self._client = None
        self._may_write()
        self._door.left(self)
        if self._http is not None:
            self._http.connection_lost(exc)


class Http(web.RequestHandler):
    """What aiohttp makes of the bytes of a connection."""

    __slots__ = ("connection",)

    def __init__(self, connection: Connection, door: Door, loop: asyncio.AbstractEventLoop, **options: Any) -> None:
        super().__init__(door, loop=loop, **options)
        self.connection = connection

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """What is not HTTP, or (a bug of ours) what the handler raised."""
        if isinstance(exc, ConnectionError):
            raise exc  # nobody is left to tell
        if status >= 500:
            log.error("a request could not be answered", exc_info=exc)
        if request.writer.output_size > 0:
            raise ConnectionError("an answer has begun; there can be no other")
        sentence = _first_line(message) if message and status < 500 else "the server failed at this request"
        body = orjson.dumps({"error": error_object(sentence, status)})
        response = web.Response(status=status, body=body, content_type="application/json")
        response.force_close()
        return response


def connection_of(request: web.BaseRequest) -> Connection:
    """The one that a request came by."""
    assert isinstance(request.protocol, Http)
    return request.protocol.connection


def raw_error(status: int, sentence: str, headers: str = "") -> bytes:
    """A whole answer, where there is no request that it could belong to."""
    reason = {408: "Request Timeout", 503: "Service Unavailable"}[status]
    body = orjson.dumps({"error": error_object(sentence, status)})
    head = f"HTTP/1.1 {status} {reason}\r\nContent-Type: application/json\r\nConnection: close\r\n"
    return f"{head}{headers}Content-Length: {len(body)}\r\n\r\n".encode() + body


def _first_line(message: str) -> str:
    return "this is not HTTP: " + message.strip().splitlines()[0].strip().rstrip(":")[:200]
