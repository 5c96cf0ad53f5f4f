"""One end of a TCP connection: frames out of an outbox, frames into a seat.

    magic 4 | immediate 4 | lane 4 | bytes of header and note 4 | rows 4 | header and note | rows

A post is one vectored write of a frame's head and what lies in the outbox, from whichever thread posts. What the socket
does not take at once the event loop writes later, from the same memory: a slot is not written again before its answer
has landed, so nothing is copied. What comes goes straight to where it lands; only heads, and the first kilobytes
behind one, pass through a small buffer, so that a short frame costs one read.

Among many connections, what was read from several in one turn of the event loop is handed over together, at its end;
but for rows larger than that buffer, as reading what others sent takes longer than handing over.
"""

from __future__ import annotations

import asyncio
import struct
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from msi.errors import TransportError
from msi.net.delivery import Delivery
from msi.net.landing import Outbox, seat_slots
from msi.net.slots import HEADER_BYTES, NOTE_BYTES, SlotLayout
from msi.net.transport import CompletionKind, Landing

FRAME_MAGIC = b"MSIF"
FRAME = struct.Struct("<4sIIII")  # magic, immediate, lane, bytes of header and note, rows
FRAME_BYTES = FRAME.size
pack_frame, unpack_frame = FRAME.pack, FRAME.unpack_from
HEADS_BYTES = 40960  # of the buffer that heads pass through: copying a frame of 32 KB costs less than a second read
MAX_BACKLOG = 3 * 8192  # pieces that a peer may be behind; a frame is at most three
MAX_PIECES = 64  # of one write
READS_PER_TURN = 16  # before other connections get theirs
FEW = 4  # connections, among which a turn's end costs more than handing over together saves

IMMEDIATE = CompletionKind.IMMEDIATE
Pieces = tuple[bytes | memoryview, ...]


class StreamSocket(Protocol):
    """A socket, or what encrypts over one. Does not block."""

    def fileno(self) -> int: ...

    def close(self) -> None: ...

    def sendmsg(self, buffers: Sequence[bytes | memoryview], /) -> int: ...

    def recv_into(self, buffer: memoryview, /) -> int: ...

    def recvmsg_into(self, buffers: Sequence[memoryview], /) -> tuple[Any, ...]: ...


class TurnDelivery:
    """Hands over what is read in one turn of the event loop at its end."""

    def __init__(self, deliver: Delivery) -> None:
        self.now = deliver
        self.num_connections = 0
        self._loop = asyncio.get_running_loop()

    def landed(self, endpoint: TcpEndpoint, immediate: int) -> None:
        if self.num_connections <= FEW:
            self.now(endpoint, IMMEDIATE, immediate)
        elif self.now.gather(endpoint, immediate):
            self._loop.call_soon(self.now.hand_over)


class TcpEndpoint:
    """Used from the event loop, but for `post`.

    Args:
        name: of the peer, for sentences.
        peer: what it said.
        out_layout: of its seat.
        forget: called once, on the event loop, when the connection is closed.
        cut_off: told why, when the peer sent what is not a frame.
    """

    def __init__(
        self,
        sock: StreamSocket,
        *,
        name: str,
        peer: bytes,
        landing: Landing,
        seat: int,
        out_layout: SlotLayout,
        deliver: TurnDelivery,
        forget: Callable[[TcpEndpoint], None],
        cut_off: Callable[[str, str], None],
    ) -> None:
        self.peer = peer
        self.seat = seat
        self.way = "TCP"
        self.came_at = 0.0
        self._name = name
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._deliver = deliver
        self._forget = forget
        self._cut_off = cut_off
        self._landing = landing
        self._generation = landing.generation(seat)
        self._in_headers = landing.headers[seat]
        self._in_slots = seat_slots(landing, seat)
        self._in_layout = landing.layout
        self._outbox = Outbox(out_layout, landing.allocator)
        self.out_headers = self._outbox.headers
        self.out_rows = self._outbox.rows
        self._bare_headers = [header[:HEADER_BYTES] for header in self.out_headers]
        self._out_row_bytes = out_layout.row_bytes
        self._heads = memoryview(bytearray(HEADS_BYTES))
        self._num_heads = 0  # bytes in `_heads`, less than a head
        self._rest: list[memoryview] = []  # where the rest of the frame in progress goes
        self._immediate = 0  # its immediate
        self._posting = threading.Lock()  # held while writing, and while the connection ends
        self._backlog: deque[memoryview] = deque()
        self._is_open = True
        deliver.num_connections += 1

    # -- out ---------------------------------------------------------------------------------------------------------

    def post(self, lane: int, immediate: int, num_rows: int = 0, note_bytes: int = 0) -> None:
        if not num_rows and not note_bytes:
            self.write((pack_frame(FRAME_MAGIC, immediate, 0, 0, 0),), FRAME_BYTES)
            return
        header_bytes, rows_bytes = HEADER_BYTES + note_bytes, num_rows * self._out_row_bytes
        head = pack_frame(FRAME_MAGIC, immediate, lane, header_bytes, num_rows)
        header = self.out_headers[lane][:header_bytes] if note_bytes else self._bare_headers[lane]
        if num_rows:
            pieces: Pieces = (head, header, self._outbox.slots[lane][:rows_bytes])
        else:
            pieces = (head, header)
        self.write(pieces, FRAME_BYTES + header_bytes + rows_bytes)

    def write(self, pieces: Pieces, num_bytes: int) -> None:
        """These bytes, so many in all, go out after all earlier ones, and stay as they are until they have. As `post`,
        from any thread.

        Raises:
            TransportError: the connection is closed.
        """
        with self._posting:
            if not self._is_open:
                raise TransportError(self._name, "the connection is closed")
            backlog = self._backlog
            if backlog:
                if len(backlog) >= MAX_BACKLOG:
                    raise TransportError(self._name, f"is {len(backlog)} writes behind")
                backlog.extend(memoryview(piece) for piece in pieces)
                return
            try:
                sent = self._sock.sendmsg(pieces)
            except BlockingIOError:
                sent = 0
            except OSError as error:  # the event loop sees it, too, and says CLOSED
                raise TransportError(self._name, f"the connection is closed ({error.strerror or error})") from error
            if sent < num_bytes:
                backlog.extend(memoryview(piece) for piece in pieces)
                _skip(backlog, sent)
                self._loop.call_soon_threadsafe(self._wait_writable)

    def _wait_writable(self) -> None:
        if self._is_open:
            self._loop.add_writer(self._sock, self._writable)

    def _writable(self) -> None:
        with self._posting:
            backlog = self._backlog
            try:
                while backlog:
                    _skip(
                        backlog, self._sock.sendmsg([backlog[index] for index in range(min(len(backlog), MAX_PIECES))])
                    )
            except BlockingIOError:
                return
            except OSError:  # reading says why
                backlog.clear()
            self._loop.remove_writer(self._sock)

    # -- in ----------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Frames land from now on."""
        if self._is_open:
            self._loop.add_reader(self._sock, self._readable)
            self._loop.call_soon(self._readable)  # some may have come with the greeting already

    def _readable(self) -> None:
        try:
            for _ in range(READS_PER_TURN):
                if not self._is_open or not self._read():
                    return
            self._loop.call_soon(self._readable)  # what was taken from the socket already wakes nobody
        except BlockingIOError:
            return
        except OSError as error:
            self._end(f"the connection broke: {error.strerror or error}")

    def _read(self) -> bool:
        """One read; whether there may be more."""
        if self._landing.generation(self.seat) != self._generation:
            self._end("its seat was revoked")
            return False
        rest, heads = self._rest, self._heads
        if rest:
            num_read: int = self._sock.recvmsg_into((*rest, heads))[0]
            num_rest = sum(map(len, rest))
            wanted = num_rest + HEADS_BYTES
        else:
            num_heads = self._num_heads
            num_read = self._sock.recv_into(heads[num_heads:] if num_heads else heads)
            wanted = HEADS_BYTES - num_heads
        if not num_read:
            is_between = not rest and not self._num_heads
            self._end("its process is gone or closed the connection" + ("" if is_between else ", in mid-frame"))
            return False
        if not rest:
            self._take(self._num_heads + num_read)
        elif num_read < num_rest:
            self._rest = _after(rest, num_read)
        else:
            self._rest = []
            self._deliver.now(self, IMMEDIATE, self._immediate)
            self._take(num_read - num_rest)
        return num_read == wanted

    def _take(self, num_bytes: int) -> None:
        """So many bytes lie in `_heads`, the first of a head at its beginning."""
        heads, at, layout = self._heads, 0, self._in_layout
        while num_bytes - at >= FRAME_BYTES and self._is_open:
            magic, immediate, lane, header_bytes, num_rows = unpack_frame(heads, at)
            at += FRAME_BYTES
            if magic != FRAME_MAGIC:
                self._refuse("not a frame")
                return
            if header_bytes or num_rows:
                if (
                    lane >= layout.num_lanes
                    or num_rows > layout.slot_rows
                    or not HEADER_BYTES <= header_bytes <= HEADER_BYTES + NOTE_BYTES
                ):
                    self._refuse("out of bounds")
                    return
                rows_bytes = num_rows * layout.row_bytes
                end = at + header_bytes + rows_bytes
                if end > num_bytes:  # the rest goes straight to where it belongs
                    where = [self._in_headers[lane][:header_bytes], self._in_slots[lane][:rows_bytes]]
                    _scatter(heads[at:num_bytes], where)
                    self._rest, self._immediate = _after(where, num_bytes - at), immediate
                    at = num_bytes
                    break
                self._in_headers[lane][:header_bytes] = heads[at : at + header_bytes]
                if num_rows:
                    self._in_slots[lane][:rows_bytes] = heads[at + header_bytes : end]
                at = end
            self._deliver.landed(self, immediate)
        self._num_heads = num_bytes - at
        if at < num_bytes:
            heads[: self._num_heads] = bytes(heads[at:num_bytes])

    # -- the end -----------------------------------------------------------------------------------------------------

    def _refuse(self, reason: str) -> None:
        self._cut_off(self._name, reason)
        self._end(f"it sent what is {reason}")

    def _end(self, reason: str) -> None:
        if self._is_open:
            self.close()
            self._deliver.now(self, CompletionKind.CLOSED, 0, reason)

    def close(self) -> None:
        """What the socket has taken still arrives; what waited for it does not."""
        with self._posting:
            was_open, self._is_open = self._is_open, False
            self._backlog.clear()
        if was_open:
            self._loop.remove_reader(self._sock)
            self._loop.remove_writer(self._sock)
            self._sock.close()
            self._deliver.num_connections -= 1
            self._forget(self)


def _after(pieces: list[memoryview], num_bytes: int) -> list[memoryview]:
    """What is left of them behind so many bytes."""
    left = deque(pieces)
    _skip(left, num_bytes)
    return list(left)


def _scatter(source: memoryview, pieces: list[memoryview]) -> None:
    """Copies all of `source` into the pieces, one after the other."""
    for piece in pieces:
        here = min(len(piece), len(source))
        piece[:here] = source[:here]
        source = source[here:]


def _skip(pieces: deque[memoryview], num_bytes: int) -> None:
    """Takes so many bytes off the front."""
    while num_bytes:
        first = pieces[0]
        if num_bytes < len(first):
            pieces[0] = first[num_bytes:]
            return
        num_bytes -= len(first)
        pieces.popleft()
