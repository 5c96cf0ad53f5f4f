"""Two ends of a transport that is put to the contract, and what is written, delivered and read at each.

Memory is touched through `Memory` alone, so that rows may lie where the host cannot reach them.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import threading
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import NamedTuple, Protocol

from msi.errors import ProtocolError, TransportError
from msi.net.regions import HOST_MEMORY, Allocator, Region
from msi.net.slots import SlotLayout
from msi.net.transport import Admission, CompletionKind, Endpoint, Landed, Landing, Transport

LEFT = SlotLayout(num_lanes=2, slot_rows=16, row_bytes=128)  # of who listens
RIGHT = SlotLayout(num_lanes=3, slot_rows=4, row_bytes=384)  # of who connects
NUM_SEATS = 3
SETTLE_S = 0.05  # in which what is not to happen would have


class Memory(Protocol):
    """How the checks see regions, wherever they lie."""

    allocator: Allocator

    def write(self, region: Region, at: int, content: bytes) -> None: ...

    def read(self, region: Region, at: int, num_bytes: int) -> bytes: ...

    def address(self, region: Region) -> int: ...


class HostRows:
    """Regions in host memory."""

    allocator: Allocator = HOST_MEMORY

    def write(self, region: Region, at: int, content: bytes) -> None:
        region.host()[at : at + len(content)] = content

    def read(self, region: Region, at: int, num_bytes: int) -> bytes:
        return bytes(region.host()[at : at + num_bytes])

    def address(self, region: Region) -> int:
        return ctypes.addressof(ctypes.c_char.from_buffer(region.host()))


class Subject(NamedTuple):
    """What is put to the contract.

    Attributes:
        make: a transport of the kind, on the running event loop.
        nobody: an address of the kind at which nobody listens.
        timeout_s: how long anything that must happen may take.
        taker: the thread that takes immediates, where it is a poller's.
    """

    make: Callable[[], Transport]
    nobody: str
    memory: Memory = HostRows()
    timeout_s: float = 5.0
    taker: threading.Thread | None = None


class Completion(NamedTuple):
    endpoint: Endpoint
    kind: CompletionKind
    immediate: int
    reason: str


class Side:
    """A transport, its landing, and what it has delivered and nobody has taken yet."""

    def __init__(self, transport: Transport, layout: SlotLayout, subject: Subject) -> None:
        self.transport = transport
        self.layout = layout
        self.landing: Landing = transport.register(NUM_SEATS, layout, subject.memory.allocator)
        self.delivered = deque[Completion]()
        self._memory = subject.memory
        self._timeout_s = subject.timeout_s
        transport.deliver(lambda *completion: self.delivered.append(Completion(*completion)), self._together)

    def _together(self, landed: Sequence[Landed]) -> None:
        for endpoint, immediate, _ in landed:
            self.delivered.append(Completion(endpoint, CompletionKind.IMMEDIATE, immediate, ""))

    async def take(self, count: int) -> list[Completion]:
        """The next completions, of which there must be so many and no more."""
        await until(lambda: len(self.delivered) >= count, self._timeout_s)
        taken = [self.delivered.popleft() for _ in range(len(self.delivered))]
        same(len(taken), count, "completions")
        return taken

    async def immediates(self, count: int) -> list[int]:
        taken = await self.take(count)
        same({one.kind for one in taken}, {CompletionKind.IMMEDIATE}, "kinds of completions")
        return [one.immediate for one in taken]

    def rows(self, seat: int, lane: int, num_bytes: int) -> bytes:
        """As they landed."""
        stride = self.landing.rows.num_bytes // self.landing.num_seats
        return self._memory.read(self.landing.rows, seat * stride + lane * self.layout.slot_bytes, num_bytes)

    def header(self, seat: int, lane: int) -> memoryview:
        return self.landing.headers[seat][lane]

    def is_zero(self, seat: int) -> bool:
        rows = any(any(self.rows(seat, lane, self.layout.slot_bytes)) for lane in range(self.layout.num_lanes))
        return not rows and not any(any(header) for header in self.landing.headers[seat])


class Pair:
    """Two sides, of which the left one listens."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.left = Side(subject.make(), LEFT, subject)
        self.right = Side(subject.make(), RIGHT, subject)
        self._address = ""
        self._next_seat = 0

    def accept(self, hello: bytes) -> Admission:
        if hello == b"go away":
            raise ProtocolError("we do not like you")
        self._next_seat += 1
        return Admission(self.left.landing, self._next_seat - 1, b"welcome " + hello)

    async def address(self) -> str:
        if not self._address:
            self._address = await self.left.transport.listen(self.accept)
        return self._address

    async def connect(self, hello: bytes = b"anna", seat: int = 2) -> tuple[Endpoint, Endpoint]:
        """The right-hand endpoint and the left-hand one. Answers land in the right side's `seat`."""
        address = await self.address()
        ours = await self.right.transport.connect(address, hello, self.right.landing, seat)
        (completion,) = await self.left.take(1)
        same(completion.kind, CompletionKind.CONNECTED, "the first completion of a peer")
        return ours, completion.endpoint

    def write(self, endpoint: Endpoint, layout: SlotLayout, lane: int, header: bytes, rows: bytes) -> None:
        endpoint.out_headers[lane][: len(header)] = header
        self.subject.memory.write(endpoint.out_rows, lane * layout.slot_bytes, rows)


@contextlib.asynccontextmanager
async def paired(subject: Subject) -> AsyncIterator[Pair]:
    pair = Pair(subject)
    try:
        yield pair
    finally:
        await pair.right.transport.close()
        await pair.left.transport.close()
        await pair.left.transport.close()  # idempotent


def same(found: object, expected: object, what: str) -> None:
    if found != expected:
        raise AssertionError(f"{what}: expected {_short(expected)}, found {_short(found)}")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:80] + "..."


async def raises(doing: Awaitable[object], words: str) -> None:
    try:
        await doing
    except TransportError as error:
        if words not in str(error):
            raise AssertionError(f"the error does not say {words!r}: {error}") from error
        return
    raise AssertionError("no TransportError was raised")


async def until(condition: Callable[[], bool], timeout_s: float) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110  # handlers announce nothing: that is what is being checked
            await asyncio.sleep(0.001)
