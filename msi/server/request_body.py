"""Bodies of requests: what is refused unread, how large one may be and all together, and how long it may take.

Nothing is inflated, and a client that waits for "100 Continue" sends nothing that would be refused.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator

from aiohttp import StreamReader, web

from msi.server.refusals import Refused

MAX_BODY_BYTES = 16 * 1024 * 1024
MAX_TOGETHER_BYTES = 16 * MAX_BODY_BYTES  # of those that are being read or understood
UNCOUNTED_BYTES = 64 * 1024  # of each body: small ones are never refused for the large ones' sake
WHOLE_WITHIN_S = 60.0
PART_WITHIN_S = 10.0
DISCARD_WITHIN_S = 1.0
JSON = "application/json"


class Bodies:
    """Reads bodies."""

    def __init__(self, max_bytes: int = MAX_BODY_BYTES, max_together_bytes: int = MAX_TOGETHER_BYTES) -> None:
        self.max_bytes = max_bytes
        self._max_together_bytes = max_together_bytes
        self._together_bytes = 0

    @contextlib.asynccontextmanager
    async def read(self, request: web.BaseRequest) -> AsyncGenerator[bytes, None]:
        """A JSON body, which counts among all of them until the context ends.

        Raises:
            Refused: its type, coding or size is not taken, it does not come, or there is no room for it now.
        """
        self._check_headers(request)
        if request.headers.get("Expect", "").lower() == "100-continue":
            await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            request.writer.output_size = 0  # the answer has not begun
        parts: list[bytes] = []
        counted = 0
        try:
            num_bytes = 0
            content = request.content
            async with contextlib.nullcontext() if content.is_eof() else asyncio.timeout(WHOLE_WITHIN_S):
                while part := await _next_part(content):
                    num_bytes += len(part)
                    parts.append(part)
                    if num_bytes > self.max_bytes:
                        raise self._too_large()
                    if num_bytes > UNCOUNTED_BYTES:
                        counted += len(part)
                        self._together_bytes += len(part)
                        self._check_room()
            body = b"".join(parts)
            parts.clear()
            yield body
        except TimeoutError:
            raise Refused(
                408, f"the body must come within {WHOLE_WITHIN_S:g} s, without a break of {PART_WITHIN_S:g} s",
                is_unread=True,
            ) from None  # fmt: skip
        except web.RequestPayloadError as error:
            raise Refused(400, f"the body cannot be read: {str(error)[:200]}", is_unread=True) from None
        finally:
            self._together_bytes -= counted

    def _check_headers(self, request: web.BaseRequest) -> None:
        """Raises Refused."""
        coding = request.headers.get("Content-Encoding", "identity")
        if coding.lower() != "identity":
            raise Refused(415, f"Content-Encoding is {coding[:40]!r}; send the body as it is", is_unread=True)
        given = request.headers.get("Content-Type", "")
        if given.partition(";")[0].strip().lower() != JSON:
            raise Refused(
                415, f"Content-Type is {given[:80]!r}; send the header `Content-Type: {JSON}`", is_unread=True
            )
        if (request.content_length or 0) > self.max_bytes:
            raise self._too_large()

    def _too_large(self) -> Refused:
        return Refused(413, f"the body is larger than {self.max_bytes} bytes", is_unread=True)

    def _check_room(self) -> None:
        if self._together_bytes > self._max_together_bytes:
            raise Refused(
                503, "bodies of other requests fill the memory that is set aside for them; try again",
                headers={"Retry-After": "1"}, is_unread=True,
            )  # fmt: skip


async def _next_part(content: StreamReader) -> bytes:
    """b"" at the end. Raises TimeoutError."""
    if content.is_eof():  # all of it is here, as of most
        return content.read_nowait()
    return await asyncio.wait_for(content.readany(), PART_WITHIN_S)


async def discard(request: web.BaseRequest, max_bytes: int = MAX_BODY_BYTES) -> None:
    """After a refusal: a client that reads only once it has sent everything gets the chance to, for a second."""
    num_bytes = 0
    with contextlib.suppress(TimeoutError, web.RequestPayloadError, ConnectionError):
        async with asyncio.timeout(DISCARD_WITHIN_S):
            while num_bytes < max_bytes and (part := await request.content.readany()):
                num_bytes += len(part)
