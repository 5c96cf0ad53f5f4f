"""KV blocks of requests that move, from one attention worker to another, while they still run here.

Whoever gives a request up sends its full blocks first, a few at a time, each under the name of its contents; the other
one keeps them as if a sequence that is gone had computed them. So the request finds them there as any common prefix,
and whatever goes wrong (no room, no connection, other shapes, too late) leaves it to be computed again. It runs on
meanwhile: what it waits for is the rest of its last block.

The next few go once the last have been taken, so nobody's loop stands still for more than CHUNK_BYTES of each peer.
"""

from __future__ import annotations

import asyncio
import logging
import struct
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from msi.attention.block_pool import HASH_BYTES
from msi.attention.exchanged_blocks import ExchangedBlocks
from msi.complaints import Complaints
from msi.errors import EngineError, ProtocolError, TransportError
from msi.net.alarm import Alarm
from msi.net.codec import Codec
from msi.net.regions import HOST_MEMORY
from msi.net.secret import public_name
from msi.net.slots import HEADER_BYTES, NOTE_BYTES, SlotLayout, aligned_row_bytes
from msi.net.transport import MAX_HELLO_BYTES, Admission, CompletionKind, Endpoint, Transport
from msi.worker.host import BlockMemory

log = logging.getLogger(__name__)

VERSION = 1
PEERS_AT_ONCE = 4
CHUNK_BYTES = 256 * 1024
SENT_WITHIN_S = 5.0
REMEMBERED = 8  # how fast it goes is a mean of about the last so many requests
NAME = struct.Struct(f"<{HASH_BYTES}sI")  # of a block, and the CRC of its bytes
MOST_NAMES = (HEADER_BYTES + NOTE_BYTES) // NAME.size


@dataclass(frozen=True, slots=True)
class BlocksHello:
    """An attention worker offers blocks; `shape`: of each."""

    version: int
    instance: str  # the public name of its token
    shape: str


CODEC = Codec((BlocksHello,), max_bytes=MAX_HELLO_BYTES)


class BlockExchange:
    """Of one attention worker's life.

    Args:
        blocks: of the requests that are here; asked for each time.
        clock: seconds, monotonic.

    Attributes:
        num_sent, num_received: blocks.
        sending_s: that it took to send them, connections included.
        bytes_per_s: as sending was measured; 0 before.
    """

    def __init__(
        self,
        instance: str,
        memory: BlockMemory,
        transport: Transport,
        blocks: Callable[[], ExchangedBlocks],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.num_sent = self.num_received = 0
        self.sending_s = self.bytes_per_s = 0.0
        self._hello = BlocksHello(VERSION, public_name(instance), memory.shape)
        self._memory = memory
        self._transport = transport
        self._blocks = blocks
        self._clock = clock
        row_bytes = aligned_row_bytes(memory.block_bytes)
        self._layout = SlotLayout(1, max(1, min(MOST_NAMES, CHUNK_BYTES // row_bytes)), row_bytes)
        # a seat for each peer that sends, and one for what the peer that we send to answers
        self._landing = transport.register(PEERS_AT_ONCE + 1, self._layout, HOST_MEMORY)
        self._free_seats = list(range(PEERS_AT_ONCE))
        self._endpoints: dict[int, Endpoint] = {}  # by seat; those of peers that send
        self._turn = asyncio.Lock()  # one request is sent at a time
        self._target: Endpoint | None = None
        self._answered = Alarm()
        self._is_closed = ""
        self._complaints = Complaints(log)

    async def listen(self) -> str:
        """Takes blocks from now on, and returns the address to give to those that have them."""
        self._transport.deliver(self._completed)
        return await self._transport.listen(self._accept)

    async def close(self) -> None:
        """Idempotent."""
        await self._transport.close()

    # -- sending -----------------------------------------------------------------------------------------------------

    async def send(self, request_id: str, address: str, again_s: float) -> None:
        """The full blocks of a request that runs; returns once they are there, or are not to come there.

        Args:
            again_s: what computing them again would take: sending takes less, or is left; 0 where that is not known.
        """
        try:
            async with asyncio.timeout(SENT_WITHIN_S), self._turn:
                await self._send(request_id, address, again_s)
        except (EngineError, TimeoutError) as error:
            why = str(error) or f"{SENT_WITHIN_S:g} s were over"
            log.info("%s moves without its KV blocks: they did not get to %s (%s)", request_id, address, why)
        except Exception as error:
            self._complaints.say(error, "KV blocks could not be sent")

    async def _send(self, request_id: str, address: str, again_s: float) -> None:
        num_bytes = self._memory.block_bytes * len(self._blocks().full(request_id, 0, 1 << 30))
        if not num_bytes or (again_s and self.bytes_per_s and num_bytes / self.bytes_per_s > again_s):
            return
        began, sent_before, seat = self._clock(), self.num_sent, PEERS_AT_ONCE
        self._answered, self._is_closed = Alarm(), ""
        endpoint = await self._transport.connect(address, CODEC.encode(self._hello), self._landing, seat)
        self._target = endpoint
        try:
            most = self._layout.slot_rows
            while blocks := self._blocks().full(request_id, self.num_sent - sent_before, most):
                self._post(endpoint, blocks)
                await self._answered.wait()
                if self._is_closed:
                    raise TransportError(address, self._is_closed)
                self.num_sent += len(blocks)
        finally:
            self._target = None
            self._landing.revoke(seat)
            endpoint.close()
            elapsed_s = self._clock() - began
            self.sending_s += elapsed_s
        if elapsed_s > 0:
            rate = (self.num_sent - sent_before) * self._memory.block_bytes / elapsed_s
            self.bytes_per_s += (rate - self.bytes_per_s) / (REMEMBERED if self.bytes_per_s else 1)

    def _post(self, endpoint: Endpoint, blocks: list[tuple[int, bytes]]) -> None:
        rows, names = endpoint.out_rows.host(), endpoint.out_headers[0]
        for index, (block, name) in enumerate(blocks):
            row = self._row(rows, index)
            self._memory.read(block, row)
            NAME.pack_into(names, index * NAME.size, name, zlib.crc32(row))
        endpoint.post(0, len(blocks), num_rows=len(blocks), note_bytes=NOTE_BYTES)

    def _row(self, rows: memoryview, index: int) -> memoryview:
        start = index * self._layout.row_bytes
        return rows[start : start + self._memory.block_bytes]

    # -- receiving ---------------------------------------------------------------------------------------------------

    def _accept(self, payload: bytes) -> Admission:
        hello = CODEC.decode(payload)
        if hello != self._hello:
            raise ProtocolError(f"these KV blocks are of another kind: {hello}, not {self._hello}")
        if not self._free_seats:
            raise ProtocolError(f"{PEERS_AT_ONCE} others send KV blocks already")
        return Admission(self._landing, self._free_seats.pop(), b"")

    def _completed(self, endpoint: Endpoint, kind: CompletionKind, immediate: int, reason: str) -> None:
        if endpoint.seat == PEERS_AT_ONCE:  # what we send to
            if endpoint is self._target:
                self._is_closed = reason if kind is CompletionKind.CLOSED else ""
                self._answered.ring()
        elif kind is CompletionKind.CONNECTED:
            self._endpoints[endpoint.seat] = endpoint
        elif kind is CompletionKind.CLOSED:
            self._leave(endpoint)
        elif self._endpoints.get(endpoint.seat) is endpoint:
            try:
                self._take(endpoint, immediate)
                endpoint.post(0, immediate)
            except Exception as error:
                if isinstance(error, EngineError):
                    log.warning("KV blocks were not taken: %s", error)
                else:
                    self._complaints.say(error, "KV blocks could not be taken")
                self._leave(endpoint)
                endpoint.close()

    def _take(self, endpoint: Endpoint, count: int) -> None:
        if not 1 <= count <= self._layout.slot_rows:
            raise ProtocolError(f"{count} KV blocks at once; {self._layout.slot_rows} may come")
        stride = self._landing.rows.num_bytes // self._landing.num_seats
        rows = self._landing.rows.host()[endpoint.seat * stride : (endpoint.seat + 1) * stride]
        names, ours = self._landing.headers[endpoint.seat][0], self._blocks()
        for index in range(count):
            row = self._row(rows, index)
            name, checksum = NAME.unpack_from(names, index * NAME.size)
            if zlib.crc32(row) != checksum:
                raise ProtocolError("a KV block came with other bytes than were sent")
            self.num_received += ours.adopt(name, lambda block, row=row: self._memory.write(block, row))  # type: ignore[misc]

    def _leave(self, endpoint: Endpoint) -> None:
        """A peer sends no more: its seat is another's."""
        if self._endpoints.get(endpoint.seat) is endpoint:
            del self._endpoints[endpoint.seat]
            self._landing.revoke(endpoint.seat)
            self._free_seats.append(endpoint.seat)
