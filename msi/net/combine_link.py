"""The combining end of a link: rows in from every node of the other side, combined rows back to each.

Seats are given to peers as they come. What lands is checked against its header and turned into events for whoever
batches rows; stale and foreign immediates are dropped and counted. Rows are read from `landing` and answers written
where the seats' rows leave by whoever computes.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from msi.errors import ProtocolError, TransportError
from msi.net.combine_seats import NO_SLOT, Listener, Seat, Slot
from msi.net.link_hello import LINK_CODEC, LinkHello, LinkWelcome, decode_hello
from msi.net.regions import HOST_MEMORY, Allocator
from msi.net.slots import (
    HEADER,
    HEADER_ATTEMPT_AT,
    HEADER_BYTES,
    INCARNATION_MASK,
    KIND_WORD_FIXED,
    LANE_SHIFT,
    MAGIC,
    MAX_LANES,
    NOTE_BYTES,
    OPENING,
    ROWS,
    SEQ_MASK,
    SEQ_SHIFT,
    SEQ_STEP,
    WORDS,
    Kind,
    kind_word,
    life_word,
    opening_bytes,
    pack_immediate,
    split_life_word,
)
from msi.net.transport import Admission, CompletionKind, Endpoint, Landed, Transport

log = logging.getLogger(__name__)

IMMEDIATE = CompletionKind.IMMEDIATE  # looked up once for each that lands, it would cost as much as its header
ROWS_OF = ROWS.unpack_from
GONE = "answer to a peer that is gone"


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

    Attributes:
        lock: held while what landed is looked at and the listener told of it, and while a seat is left.
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
        self._seats: list[Seat | None] = [None] * num_seats
        self._slots: list[list[Slot | None]] = [[None] * num_seats for _ in range(expected.num_lanes)]
        self._seat_of: dict[Endpoint, Seat] = {}
        self._placement_versions = {expected.placement_version}  # whose rows are taken
        self._incarnations: dict[str, int] = {}  # the latest of each worker id
        self._max_skip = max_skip
        self._clock = clock
        self.lock = threading.Lock()
        self._acquire, self._release = self.lock.acquire, self.lock.release  # `with` costs twice as much
        self._listener: Listener | None = None
        self._all_landed = _nobody_listens
        lanes = range(expected.num_lanes)
        self._answer_openings = self._openings_of(expected.placement_version)
        self._row_bytes, self._slot_rows = self.layout.row_bytes, self.layout.slot_rows
        self._answer_bases = [pack_immediate(Kind.COMBINE, False, lane, 0, 0, incarnation) for lane in lanes]

    @property
    def peers(self) -> dict[int, str]:
        """Worker ids by seat."""
        return {index: seat.hello.worker_id for index, seat in enumerate(self._seats) if seat is not None}

    # -- seats -------------------------------------------------------------------------------------------------------

    async def listen(self, listener: Listener) -> str:
        """Takes peers from now on and tells `listener` of them and their rows; the address to give to peers."""
        self._listener = listener
        self._all_landed = listener.all_landed
        self._transport.deliver(self._completed, self._landed)
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
        self._seats[free] = Seat(free, hello, payload)
        welcome = LinkWelcome(worker_id=self._worker_id, incarnation=self._incarnation, seat=free)
        return Admission(self.landing, free, LINK_CODEC.encode(welcome))

    def fence(self, seat_index: int) -> None:
        """Shuts a peer out: connection closed, seat revoked, the listener told. Idempotent."""
        seat = self._seats[seat_index]
        if seat is None:
            return
        with self.lock:
            self._seats[seat_index] = None
            for slots in self._slots:
                slots[seat_index] = None
            self.landing.revoke(seat_index)
            if seat.endpoint is None:
                return
            del self._seat_of[seat.endpoint]
        seat.endpoint.close()
        assert self._listener is not None
        self._listener.left(seat_index)

    def use_placement(self, version: int, former: int | None = None) -> None:
        """Rows of this placement are taken from now on, and of one before it: local ids mean the same under both."""
        self._expected = replace(self._expected, placement_version=version)
        self._answer_openings = self._openings_of(version)
        self._placement_versions = {version} if former is None else {version, former}

    def _openings_of(self, version: int) -> list[bytes]:
        """What the headers of each lane's answers begin with."""
        life = life_word(self._incarnation, version)
        return [opening_bytes(kind_word(Kind.COMBINE, lane, False), life) for lane in range(self.layout.num_lanes)]

    # -- rows --------------------------------------------------------------------------------------------------------

    def _completed(self, endpoint: Endpoint, kind: CompletionKind, immediate: int, reason: str) -> None:
        if kind is IMMEDIATE:
            self._landed(((endpoint, immediate, endpoint.came_at),))
        elif kind is CompletionKind.CONNECTED:
            self._connected(endpoint)
        elif (left := self._seat_of.get(endpoint)) is not None:
            log.info("%s left: %s", left.hello.worker_id, reason)
            self.fence(left.index)

    def _landed(self, landed: Sequence[Landed]) -> None:
        """What lies there together: the lock is taken once, and the listener acts once on all of it."""
        now = self._clock()
        self._acquire()
        try:
            if self._take(landed, now):
                self._all_landed()
        finally:
            self._release()

    def _take(self, landed: Sequence[Landed], now: float) -> bool:
        """Immediates that came (now, if they do not say when); whether there is something to do. Needs the lock."""
        counters, seat_of, is_news, num_taken, all_rows = self.counters, self._seat_of.get, False, 0, 0
        full_row_bytes, slot_rows = self._row_bytes, self._slot_rows
        for endpoint, immediate, came_at in landed:
            seat = seat_of(endpoint)
            if seat is None:
                counters.dropped["closed endpoint"] += 1
                continue
            num_taken += 1
            lane = immediate >> LANE_SHIFT & 7
            slot = seat.slots[lane]
            if immediate == slot.immediate + SEQ_STEP:
                # nearly always: the peer's next dispatch, which a few comparisons tell
                opening, seq, num_rows, row_bytes = ROWS_OF(slot.header)
                if (
                    seq == slot.seq + 1
                    and opening == slot.opening
                    and row_bytes == full_row_bytes
                    and 0 < num_rows <= slot_rows
                ):
                    slot.seq, slot.immediate, slot.landed_at = seq, immediate, came_at or now
                    all_rows += num_rows
                    try:
                        if slot.tell(seat.index, seq, num_rows, True, slot.landed_at):
                            is_news = True
                    except Exception as error:
                        self._not_taken(seat, lane, seq, error)
                    continue
            if self._landed_otherwise(seat, lane, immediate, came_at or now):
                is_news = True
        counters.immediates += num_taken
        counters.rows += all_rows
        return is_news

    def _not_taken(self, seat: Seat, lane: int, seq: int, error: Exception) -> None:
        assert self._listener is not None
        self._listener.not_taken(seat.index, lane, seq, error)

    def _connected(self, endpoint: Endpoint) -> None:
        seat = self._seats[endpoint.seat]
        if seat is None or seat.payload != endpoint.peer:
            endpoint.close()  # fenced between its admission and now
            return
        assert self._listener is not None
        slots = []
        life = life_word(seat.hello.incarnation, seat.hello.placement_version)
        for lane, next_seq in enumerate(seat.hello.next_seqs):
            slot = Slot(
                header=self.landing.headers[seat.index][lane],
                out_header=endpoint.out_headers[lane],
                seq=next_seq - 1,
                immediate=_immediate_of(seat, lane, next_seq - 1),
                opening=opening_bytes(kind_word(Kind.DISPATCH, lane, True), life),
                post=endpoint.post,
                tell=self._listener.told(lane),
            )
            slots.append(slot)
            self._slots[lane][seat.index] = slot
        seat.slots = (*slots, *[NO_SLOT] * (MAX_LANES - len(slots)))
        seat.endpoint = endpoint
        self._seat_of[endpoint] = seat
        self._listener.joined(seat.index, seat.hello.node, endpoint.out_rows)

    def _landed_otherwise(self, seat: Seat, lane: int, immediate: int, now: float) -> bool:
        """Whatever it is: checked against the header field by field, and dropped for the first that does not match.

        Whether the listener has something to do now.
        """
        slot = seat.slots[lane]
        if lane >= self.layout.num_lanes:
            reason = "lane"
        elif (immediate ^ seat.hello.incarnation) & INCARNATION_MASK:
            reason = "incarnation"
        elif immediate >> SEQ_SHIFT & SEQ_MASK == slot.seq & SEQ_MASK:
            return self._landed_again(seat, slot, lane, immediate, now)
        elif (ahead := (immediate >> SEQ_SHIFT) - slot.seq & SEQ_MASK) > (
            self._max_skip if slot.landed_at else SEQ_MASK  # its lanes went on while it connected
        ):
            reason = "stale"
        else:
            seq = slot.seq + ahead
            num_rows, reason = self._rows_of(seat, lane, seq, immediate)
            if not reason:
                slot.seq, slot.immediate, slot.landed_at = seq, _immediate_of(seat, lane, seq), now
                self.counters.rows += num_rows
                try:
                    return slot.tell(seat.index, seq, num_rows, bool(immediate >> 29 & 1), now)
                except Exception as error:
                    self._not_taken(seat, lane, seq, error)
                    return False
        self.counters.dropped[reason] += 1
        return False

    def _landed_again(self, seat: Seat, slot: Slot, lane: int, immediate: int, now: float) -> bool:
        """Rows of the sequence number that is here already are taken if their attempt is higher.

        Their sender has the answers to all attempts before: nothing reads the slot.
        """
        seq, attempt = slot.again
        header_attempt = slot.header[HEADER_ATTEMPT_AT]
        if immediate >> 30 != Kind.DISPATCH or header_attempt <= (attempt if seq == slot.seq else 0):
            self.counters.dropped["stale"] += 1
            return False
        num_rows, reason = self._rows_of(seat, lane, slot.seq, immediate)
        if reason:
            self.counters.dropped[reason] += 1
            return False
        slot.again, slot.landed_at = (slot.seq, header_attempt), now
        self.counters.rows += num_rows
        assert self._listener is not None
        return self._listener.landed_again(seat.index, lane, slot.seq, num_rows)

    def _rows_of(self, seat: Seat, lane: int, seq: int, immediate: int) -> tuple[int, str]:
        """How many rows an immediate announces, and why it is not used, or ""."""
        kind = immediate >> 30
        if kind == Kind.EMPTY:
            return 0, ""
        if kind != Kind.DISPATCH:
            return 0, "kind"
        word, life, its_seq, num_rows, row_bytes = OPENING.unpack_from(seat.slots[lane].header)
        incarnation, placement_version = split_life_word(life)
        if (
            (word ^ kind_word(kind, lane, False)) & KIND_WORD_FIXED
            or incarnation != seat.hello.incarnation
            or placement_version not in self._placement_versions
            or its_seq != seq
        ):
            return 0, "header"
        if not 0 < num_rows <= self._slot_rows or row_bytes != self._row_bytes:
            return 0, "rows"
        for lane, slot in enumerate(seat.slots[: self.layout.num_lanes]):  # its passes use this placement now
            slot.opening = opening_bytes(kind_word(Kind.DISPATCH, lane, True), life)
        return num_rows, ""

    def take(self) -> None:
        """Tells the listener of what lies here by now."""
        self._transport.take()

    # -- answers -----------------------------------------------------------------------------------------------------

    def answer(self, lane: int, answers: Iterable[tuple[int, int, int]], compute_s: float) -> None:
        """Posts what lies where the seats' rows leave: (seat, sequence number, number of rows) for each seat.

        From any thread; does nothing for a peer that is gone. What goes wrong with one seat is raised when all others
        have their answers.
        """
        slots, now = self._slots[lane], self._clock()
        opening, base = self._answer_openings[lane], self._answer_bases[lane]
        row_bytes, pack = self.answer_layout.row_bytes, WORDS.pack_into
        num_answers, same_seq, immediate = 0, -1, 0
        failure: Exception | None = None
        for index, seq, num_rows in answers:
            slot = slots[index]
            if slot is None or slot.seq != seq:
                self.counters.dropped[GONE] += 1
                continue
            try:
                service_s = now - slot.landed_at
                pack(slot.out_header, 0, opening, seq, num_rows, row_bytes, service_s, compute_s)
                if seq != same_seq:  # most seats of a wave count alike
                    same_seq, immediate = seq, base | (seq & SEQ_MASK) << SEQ_SHIFT
                slot.post(lane, immediate, num_rows)
                num_answers += 1
            except TransportError as error:  # its CLOSED completion is on the way and frees the seat
                log.debug("answer not sent: %s", error)
            except Exception as error:
                failure = error
        self.counters.answers += num_answers
        if failure is not None:
            raise failure

    def refuse(self, seat_index: int, lane: int, seq: int, reason: str) -> None:
        """Tells the peer that no answer will come, and why. From any thread; does nothing when the peer is gone."""
        seat, slot = self._seats[seat_index], self._slots[lane][seat_index]
        if seat is None or seat.endpoint is None or slot is None or slot.seq != seq:
            self.counters.dropped[GONE] += 1
            return
        note = reason.encode(errors="replace")[:NOTE_BYTES]
        header = slot.out_header
        service_s = self._clock() - slot.landed_at
        HEADER.pack_into(
            header, 0, MAGIC, Kind.ERROR, lane, 0, 0, self._incarnation, self._expected.placement_version, seq,
            len(note), self.answer_layout.row_bytes, service_s, 0.0,
        )  # fmt: skip
        header[HEADER_BYTES : HEADER_BYTES + len(note)] = note
        try:
            seat.endpoint.post(
                lane, pack_immediate(Kind.ERROR, False, lane, 0, seq, self._incarnation), note_bytes=len(note)
            )
            self.counters.answers += 1
        except TransportError as error:
            log.debug("refusal not sent: %s", error)


def _immediate_of(seat: Seat, lane: int, seq: int) -> int:
    """That its rows of this sequence number come with, if more follows."""
    return pack_immediate(Kind.DISPATCH, True, lane, 0, seq, seat.hello.incarnation)


def _nobody_listens() -> None:
    raise AssertionError("rows landed before there was a listener")
