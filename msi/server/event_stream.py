"""Server-sent events on their way to a client: the first with the headers, through aiohttp; the others past it.

An event is one chunk of HTTP/1.1, which takes aiohttp six calls to write. Knows no endpoints.
"""

from __future__ import annotations

from collections.abc import Mapping

from aiohttp import HttpVersion11, web

from msi.server.door import connection_of

MAX_PIECE_BYTES = 256 * 1024  # of an answer: written at a time


class EventStream(web.StreamResponse):
    """The answer to one request; it begins with the first event. At its end `write_eof`, as ever."""

    _send_headers_immediately = False  # aiohttp's; without it they go alone

    def __init__(self, request: web.BaseRequest, headers: Mapping[str, str]) -> None:
        super().__init__(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache", **headers})
        self._request = request
        self._is_chunked = request.version >= HttpVersion11
        self.connection = connection_of(request)

    async def tell(self, events: bytes) -> None:
        """The next ones. Raises ConnectionResetError: the client has left."""
        if not self.prepared:
            await self.prepare(self._request)
            await write_pieces(self, events)
        elif len(events) > MAX_PIECE_BYTES:
            await write_pieces(self, events)
        elif events:
            self.connection.write(b"%x\r\n%b\r\n" % (len(events), events) if self._is_chunked else events)


async def write_pieces(response: web.StreamResponse, part: bytes) -> None:
    """However long it is."""
    for start in range(0, len(part), MAX_PIECE_BYTES):
        await response.write(part[start : start + MAX_PIECE_BYTES])
