"""The turns of a dispatching end that are away: what was posted of each lane, who owes an answer to it, what comes.

A turn is a row of numbers, written and read with the lock held: by whatever thread posts it, and by whatever thread
takes an answer. Nearly always that is the one that is owed, which a few comparisons tell. The last one opens the gate
that the lane's queue waits at. Queues and transports call these turns directly, as all that a layer takes is here;
what becomes of a lane's pass when an answer will not come, the link decides.
"""

from __future__ import annotations

import asyncio
import math
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from statistics import median
from typing import Protocol

from msi.errors import BatchRefused, TransportError
from msi.meter import SAMPLES_KEPT
from msi.net.dispatch_nodes import DispatchNodes, Node
from msi.net.link_hello import LinkHello
from msi.net.passes import Pass
from msi.net.slots import (
    ANSWER,
    ATTEMPT_MASK,
    ATTEMPT_SHIFT,
    ATTEMPT_WORD_SHIFT,
    HEADER,
    HEADER_BYTES,
    INCARNATION_MASK,
    LANE_SHIFT,
    MAGIC,
    MAX_LANES,
    OPENING,
    SEQ_MASK,
    SEQ_SHIFT,
    TIMES,
    Kind,
    kind_word,
    pack_immediate,
)
from msi.net.transport import Landed

ANSWER_OF, TIMES_OF, TIMES_AT = ANSWER.unpack_from, TIMES.unpack_from, OPENING.size
NO_WORD = 1 << 32  # no immediate
EXCHANGES_APART = 7  # turns of a lane: to keep each would cost 0.5 us an answer (tools/bench_links.py)
Watch = Callable[[str, int, float, float, float], None]  # worker id, lane, posted at, answer came at, residence


@dataclass(slots=True)
class DispatchCounters:
    """Counts since start; `dropped` by the reason why an immediate was not used.

    Attributes:
        packed_again: turns, since a node was lost.
        hedges: turns that were packed again since a node was late.
        hedges_cancelled: that would have been, had it not answered first.
    """

    posts: int = 0
    rows: int = 0
    answers: int = 0
    packed_again: int = 0
    hedges: int = 0
    hedges_cancelled: int = 0
    dropped: Counter[str] = field(default_factory=Counter)


class TurnTimes:
    """Of the last turns whose answers all landed, each as bytes said it; what they say is worked out when asked for.

    Attributes:
        add: takes seconds from a post to the last answer, those of them that its node had the rows, and what of them it
            computed.
    """

    def __init__(self) -> None:
        self._recent: deque[tuple[float, float, float]] = deque(maxlen=SAMPLES_KEPT)
        self.add = self._recent.append

    @property
    def comm_s(self) -> float:
        """T_c: half of a turn that was not the other side's service, in the median; 0.0 before the first."""
        return self._median(lambda away_s, service_s, compute_s: max(0.0, away_s - service_s) / 2)

    @property
    def compute_s(self) -> float:
        """T_e, as the other side measures it, in the median; 0.0 before the first."""
        return self._median(lambda away_s, service_s, compute_s: compute_s)

    def clear(self) -> None:
        self._recent.clear()

    def _median(self, of: Callable[[float, float, float], float]) -> float:
        sound = [
            of(away_s, service_s, compute_s)
            for away_s, service_s, compute_s in tuple(self._recent)
            if 0.0 <= service_s < math.inf and 0.0 <= compute_s < math.inf  # bytes may say anything
        ]
        return median(sound) if sound else 0.0


class Course(Protocol):
    """Who decides what becomes of passes that do not go as they should."""

    def fell_short(self, lane: int, passing: Pass) -> None:
        """Not all rows of a turn could be posted. With the lock held, on whatever thread posts."""

    def failed(self, lane: int, turn: int, error: Exception) -> None:
        """A node has no answer to a turn, or none can follow it. Likewise, where answers are taken."""

    def not_posted(self, node: Node, error: TransportError) -> None:
        """Its connection takes no post. Likewise, where posts are made."""

    def go_on(self, lane: int, passing: Pass) -> None:
        """All answers to a turn are here but those of lost nodes. On the event loop, as is `wipe`."""

    def wipe(self) -> None:
        """Nodes that were lost have answers here, which somebody may have read by now."""


class Turns:
    """Of all lanes.

    Args:
        hello: who we are; its `next_seqs` are those that lanes begin with.
        clock: seconds, monotonic.
        watch: told of each exchange as it ends, on whatever thread took the answer.

    Attributes:
        lock: held while a turn is posted or an answer taken, and while nodes come and go.
        passes: of each lane, the one in flight.
        more: of each lane, whether it goes on after its turn.
        seqs: of each lane, the last that any node may have seen.
        waiting: of each lane, a bit per node that owes an answer.
    """

    def __init__(
        self,
        hello: LinkHello,
        nodes: DispatchNodes,
        course: Course,
        *,
        clock: Callable[[], float],
        watch: Watch | None,
    ) -> None:
        self.counters = DispatchCounters()
        self.times = TurnTimes()
        self.lock = threading.Lock()
        self._acquire, self._release = self.lock.acquire, self.lock.release  # `with` costs twice as much
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()  # of the event loop
        self.exchange_watch = watch
        self.passes: list[Pass | None] = [None] * hello.num_lanes
        self.more = [True] * hello.num_lanes
        self.seqs = [seq - 1 for seq in hello.next_seqs]
        self.waiting = [0] * hello.num_lanes
        self._posted_at = [0.0] * hello.num_lanes
        self._awaited = [NO_WORD] * MAX_LANES  # the immediate of its answers, but for their senders' lives
        self._counts: list[list[int]] = [[]] * hello.num_lanes  # rows to each node
        self.nodes, self._node_of = nodes, nodes.of.get
        self._course = course
        self._clock = clock
        self._row_bytes_word = hello.dispatch_layout.row_bytes << 32
        self._words = [
            [
                (
                    kind_word(Kind.DISPATCH, lane, more),
                    pack_immediate(Kind.DISPATCH, more, lane, 0, 0, hello.incarnation),
                    pack_immediate(Kind.EMPTY, more, lane, 0, 0, hello.incarnation),
                )
                for lane in range(hello.num_lanes)
            ]
            for more in (False, True)
        ]  # a header's first word and both immediates, of sequence number 0

    # -- posts -------------------------------------------------------------------------------------------------------

    def packed(self, lane: int, turn: int) -> None:
        """The rows of a turn lie where they leave: one post to every node; the turn then waits for those that got rows.

        From any thread; does not raise. Does nothing for a pass that was given up while its rows were computed.
        """
        passing = self.passes[lane]
        if passing is not None and passing.first <= turn <= passing.last:
            self._acquire()
            try:
                if not passing.is_over:
                    self._post(lane, passing, turn)
            finally:
                self._release()
            if self.nodes.is_leaving:
                self._loop.call_soon_threadsafe(self._course.wipe)

    def packed_again(self, lane: int, turn: int) -> None:
        """The same for a turn whose gates' `pack_again` was called."""
        passing = self.passes[lane]
        if passing is not None and passing.turn == turn:
            self.packed(lane, turn)

    def _post(self, lane: int, passing: Pass, turn: int) -> None:
        """One that is packed again goes to those that get rows; all others have seen it."""
        attempt = passing.attempt
        seq = passing.seq_of_turn_0 + turn
        low_seq = (seq & SEQ_MASK) << SEQ_SHIFT
        word, full, empty = self._words[self.more[lane]][lane]
        full |= low_seq
        empty |= low_seq
        if attempt:
            word |= attempt << ATTEMPT_WORD_SHIFT
            full |= (attempt & ATTEMPT_MASK) << ATTEMPT_SHIFT
        life = passing.life_word
        passing.turn, passing.is_reading = turn, False
        self.seqs[lane] = seq
        self._posted_at[lane] = passing.since = self._clock()
        self._awaited[lane] = lane << LANE_SHIFT | low_seq
        self._counts[lane] = counts = passing.counts.tolist()
        if passing.num_counted < len(counts):
            counts[passing.num_counted :] = [0] * (len(counts) - passing.num_counted)
        if (word, life) != passing.opened:  # nearly always they are as in the turn before
            passing.open(lane, word, life)
        waiting = 0
        row_bytes = self._row_bytes_word
        for node, index, bit, header, post in passing.ways:  # what is done here is done for each: see `Pass.sent`
            try:
                if count := counts[index]:
                    header[2] = seq
                    header[3] = row_bytes | count
                    post(lane, full, count)
                    waiting |= bit
                elif not attempt:
                    post(lane, empty)
            except TransportError as error:
                self._course.not_posted(node, error)
        passing.sent.append(counts)
        num_full = waiting.bit_count()
        is_short = num_full + counts.count(0) != len(counts)  # what could not be posted are rows to nodes that are lost
        self.counters.posts += num_full if attempt else len(passing.ways)
        self.waiting[lane] = waiting
        if is_short:
            self._course.fell_short(lane, passing)
        if not waiting and not passing.is_over:
            self._loop.call_soon_threadsafe(self._landed, lane, passing, passing.since)

    def sent(self, passing: Pass) -> None:
        """A pass is through, or given up: its rows are counted."""
        self.counters.rows += passing.count_rows()

    # -- lost nodes --------------------------------------------------------------------------------------------------

    def lose(self, node: Node) -> list[tuple[int, Pass]]:
        """Passes fall short whose turn has rows for it, answered or not; returned are those that nothing is owed to."""
        short = []
        for lane, passing in enumerate(self.passes):
            waiting = self.waiting[lane]
            if passing is not None and waiting and node in passing.nodes and self._counts[lane][node.index]:
                passing.is_short = True
                self.waiting[lane] = waiting = waiting & ~node.bit
                if not waiting:
                    short.append((lane, passing))
        return short

    def is_read(self, node: Node) -> bool:
        """Whether somebody reads what it had answered."""
        return any(
            passing is not None and passing.is_reading and self._counts[lane][node.index] and node in passing.nodes
            for lane, passing in enumerate(self.passes)
        )

    # -- answers -----------------------------------------------------------------------------------------------------

    def take(self, landed: Iterable[Landed]) -> None:
        """Immediates that have come, on whatever thread."""
        self._acquire()
        try:
            self._take(landed)
        finally:
            self._release()

    def _take(self, landed: Iterable[Landed]) -> None:
        node_of, awaited, waitings = self._node_of, self._awaited, self.waiting
        seqs, counts, num_answers = self.seqs, self._counts, 0
        notes_all = self.exchange_watch is not None
        for endpoint, immediate, came_at in landed:
            node = node_of(endpoint)
            if node is None:
                self.counters.dropped["closed endpoint"] += 1
                continue
            lane = immediate >> LANE_SHIFT & 7
            if immediate == node.answer | awaited[lane] and (waiting := waitings[lane]) & node.bit:
                # nearly always: an answer that is owed, which a few comparisons tell
                opening, seq, num_rows = ANSWER_OF(node.in_headers[lane])
                if seq == seqs[lane] and opening == node.openings[lane] and num_rows == counts[lane][node.index]:
                    num_answers += 1
                    waitings[lane] = waiting = waiting ^ node.bit
                    if not waiting or not seq % EXCHANGES_APART or notes_all:
                        self._answered(node, lane, waiting, seq, came_at or self._clock())
                    continue
            self._arrived_otherwise(node, lane, immediate)
        self.counters.answers += num_answers

    def _answered(self, node: Node, lane: int, waiting: int, seq: int, now: float) -> None:
        """An answer that is noted, or the last one."""
        service_s, compute_s = TIMES_OF(node.in_headers[lane], TIMES_AT)
        if not seq % EXCHANGES_APART or self.exchange_watch is not None:
            self._exchanged(node, lane, now, service_s)
        if not waiting:
            self.times.add((now - self._posted_at[lane], service_s, compute_s))
            passing = self.passes[lane]
            assert passing is not None, f"lane {lane} has no pass, and answers were owed to it"
            self._landed(lane, passing, now)

    def _landed(self, lane: int, passing: Pass, now: float) -> None:
        """All answers to the turn that is away are here. On whatever thread took the last."""
        turn = passing.turn
        if passing.is_over:
            return
        if passing.is_short:
            self._loop.call_soon_threadsafe(self._course.go_on, lane, passing)
            return
        if turn + 1 == passing.last:
            try:
                self.more[lane] = passing.may_continue(lane)
            except Exception as error:
                self._course.failed(lane, turn, error)
                return
        passing.since = now
        passing.attempt, passing.is_reading = 0, True
        passing.gates.open(lane, turn)
        if turn == passing.last:
            if threading.get_ident() == self._thread:
                _wake(passing.done)
            else:
                self._loop.call_soon_threadsafe(_wake, passing.done)

    def _exchanged(self, node: Node, lane: int, now: float, service_s: float) -> None:
        posted_at = self._posted_at[lane]
        node.exchanges.append((now - posted_at, service_s))
        if (watch := self.exchange_watch) is not None:  # which another thread may take away
            watch(node.welcome.worker_id, lane, posted_at, now, service_s)

    def _arrived_otherwise(self, node: Node, lane: int, immediate: int) -> None:
        """Not the answer: a refusal, or dropped for the first field that does not match."""
        dropped, incarnation = self.counters.dropped, node.welcome.incarnation
        if lane >= len(self.passes):
            dropped["lane"] += 1
            return
        passing, expected = self.passes[lane], self.seqs[lane]
        is_stale = not self.waiting[lane] & node.bit or (immediate >> SEQ_SHIFT ^ expected) & SEQ_MASK
        if passing is None or is_stale:
            dropped["stale"] += 1
            return
        header = node.in_headers[lane]
        magic, kind, its_lane, _, _, its_incarnation, _, seq, num_rows, *_ = HEADER.unpack_from(header)
        if (immediate ^ incarnation) & INCARNATION_MASK:
            dropped["incarnation"] += 1
        elif (magic, kind, its_lane) != (MAGIC, immediate >> 30, lane) or (seq, its_incarnation) != (
            expected,
            incarnation,
        ):
            dropped["header"] += 1
        elif kind == Kind.ERROR:
            reason = bytes(header[HEADER_BYTES : HEADER_BYTES + num_rows]).decode(errors="replace")
            self._course.failed(lane, passing.turn, BatchRefused(node.welcome.worker_id, reason))
        else:
            dropped["rows"] += 1


def _wake(done: asyncio.Future[None]) -> None:
    """Whoever awaits the end of a pass. On the event loop."""
    if not done.done():
        done.set_result(None)
