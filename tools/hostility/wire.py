"""HTTP and WebSocket written by hand, so that they can be wrong in every way. Knows nothing of attacks."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import socket
import struct
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

ANSWER_TIMEOUT_S = 60.0
CHUNK_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True)
class Target:
    """The server under attack."""

    host: str
    port: int
    api_key: str = ""

    @staticmethod
    def of(url: str, api_key: str = "") -> Target:
        parts = urlsplit(url)
        assert parts.hostname is not None, url
        return Target(parts.hostname, parts.port or 80, api_key)

    @property
    def headers(self) -> dict[str, str]:
        headers = {"Host": f"{self.host}:{self.port}", "Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        return headers


@dataclass(slots=True)
class Answer:
    """What came back. `status` 0: the server closed the connection without an answer."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


class Connection:
    """One TCP connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, content: bytes) -> None:
        """All of it, unless the other side closes first."""
        with contextlib.suppress(ConnectionError):
            for at in range(0, len(content), CHUNK_BYTES):
                self.writer.write(content[at : at + CHUNK_BYTES])
                await self.writer.drain()

    async def answer(self) -> Answer:
        """The head and whatever body follows until its length or the end. Raises TimeoutError."""
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            try:
                head = await self.reader.readuntil(b"\r\n\r\n")
            except (asyncio.IncompleteReadError, ConnectionError, asyncio.LimitOverrunError):
                return Answer(0)
            lines = head.decode("latin-1").split("\r\n")
            words = lines[0].split(" ")
            status = int(words[1]) if len(words) > 1 and words[1].isdigit() else 0
            headers = dict(_header(line) for line in lines[1:] if ":" in line)
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                if "content-length" in headers:
                    body = await self.reader.readexactly(int(headers["content-length"]))
                    return Answer(status, headers, body)
                if headers.get("transfer-encoding") == "chunked":
                    return Answer(status, headers, await self._chunks())
            return Answer(status, headers)

    async def _chunks(self) -> bytes:
        parts = []
        while size := int((await self.reader.readline()).strip() or b"0", 16):
            parts.append(await self.reader.readexactly(size))
            await self.reader.readline()
        return b"".join(parts)

    def reset(self) -> None:
        """Ends it with RST: what was on its way is thrown away."""
        raw = self.writer.get_extra_info("socket")
        with contextlib.suppress(OSError):
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


def _header(line: str) -> tuple[str, str]:
    name, _, value = line.partition(":")
    return name.strip().lower(), value.strip()


@contextlib.asynccontextmanager
async def connected(target: Target, buffer_bytes: int = 0) -> AsyncIterator[Connection]:
    """A connection; `buffer_bytes` makes its receive buffer small, for one that does not read."""
    raw = socket.socket(socket.AF_INET6 if ":" in target.host else socket.AF_INET)
    raw.setblocking(False)
    if buffer_bytes:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
    try:
        await asyncio.get_running_loop().sock_connect(raw, (target.host, target.port))
        reader, writer = await asyncio.open_connection(sock=raw, limit=max(buffer_bytes, 1 << 20))
    except BaseException:
        raw.close()
        raise
    connection = Connection(reader, writer)
    try:
        yield connection
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError, TimeoutError):
            async with asyncio.timeout(5.0):
                await writer.wait_closed()


def request_bytes(
    target: Target, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None
) -> bytes:
    """A request; a header that is "" is left out."""
    every = target.headers | {"Content-Length": str(len(body))} | dict(headers or {})
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in every.items() if value)]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("utf-8", "surrogateescape") + body


async def ask(
    target: Target, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None
) -> Answer:
    """One request on a connection of its own. Raises TimeoutError."""
    async with connected(target) as connection:
        sending = asyncio.ensure_future(connection.send(request_bytes(target, method, path, body, headers)))
        try:
            return await connection.answer()  # it may come before everything is sent
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)


async def post(target: Target, path: str, values: Any, headers: Mapping[str, str] | None = None) -> Answer:
    """JSON, as Python writes it: NaN, Infinity and lone surrogates included."""
    return await ask(target, "POST", path, json.dumps(values).encode("utf-8", "surrogatepass"), headers)


# -- WebSocket ------------------------------------------------------------------------------------------------------

TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10


async def upgrade(target: Target, connection: Connection, headers: Mapping[str, str] | None = None) -> Answer:
    """Asks for /v1/stream."""
    wanted = {
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": base64.b64encode(os.urandom(16)).decode(),
        "Content-Length": "",
        "Content-Type": "",
    }
    await connection.send(request_bytes(target, "GET", "/v1/stream", headers=wanted | dict(headers or {})))
    return await connection.answer()


def frame(kind: int, payload: bytes, *, is_last: bool = True, is_masked: bool = True, length: int = -1) -> bytes:
    """A frame; `length` is what it says of its payload, if that is not the truth."""
    said = len(payload) if length < 0 else length
    mask = 0x80 if is_masked else 0
    head = bytes([(0x80 if is_last else 0) | kind])
    if said < 126:
        head += bytes([mask | said])
    elif said < 1 << 16:
        head += bytes([mask | 126]) + struct.pack(">H", said)
    else:
        head += bytes([mask | 127]) + struct.pack(">Q", said)
    return head + (bytes(4) if is_masked else b"") + payload  # a mask of zeros leaves the payload as it is


async def read_frame(connection: Connection) -> tuple[int, bytes]:
    """(kind, payload); kind 0 once the connection is over. Raises TimeoutError."""
    async with asyncio.timeout(ANSWER_TIMEOUT_S):
        try:
            first, second = await connection.reader.readexactly(2)
            size = second & 0x7F
            if size == 126:
                (size,) = struct.unpack(">H", await connection.reader.readexactly(2))
            elif size == 127:
                (size,) = struct.unpack(">Q", await connection.reader.readexactly(8))
            return first & 0xF, await connection.reader.readexactly(size)
        except (asyncio.IncompleteReadError, ConnectionError):
            return 0, b""
