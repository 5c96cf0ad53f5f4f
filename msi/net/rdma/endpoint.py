"""One end of an RDMA connection: posts in order, no more on their way than the card and the network can take.

Of every few work requests one asks for a completion, which tells that it and all before it are acknowledged. While too
many work requests or bytes are on their way, posts wait here and leave, in order, when completions come: what they say
lies in the outbox, which stays as it is until an answer has landed. Nothing is allocated for a post that need not wait.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from msi.errors import TransportError
from msi.net.rdma.landing import RdmaLanding, RdmaOutbox, lane_spans
from msi.net.rdma.verbs import Lane, QueuePair, Span
from msi.net.slots import HEADER_BYTES, SlotLayout
from msi.net.transport import Endpoint

NUM_SENDS = 128  # work requests of a queue pair
SIGNAL_EVERY = 16  # work requests
SIGNAL_SHARE = 4  # of the bytes that may be on their way: so many ask for a completion, too
MAX_WAITING = 8192  # posts


class RdmaEndpoint:
    """Used from the event loop, but for `post`.

    Args:
        name: of the peer, for sentences.
        peer: what it said.
        sends, receives: our queue pairs; the peer writes through the latter.
        is_ready: whether the peer takes what we post already.
        leave: called once, on the event loop, when we close the connection.
    """

    __slots__ = (
        "_acquire", "_bytes_out", "_generation", "_groups", "_has_seat", "_is_clear", "_is_open", "_landing", "_lanes",
        "_leave", "_max_bytes", "_num_grouped", "_num_out", "_num_silent", "_num_single", "_out_layout", "_outbox",
        "_posting", "_posts", "_release", "_row_bytes", "_rows_silent", "_signal_bytes", "_signal_rows", "_waiting",
        "came_at", "control", "is_ready", "name", "num_received", "out_headers", "out_rows", "peer", "receives", "seat",
        "sends", "way",
    )  # fmt: skip

    def __init__(
        self,
        *,
        name: str,
        peer: bytes,
        landing: RdmaLanding,
        seat: int,
        outbox: RdmaOutbox,
        out_layout: SlotLayout,
        sends: QueuePair,
        receives: QueuePair,
        max_bytes: int,
        is_ready: bool,
        leave: Callable[[RdmaEndpoint], None],
    ) -> None:
        self.name = name
        self.peer = peer
        self.seat = seat
        self.way = "RDMA"
        self.came_at = 0.0
        self._landing = landing
        self._generation = landing.generation(seat)
        self._has_seat = True
        self.sends = sends
        self.receives = receives
        self.out_headers = outbox.headers
        self.out_rows = outbox.rows
        self.num_received = 0  # immediates
        self.control: Endpoint | None = None
        self.is_ready = is_ready
        self._leave = leave
        self._outbox = outbox
        self._out_layout = out_layout
        self._lanes: tuple[Lane, ...] = ()
        self._posts: tuple[Callable[[int, int], None], ...] = ()  # of these
        self._row_bytes = out_layout.row_bytes
        self._max_bytes = max_bytes
        self._signal_bytes = max_bytes // SIGNAL_SHARE
        self._signal_rows = -(-self._signal_bytes // self._row_bytes)
        self._posting = threading.Lock()  # held while posting, and while the connection ends
        self._acquire, self._release = self._posting.acquire, self._posting.release  # `with` costs twice as much
        self._is_open = True
        self._waiting: deque[tuple[int, int, int, int]] = deque()  # posts
        # work requests and rows of the group that is being posted, the last of which asks for a completion:
        self._num_silent = self._rows_silent = 0
        self._groups: deque[tuple[int, int]] = deque()  # of those that wait for theirs: work requests and bytes
        self._num_out = self._bytes_out = 0  # of these together
        self._num_grouped = self._num_single = 0  # work requests of all groups; posts of a single one
        self._is_clear = is_ready  # open, and nothing waits or has to

    def aim(self, headers: Span, rows: Span) -> None:
        """Where posts go: to the seat that the peer gave us."""
        layout = self._out_layout
        from_headers, from_rows = self._outbox.registered.local()
        self._lanes = tuple(
            self.sends.lane(
                *lane_spans(from_headers, from_rows, lane, layout.slot_bytes),
                *lane_spans(headers, rows, lane, layout.slot_bytes),
                layout.row_bytes,
                layout.slot_rows,
            )
            for lane in range(layout.num_lanes)
        )
        self._posts = tuple(lane.post for lane in self._lanes)

    @property
    def is_open(self) -> bool:
        return self._is_open

    @property
    def num_posted(self) -> int:
        """Posts that the card was given; all but the single ones are two work requests."""
        return (self._num_grouped + self._num_silent + self._num_single) // 2

    # -- out ---------------------------------------------------------------------------------------------------------

    def post(self, lane: int, immediate: int, num_rows: int = 0, note_bytes: int = 0) -> None:
        self._acquire()
        try:
            if not self._is_clear:
                self._wait(lane, immediate, num_rows, note_bytes)
            elif (
                num_rows
                and not note_bytes
                and self._num_silent < SIGNAL_EVERY - 2
                and (rows_silent := self._rows_silent + num_rows) < self._signal_rows
            ):  # nearly always, and `_send` in short
                self._num_silent += 2
                self._rows_silent = rows_silent
                self._posts[lane](immediate, num_rows)
            else:
                self._send(lane, immediate, num_rows, note_bytes)
        except OSError as error:  # its completions say why
            raise TransportError(self.name, f"the connection is closed ({error.strerror or error})") from error
        finally:
            self._release()

    def _send(self, lane: int, immediate: int, num_rows: int, note_bytes: int) -> None:
        num_silent = self._num_silent + (2 if num_rows else 1)
        if not num_rows:
            self._num_single += 1
        rows_silent = self._rows_silent + num_rows
        is_last = num_silent >= SIGNAL_EVERY or rows_silent >= self._signal_rows
        if is_last:
            num_bytes = rows_silent * self._row_bytes
            self._groups.append((num_silent, num_bytes))
            self._num_grouped += num_silent
            self._num_out += num_silent
            self._bytes_out += num_bytes
            num_silent = rows_silent = 0
            self._is_clear = not self._waiting and self._has_room()
        self._num_silent, self._rows_silent = num_silent, rows_silent
        if note_bytes:
            self._lanes[lane].post_note(immediate, num_rows, HEADER_BYTES + note_bytes, is_last)
        elif not num_rows:
            self.sends.word(immediate, is_last)
        elif is_last:
            self._lanes[lane].post_signalled(immediate, num_rows)
        else:
            self._posts[lane](immediate, num_rows)

    def _has_room(self) -> bool:
        """For another group, whose last post may have any size."""
        return self._num_out + SIGNAL_EVERY < NUM_SENDS and self._bytes_out + self._signal_bytes <= self._max_bytes

    def _wait(self, lane: int, immediate: int, num_rows: int, note_bytes: int) -> None:
        if not self._is_open:
            raise TransportError(self.name, "the connection is closed")
        if len(self._waiting) >= MAX_WAITING:
            raise TransportError(self.name, f"is {MAX_WAITING} posts behind")
        self._waiting.append((lane, immediate, num_rows, note_bytes))

    def knock(self, immediate: int) -> None:
        """A word that asks for a completion, before anything else is posted. Raises OSError."""
        with self._posting:
            self._num_single += 1
            self._num_grouped += 1
            self._num_out += 1
            self._groups.append((1, 0))
            self.sends.word(immediate, True)

    def completed(self) -> None:
        """A completion came: there may be room for what waits. Raises OSError."""
        with self._posting:
            num_requests, num_bytes = self._groups.popleft()
            self._num_out -= num_requests
            self._bytes_out -= num_bytes
            if not self._is_clear:
                self._send_waiting()

    def become_ready(self) -> None:
        """The peer takes what we post from now on. Raises OSError."""
        with self._posting:
            self.is_ready = True
            self._send_waiting()

    def _send_waiting(self) -> None:
        while self._is_open and self.is_ready and self._has_room():
            if not self._waiting:
                self._is_clear = True
                return
            self._send(*self._waiting.popleft())

    # -- the end -----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """What the card was given still arrives; what waited for it does not."""
        if self.shut():
            self._leave(self)

    def shut(self) -> bool:
        """No more posts; whether it was open."""
        with self._posting:
            was_open, self._is_open = self._is_open, False
            self._is_clear = False
            self._waiting.clear()
        self._shut_seat()
        return was_open

    def _shut_seat(self) -> None:
        """Nothing of the peer's arrives any more."""
        has_seat, self._has_seat = self._has_seat, False
        if has_seat:
            self.receives.close()
            if self._landing.generation(self.seat) == self._generation:
                self._landing.shut(self.seat)

    def release(self) -> None:
        """Gives back what the card keeps of us. Idempotent."""
        self.shut()
        with self._posting:  # a post in another thread is over
            self.sends.close()
            self._outbox.registered.close()
