"""The combining end of a link: rows in from every node of the other side, combined rows back to each.

Seats are given to peers as they come. What lands is checked against its header and turned into events for whoever
batches rows; stale and foreign immediates are dropped and counted. Rows are read from `landing` and answers written
where the seats' rows leave by whoever computes.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

from msi.errors import ProtocolError, TransportError
from msi.net.link_hello import LINK_CODEC, LinkHello, LinkWelcome, decode_hello
from msi.net.regions import HOST_MEMORY, Allocator, Region
from msi.net.slots import (
    HEADER,
    HEADER_BYTES,
    INCARNATION_MASK,
    MAGIC,
    NOTE_BYTES,
    SEQ_MASK,
    Kind,
    pack_immediate,
)
from msi.net.transport import Admission, CompletionKind, Endpoint, Transport

log = logging.getLogger(__name__)


class Listener(Protocol):
    """Who batches rows. Called on the event loop; must not raise."""

    def joined(self, seat: int, node: int, out_rows: Region) -> None:
        """A peer, `node` among its kind, has taken a seat; answers to it go into `out_rows`."""

    def left(self, seat: int) -> None:
        """A peer is gone; its seat may be given away."""

    def landed(self, seat: int, lane: int, seq: int, num_rows: int, more: bool) -> None:
        """Rows, or (num_rows 0) the word that there are none."""


@dataclass(slots=True)
class _Seat:
    hello: LinkHello
    payload: bytes  # the hello as it came
    seqs: list[int]  # last landed, per lane
    landed_at: list[float]
    endpoint: Endpoint | None = None  # None between the admission and the connection


@dataclass
class CombineCounters:
    """Counts since start; `dropped` by the reason why an immediate was not used."""

    immediates: int = 0
    rows: int = 0
    answers: int = 0
    dropped: Counter[str] = field(default_factory=Counter)


class CombineLink:
    """All endpoints of one combining node.

    Args:
        expected: the hello that every peer must send, names and numbers of the peer aside.
        worker_id, incarnation: who we are.
        num_seats: the most peers at a time.
        max_skip: how far a peer's sequence number may jump when it gives up a pass.
        allocator: of the memory that rows land in and leave from.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        expected: LinkHello,
        worker_id: str,
        incarnation: int,
        num_seats: int,
        max_skip: int,
        allocator: Allocator = HOST_MEMORY,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        assert max_skip <= SEQ_MASK, f"a jump of {max_skip} does not fit the immediate's {SEQ_MASK}"
        self.layout = expected.dispatch_layout
        self.answer_layout = expected.combine_layout
        self.landing = transport.register(num_seats, self.layout, allocator)
        self.counters = CombineCounters()
        self._transport = transport
        self._expected = expected
        self._worker_id = worker_id
        self._incarnation = incarnation
        self._seats: list[_Seat | None] = [None] * num_seats
        self._seat_of: dict[Endpoint, int] = {}
        self._placement_versions = {expected.placement_version}  # whose rows are taken
        self._incarnations: dict[str, int] = {}  # the latest of each worker id
        self._max_skip = max_skip
        self._clock = clock
        self._listener: Listener | None = None

    @property
    def peers(self) -> dict[int, str]:
        """Worker ids by seat."""
        return {index: seat.hello.worker_id for index, seat in enumerate(self._seats) if seat is not None}

    # -- seats -------------------------------------------------------------------------------------------------------

    async def listen(self, listener: Listener) -> str:
        """Takes peers from now on and tells `listener` of them and their rows; the address to give to peers."""
        self._listener = listener
        self._transport.deliver(self._completed)
        return await self._transport.listen(self._accept)

    def _accept(self, payload: bytes) -> Admission:
        hello = decode_hello(payload, self._expected, self._placement_versions)
        latest = self._incarnations.get(hello.worker_id, -1)
        if hello.incarnation < latest:
            raise ProtocolError(
                f"{hello.worker_id} comes as incarnation {hello.incarnation}; {latest} was here already"
            )
        for index, seat in enumerate(self._seats):
            if seat is not None and seat.hello.worker_id == hello.worker_id:
                self.fence(index)
        free = next((index for index, seat in enumerate(self._seats) if seat is None), None)
        if free is None:
            raise ProtocolError(f"all {len(self._seats)} seats of {self._worker_id} are taken")
        self._incarnations[hello.worker_id] = hello.incarnation
        lanes = range(hello.num_lanes)
        self._seats[free] = _Seat(hello, payload, [seq - 1 for seq in hello.next_seqs], [0.0 for _ in lanes])
        welcome = LinkWelcome(worker_id=self._worker_id, incarnation=self._incarnation, seat=free)
        return Admission(self.landing, free, LINK_CODEC.encode(welcome))

    def fence(self, seat_index: int) -> None:
        """Shuts a peer out: connection closed, seat revoked, the listener told. Idempotent."""
        seat = self._seats[seat_index]
        if seat is None:
            return
        self._seats[seat_index] = None
        self.landing.revoke(seat_index)
        if seat.endpoint is not None:
            del self._seat_of[seat.endpoint]
            seat.endpoint.close()
            assert self._listener is not None
            self._listener.left(seat_index)

    def use_placement(self, version: int) -> None:
        """Rows of this placement are taken from now on, and of those before it: local ids mean the same under all."""
        self._expected = replace(self._expected, placement_version=version)
        self._placement_versions.add(version)

    # -- rows --------------------------------------------------------------------------------------------------------

    def _completed(self, endpoint: Endpoint, kind: CompletionKind, immediate: int, reason: str) -> None:
        seat_index = self._seat_of.get(endpoint)
        if kind is CompletionKind.IMMEDIATE:
            if seat_index is None:
                self.counters.dropped["closed endpoint"] += 1
            else:
                self._landed(seat_index, immediate)
        elif kind is CompletionKind.CONNECTED:
            admitted = self._seats[endpoint.seat]
            if admitted is None or admitted.payload != endpoint.peer:
                endpoint.close()  # fenced between its admission and now
                return
            self._seat_of[endpoint] = endpoint.seat
            admitted.endpoint = endpoint
            assert self._listener is not None
            self._listener.joined(endpoint.seat, admitted.hello.node, endpoint.out_rows)
        elif seat_index is not None:
            log.info("%s left: %s", self.peers[seat_index], reason)
            self.fence(seat_index)

    def answer(self, seat_index: int, lane: int, seq: int, num_rows: int, compute_s: float) -> None:
        """Posts the seat's rows, which lie where they leave. From any thread; does nothing when the peer is gone."""
        self._post(seat_index, Kind.COMBINE, lane, seq, num_rows, 0, compute_s)

    def refuse(self, seat_index: int, lane: int, seq: int, reason: str) -> None:
        """Tells the peer that no answer will come, and why. From any thread; does nothing when the peer is gone."""
        seat = self._seats[seat_index]
        if seat is None or seat.endpoint is None:
            return
        note = reason.encode(errors="replace")[:NOTE_BYTES]
        seat.endpoint.out_headers[lane][HEADER_BYTES : HEADER_BYTES + len(note)] = note
        self._post(seat_index, Kind.ERROR, lane, seq, 0, len(note), 0.0)

    def _post(
        self, seat_index: int, kind: Kind, lane: int, seq: int, num_rows: int, note_bytes: int, compute_s: float
    ) -> None:
        seat = self._seats[seat_index]
        if seat is None or seat.endpoint is None or seat.seqs[lane] != seq:
            self.counters.dropped["answer to a peer that is gone"] += 1
            return
        service_ns = int((self._clock() - seat.landed_at[lane]) * 1e9)
        HEADER.pack_into(
            seat.endpoint.out_headers[lane], 0, MAGIC, kind, lane, 0, 0, self._incarnation,
            self._expected.placement_version, seq, num_rows or note_bytes, self.answer_layout.row_bytes, service_ns,
            int(compute_s * 1e9),
        )  # fmt: skip
        try:
            immediate = pack_immediate(kind, False, lane, 0, seq, self._incarnation)
            seat.endpoint.post(lane, immediate, num_rows, note_bytes)
            self.counters.answers += 1
        except TransportError as error:  # its CLOSED completion is on the way and frees the seat
            log.debug("answer not sent: %s", error)

    def _landed(self, seat_index: int, immediate: int) -> None:
        self.counters.immediates += 1
        seat = self._seats[seat_index]
        lane = immediate >> 26 & 7
        dropped = self.counters.dropped
        if seat is None or lane >= self.layout.num_lanes:
            dropped["lane"] += 1
            return
        incarnation = seat.hello.incarnation
        if (immediate & INCARNATION_MASK) != incarnation & INCARNATION_MASK:
            dropped["incarnation"] += 1
            return
        ahead = ((immediate >> 12) - seat.seqs[lane]) & SEQ_MASK
        if not 0 < ahead <= self._max_skip:
            dropped["stale"] += 1
            return
        seq = seat.seqs[lane] + ahead
        kind = immediate >> 30
        num_rows = 0
        if kind == Kind.DISPATCH:
            magic, its_kind, its_lane, _, _, its_incarnation, placement_version, its_seq, num_rows, row_bytes, _, _ = (
                HEADER.unpack_from(self.landing.headers[seat_index][lane])
            )
            if (
                magic != MAGIC
                or its_kind != kind
                or its_lane != lane
                or its_seq != seq
                or its_incarnation != incarnation
                or placement_version not in self._placement_versions
            ):
                dropped["header"] += 1
                return
            if not 0 < num_rows <= self.layout.slot_rows or row_bytes != self.layout.row_bytes:
                dropped["rows"] += 1
                return
        elif kind != Kind.EMPTY:
            dropped["kind"] += 1
            return
        seat.seqs[lane] = seq
        seat.landed_at[lane] = self._clock()
        self.counters.rows += num_rows
        assert self._listener is not None
        self._listener.landed(seat_index, lane, seq, num_rows, bool(immediate >> 29 & 1))
