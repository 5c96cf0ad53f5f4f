"""The dispatching end of a link: rows out to every node of the other side, combined rows back.

For each turn of a lane every connected node gets exactly one post: rows in its slot, or the bare word that there are
none. A lane has one turn in flight; its slots are free again when the answers have landed, so there are no credits.
A turn is a row of numbers: the last answer opens the gate that the lane's queue waits at, and only the end of the pass
wakes a coroutine. Whatever goes wrong, the gates open, and what is computed behind them is dropped.
A pass keeps to the connections that it was begun with. When a node is lost that owes rows of a turn, the others'
answers are awaited, and then the whole turn is packed again for the nodes that are there, and posted with the same
sequence number and a higher *attempt*; the pass goes on with those. Where what is missing is nowhere else, it is
*held*: until it is somewhere, or for `hold_s`. A lost node's seat is wiped once nobody reads what it had answered.
Rows themselves are written where they leave to the nodes and read from `landing` by whoever computes, on the thread
that computes; that thread posts them, and takes the answers where the transport lets it. Everything else here happens
on the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from msi.errors import BatchRefused, ProtocolError, TransportError
from msi.meter import StageMeter
from msi.net.left_seats import LeftSeats
from msi.net.link_hello import LINK_CODEC, LinkHello, decode_welcome
from msi.net.passes import EXCHANGES_APART, Gates, Node, Pass, Watch
from msi.net.regions import HOST_MEMORY, Allocator, Region
from msi.net.slots import (
    ANSWER,
    ATTEMPT_MASK,
    ATTEMPT_SHIFT,
    ATTEMPT_WORD_SHIFT,
    HEADER,
    HEADER_BYTES,
    INCARNATION_MASK,
    LANE_SHIFT,
    LIFE_MASK,
    MAGIC,
    MAX_LANES,
    OPENING,
    SEQ_MASK,
    SEQ_SHIFT,
    TIMES,
    Kind,
    kind_word,
    life_word,
    pack_immediate,
)
from msi.net.transport import CONNECT_TIMEOUT_S, CompletionKind, Endpoint, Transport

log = logging.getLogger(__name__)

IMMEDIATE = CompletionKind.IMMEDIATE  # looked up once for each that lands, it would cost as much as its header

NO_WORD = 1 << 32  # no immediate
WATCH_SHARE = 16  # of the time-out: how often turns are checked against it
MOST_TURNS_MEANWHILE = SEQ_MASK // 2  # while a node connects: it is to tell the next one by an immediate's low bits
MAX_ATTEMPTS = 255  # what a header holds
ABSENCE_SHARE = 4  # of the time-out: who checks so late has been away, and everybody's time starts anew


@dataclass
class DispatchCounters:
    """Counts since start; `dropped` by the reason why an immediate was not used, `packed_again` counts turns."""

    posts: int = 0
    rows: int = 0
    answers: int = 0
    packed_again: int = 0
    dropped: Counter[str] = field(default_factory=Counter)


class DispatchLink:
    """All endpoints of one dispatching node.

    Args:
        hello: who we are; its `next_seqs` are filled in at each connect.
        num_nodes: nodes of the other side; node i answers into landing seat i.
        allocator: of the memory that rows leave from and answers land in.
        report_loss: called with (node, worker id, reason) when a connected node is lost.
        timeout_s: a turn that has been posted and lacks answers for that long loses the nodes that owe them; one that
            is not packed within that time fails its pass.
        clock: seconds, monotonic.
        watch: told of each exchange as it ends, on whatever thread took the answer.
        missing: what cannot be computed without these nodes, in words; "" where all can.
        hold_s: passes wait so long for what is missing; where 0, they fail as soon as a node is lost.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        hello: LinkHello,
        num_nodes: int,
        report_loss: Callable[[int, str, str], None],
        allocator: Allocator = HOST_MEMORY,
        timeout_s: float = 4.0,
        clock: Callable[[], float] = time.monotonic,
        watch: Watch | None = None,
        missing: Callable[[Sequence[int]], str] = lambda nodes: f"nodes {list(nodes)}" if nodes else "",
        hold_s: float = 0.0,
    ) -> None:
        self.layout = hello.dispatch_layout
        self.answer_layout = hello.combine_layout
        self.landing = transport.register(num_nodes, self.answer_layout, allocator)
        self.counters = DispatchCounters()
        self.comm_meter = StageMeter()  # T_c: half of a turn that was not the other side's service
        self.compute_meter = StageMeter()  # T_e, as the other side measures it
        self._transport = transport
        self._hello = hello
        self._nodes: tuple[Node | None, ...] = (None,) * num_nodes
        self._node_of: dict[Endpoint, Node] = {}
        self._gone: dict[int, tuple[str, str]] = {}  # worker id and reason of the one lost last, by node
        self._left = LeftSeats(self.landing)
        self._missing, self._hold_s = missing, hold_s
        self.placement_version = hello.placement_version  # of hellos, and of passes that begin
        self._passes: list[Pass | None] = [None] * hello.num_lanes
        self._next_turns = [1] * hello.num_lanes
        self._next_seqs = list(hello.next_seqs)
        # a row for each lane's turn that is away:
        self._posted_seqs = [seq - 1 for seq in hello.next_seqs]  # the last that any node may have seen
        self._posted_at = [0.0] * hello.num_lanes
        self._waiting = [0] * hello.num_lanes  # bit per node that owes an answer
        self._awaited = [NO_WORD] * MAX_LANES  # the immediate of its answers, but for their senders' lives
        self._counts: list[list[int]] = [[]] * hello.num_lanes  # rows to each node
        self._more = [True] * hello.num_lanes  # whether the lane goes on after it
        self._complete = asyncio.Event()
        self._report_loss = report_loss
        self._timeout_s = timeout_s
        self._clock = clock
        self.exchange_watch = watch
        self._loop = asyncio.get_running_loop()
        self._is_watching = False
        self._watch_due = 0.0
        self._back_at = -math.inf
        self._turning = threading.Lock()  # held while a turn is posted or an answer taken, and while nodes come and go
        self._acquire, self._release = self._turning.acquire, self._turning.release  # `with` costs twice as much
        self._thread = threading.get_ident()  # of the event loop
        self._incarnation, self._row_bytes = hello.incarnation, self.layout.row_bytes
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
        self._answer_words = [kind_word(Kind.COMBINE, lane, False) for lane in range(hello.num_lanes)]
        transport.deliver(self._completed)

    # -- connections -------------------------------------------------------------------------------------------------

    async def connect(self, node: int, address: str, *, timeout_s: float = CONNECT_TIMEOUT_S) -> Region:
        """Connects a node and returns where rows to it leave. Raises TransportError."""
        assert self._nodes[node] is None, f"node {node} is connected already"
        await self._left.until_wiped(node)
        hello = self._own_hello()
        endpoint = await self._transport.connect(
            address, LINK_CODEC.encode(hello), self.landing, node, timeout_s=timeout_s
        )
        try:
            welcome = decode_welcome(endpoint.peer)
        except ProtocolError as error:
            endpoint.close()
            raise TransportError(address, str(error)) from error
        moved = max(now + 1 - then for now, then in zip(self._posted_seqs, hello.next_seqs, strict=True))
        if moved > MOST_TURNS_MEANWHILE:
            endpoint.close()
            raise TransportError(address, f"took {moved} turns of a lane to connect; it is tried again")
        peer = Node(node, endpoint, welcome, self.landing.headers[node])
        with self._turning:
            self._set(node, peer)
            self._node_of[endpoint] = peer
        self._loop.call_soon(self.look_again)  # the caller has to know first where rows leave
        return endpoint.out_rows

    def _own_hello(self) -> LinkHello:
        return replace(
            self._hello, next_seqs=tuple(seq + 1 for seq in self._posted_seqs), placement_version=self.placement_version
        )

    def drop(self, node: int, reason: str) -> None:
        """Fences a node: its connection is closed, its seat revoked; who waits for it waits no longer. Idempotent."""
        peer = self._nodes[node]
        if peer is None:
            return
        short = []
        with self._turning:
            self._set(node, None)
            self._gone[node] = (peer.welcome.worker_id, reason)
            del self._node_of[peer.endpoint]
            peer.is_lost = True
            self._left.add(peer)
            for lane, passing in enumerate(self._passes):
                waiting = self._waiting[lane]
                if passing is not None and waiting and peer in passing.nodes and self._counts[lane][node]:
                    passing.is_short = True  # whether it has answered or not: the turn is packed again
                    self._waiting[lane] = waiting = waiting & ~peer.bit
                    if not waiting:
                        short.append((lane, passing))
        peer.endpoint.close()
        self._wipe()
        self._report_loss(node, peer.welcome.worker_id, reason)
        self.look_again()
        if not self._hold_s and not self._complete.is_set():
            for lane, passing in enumerate(self._passes):
                if passing is not None:
                    self._fail(lane, passing, TransportError(peer.welcome.worker_id, reason))
        for lane, passing in short:
            self._go_on(lane, passing)

    def _wipe(self) -> None:
        """The seats of lost nodes whose answers nobody reads any more. On the event loop."""
        with self._turning:
            self._left.wipe(self._is_read)

    def _is_read(self, peer: Node) -> bool:
        return any(
            passing is not None and passing.is_reading and self._counts[lane][peer.index] and peer in passing.nodes
            for lane, passing in enumerate(self._passes)
        )

    def look_again(self) -> None:
        """Nodes have come or gone, or `missing` says something else: those that are held may go on."""
        if self._missing(self.missing_nodes):
            self._complete.clear()
            return
        self._complete.set()
        for lane, passing in enumerate(self._passes):
            if passing is not None and passing.held_since is not None:
                self._go_on(lane, passing)

    def _go_on(self, lane: int, passing: Pass) -> None:
        """A turn that lacks answers of lost nodes is packed again, or held until it can be. On the event loop."""
        if passing.is_over or self._passes[lane] is not passing or not passing.is_short:
            return
        if not self._complete.is_set():
            if passing.held_since is None:
                passing.held_since = self._clock()
            if not self._hold_s:
                self._fail(lane, passing, self._held_too_long())
            return
        if passing.attempt == MAX_ATTEMPTS:
            self._fail(lane, passing, self._lost(next(iter(self._gone))))
            return
        with self._turning:
            passing.is_short, passing.held_since, passing.since = False, None, self._clock()
            passing.attempt += 1
            passing.nodes = self._connected
            passing.life_word = life_word(self._incarnation, self.placement_version)
        self.counters.packed_again += 1
        passing.gates.pack_again(lane, passing.turn)

    def _held_too_long(self) -> TransportError:
        """Names the node that was lost, and what is missing since."""
        nodes = self.missing_nodes
        error = self._lost(min(nodes, key=lambda node: node not in self._gone, default=0))
        if not self._hold_s:
            return error
        lacking = f"{self._missing(nodes)} for {self._hold_s:g} s"
        return TransportError(error.peer, f"{error.reason}; {lacking}")

    def _set(self, node: int, peer: Node | None) -> None:
        self._nodes = (*self._nodes[:node], peer, *self._nodes[node + 1 :])

    def _lost(self, node: int) -> TransportError:
        return TransportError(*self._gone.get(node, (f"node {node}", "is not connected")))

    @property
    def _connected(self) -> tuple[Node, ...]:
        return tuple(node for node in self._nodes if node is not None)

    @property
    def num_nodes(self) -> int:
        return len(self._nodes)

    @property
    def missing_nodes(self) -> list[int]:
        return [node for node, peer in enumerate(self._nodes) if peer is None]

    @property
    def exchanges(self) -> dict[str, tuple[tuple[float, float], ...]]:
        """The last ones with each connected node, by worker id: (seconds from post to answer, those it had the rows).

        Each is a difference on one clock; no clocks are compared.
        """
        return {node.welcome.worker_id: tuple(node.exchanges) for node in self._connected}

    @property
    def num_bytes(self) -> dict[str, tuple[int, int]]:
        """Of the rows that each connected node was sent, and of its answers, by worker id."""
        row_bytes, answer_bytes = self.layout.row_bytes, self.answer_layout.row_bytes
        return {
            one.welcome.worker_id: (one.num_rows * row_bytes, one.num_rows * answer_bytes) for one in self._connected
        }

    @property
    def ways(self) -> dict[str, str]:
        """How rows get to each connected node, by worker id."""
        return {node.welcome.worker_id: node.endpoint.way for node in self._connected}

    async def wait_complete(self) -> None:
        """Until nothing is missing. Raises TransportError: not within `hold_s`, where that is more than 0."""
        try:
            async with asyncio.timeout(self._hold_s or None):
                await self._complete.wait()
        except TimeoutError:
            raise self._held_too_long() from None

    # -- the layer loop ----------------------------------------------------------------------------------------------

    def begin(self, lane: int, gates: Gates, may_continue: Callable[[int], bool]) -> int:
        """The next pass of a lane, over the connections and of the placement that are there now; its first turn.

        Turns of a lane are counted from 1, and no number is used twice. Each is posted by `packed`; when its answers
        have landed, its gate opens.

        Args:
            may_continue: asked, with the lane, just before the last turn: whether the nodes may expect more after it.
        """
        assert self._passes[lane] is None, f"lane {lane} has a pass in flight"
        first, num_layers = self._next_turns[lane], gates.num_layers
        more = num_layers > 1 or may_continue(lane)
        passing = Pass(
            gates, self._connected, life_word(self._incarnation, self.placement_version), first, self._next_seqs[lane],
            may_continue, self._clock(),
            self._loop.create_future(),
        )  # fmt: skip
        self._next_turns[lane] = first + num_layers
        self._next_seqs[lane] += num_layers
        self._more[lane] = more
        self._passes[lane] = passing
        return first

    async def passed(self, lane: int) -> None:
        """Until the answers to the last turn of a lane's pass have landed. Cancelled or not, call `end` or `give_up`.

        Raises:
            TransportError: a node was lost that nobody stood in for in time; `peer` names it.
            BatchRefused: a node is there, but has no answer to a turn.
            TimeoutError: a turn was not packed in time.
            Exception: what `failed` was given.
        """
        passing = self._passes[lane]
        assert passing is not None, f"lane {lane} has no pass"
        if not self._is_watching:
            self._is_watching = True
            self._watch_later()
        await passing.done

    def end(self, lane: int) -> None:
        """A pass is through, its last answers read."""
        assert self._passes[lane] is not None, f"lane {lane} has no pass"
        self._passes[lane] = None
        if self._left:
            self._wipe()

    def give_up(self, lane: int) -> None:
        """Ends a pass that failed, wherever it was: its gates open, nothing of it is posted, answers are late.

        The lane goes on at the next multiple of a pass's turns that nobody has been told of, so that passes that fail
        one after the other without a post do not run away from what the nodes have seen. Idempotent.
        """
        passing = self._passes[lane]
        if passing is None:
            return
        num_layers = passing.gates.num_layers
        with self._turning:
            passing.is_over = True
            self._next_seqs[lane] = -(-(self._posted_seqs[lane] + 1) // num_layers) * num_layers
            self._waiting[lane] = 0
            self._passes[lane] = None
        if self._left:
            self._wipe()
        passing.gates.open(lane, passing.last)
        if passing.done.done() and not passing.done.cancelled():
            passing.done.exception()  # whoever gave up has another reason

    def packed(self, lane: int, turn: int) -> None:
        """The rows of a turn lie where they leave: one post to every node; the turn then waits for those that got rows.

        From any thread; does not raise. Does nothing for a pass that was given up while its rows were computed.
        """
        passing = self._passes[lane]
        if passing is not None and passing.first <= turn <= passing.last:
            with self._turning:
                if not passing.is_over:
                    self._post(lane, passing, turn)

    def _post(self, lane: int, passing: Pass, turn: int) -> None:
        """Needs the lock: no answer is taken before all nodes have their post.

        A turn that is packed again goes to those that get rows; all others have seen it.
        """
        nodes, attempt = passing.nodes, passing.attempt
        seq, more, row_bytes, pack = passing.seq_of_turn_0 + turn, self._more[lane], self._row_bytes, OPENING.pack_into
        word, full, empty = self._words[more][lane]
        full, empty = full | (seq & SEQ_MASK) << SEQ_SHIFT, empty | (seq & SEQ_MASK) << SEQ_SHIFT
        if attempt:
            word |= attempt << ATTEMPT_WORD_SHIFT
            full |= (attempt & ATTEMPT_MASK) << ATTEMPT_SHIFT
        life = passing.life_word
        counts = self._open_turn(lane, passing, turn, seq)
        waiting = posted = 0
        for peer in nodes:
            try:
                if count := counts[peer.index]:
                    pack(peer.out_headers[lane], 0, word, life, seq, count, row_bytes)  # its times stay 0
                    peer.post(lane, full, count)
                    peer.num_rows += count
                    posted += count
                    waiting |= peer.bit
                elif not attempt:
                    peer.post(lane, empty)
            except TransportError as error:
                if not peer.is_lost:
                    self._loop.call_soon_threadsafe(self._not_posted, peer, error)
        self.counters.posts += waiting.bit_count() if attempt else len(nodes)
        self._posted(lane, passing, waiting, posted)

    def packed_again(self, lane: int, turn: int) -> None:
        """The same for a turn whose gates' `pack_again` was called."""
        passing = self._passes[lane]
        if passing is not None and passing.turn == turn:
            with self._turning:
                if not passing.is_over:
                    self._post(lane, passing, turn)

    def _open_turn(self, lane: int, passing: Pass, turn: int, seq: int) -> list[int]:
        """A turn is about to be posted; the rows that lie ready for each node."""
        passing.is_reading = False
        if self._left:
            self._loop.call_soon_threadsafe(self._wipe)
        self._posted_seqs[lane] = seq
        self._posted_at[lane] = passing.since = self._clock()
        passing.turn = turn
        self._awaited[lane] = lane << LANE_SHIFT | (seq & SEQ_MASK) << SEQ_SHIFT
        first = lane * len(self._nodes)
        self._counts[lane] = counts = passing.counts[first : first + len(self._nodes)].tolist()
        return counts

    def _posted(self, lane: int, passing: Pass, waiting: int, num_posted: int) -> None:
        """Rows that could not be posted are those of nodes that were lost: they are packed again."""
        self.counters.rows += num_posted
        if num_posted != sum(self._counts[lane]):
            passing.is_short = True
            if not self._hold_s and not self._complete.is_set():
                self.failed(lane, passing.turn, self._held_too_long())
                return
        self._waiting[lane] = waiting
        if not waiting:
            self._loop.call_soon_threadsafe(self._landed, lane, passing, self._posted_at[lane])

    def failed(self, lane: int, turn: int, error: Exception) -> None:
        """The pass that a turn belongs to cannot go on: nothing more of it is posted, its await raises `error`. From
        any thread.
        """
        passing = self._passes[lane]
        if passing is not None and passing.first <= turn <= passing.last:
            passing.is_over = True
            self._loop.call_soon_threadsafe(self._fail, lane, passing, error)

    def _fail(self, lane: int, passing: Pass, error: Exception) -> None:
        """Whatever the reason, the lane's queue must run out: behind a closed gate it would be stuck for ever."""
        passing.is_over = True
        if not passing.done.done():
            passing.done.set_exception(error)
        with self._turning:
            if self._passes[lane] is passing:
                self._waiting[lane] = 0
        passing.gates.open(lane, passing.last)

    def _not_posted(self, peer: Node, error: TransportError) -> None:
        """A connection that takes no post is lost, whether or not the transport has said so."""
        if self._nodes[peer.index] is peer:
            self.drop(peer.index, f"connection lost ({error.reason})")

    def _landed(self, lane: int, passing: Pass, now: float) -> None:
        """All answers to the turn that is away are here. On whatever thread took the last."""
        turn = passing.turn
        if passing.is_over:
            return
        if passing.is_short:
            self._loop.call_soon_threadsafe(self._go_on, lane, passing)
            return
        if turn + 1 == passing.last:
            try:
                self._more[lane] = passing.may_continue(lane)
            except Exception as error:
                self.failed(lane, turn, error)
                return
        passing.since = now
        passing.attempt, passing.is_reading = 0, True
        passing.gates.open(lane, turn)
        if turn == passing.last:
            if threading.get_ident() == self._thread:
                passing.set_done()
            else:
                self._loop.call_soon_threadsafe(passing.set_done)

    def next_seq(self, lane: int) -> int:
        return self._next_seqs[lane]

    # -- answers -----------------------------------------------------------------------------------------------------

    def _completed(self, endpoint: Endpoint, kind: CompletionKind, immediate: int, reason: str) -> None:
        if kind is not IMMEDIATE:
            if (left := self._node_of.get(endpoint)) is None:
                self.counters.dropped["closed endpoint"] += 1
            elif kind is CompletionKind.CLOSED:
                self.drop(left.index, f"connection lost ({reason})")
            return
        self._acquire()
        try:
            node = self._node_of.get(endpoint)
            if node is None:
                self.counters.dropped["closed endpoint"] += 1
                return
            lane = immediate >> LANE_SHIFT & 7
            if immediate == node.answer | self._awaited[lane] and (waiting := self._waiting[lane]) & node.bit:
                # nearly always: an answer that is owed, which a few comparisons tell
                word, life, seq, num_rows = ANSWER.unpack_from(node.in_headers[lane])
                if (
                    word == self._answer_words[lane]
                    and seq == self._posted_seqs[lane]
                    and life & LIFE_MASK == node.welcome.incarnation
                    and num_rows == self._counts[lane][node.index]
                ):
                    self.counters.answers += 1
                    self._waiting[lane] = waiting = waiting & ~node.bit
                    if not waiting or not seq % EXCHANGES_APART or self.exchange_watch is not None:
                        self._answered(node, lane, waiting, seq, endpoint.came_at or self._clock())
                    return
            self._arrived_otherwise(node, lane, immediate)
        finally:
            self._release()

    def _answered(self, node: Node, lane: int, waiting: int, seq: int, now: float) -> None:
        """An answer that is noted, or the last one."""
        service_s, compute_s = TIMES.unpack_from(node.in_headers[lane], OPENING.size)
        if not seq % EXCHANGES_APART or self.exchange_watch is not None:
            self._exchanged(node, lane, now, service_s)
        if not waiting:
            if 0.0 <= service_s < math.inf and 0.0 <= compute_s < math.inf:  # bytes may say anything
                self.comm_meter.add(max(0.0, (now - self._posted_at[lane] - service_s) / 2))
                self.compute_meter.add(compute_s)
            passing = self._passes[lane]
            assert passing is not None, f"lane {lane} has no pass, and answers were owed to it"
            self._landed(lane, passing, now)

    def _exchanged(self, node: Node, lane: int, now: float, service_s: float) -> None:
        posted_at = self._posted_at[lane]
        node.exchanges.append((now - posted_at, service_s))
        if (watch := self.exchange_watch) is not None:  # which another thread may take away
            watch(node.welcome.worker_id, lane, posted_at, now, service_s)

    def _arrived_otherwise(self, node: Node, lane: int, immediate: int) -> None:
        """Not the answer: a refusal, or dropped for the first field that does not match."""
        dropped, incarnation = self.counters.dropped, node.welcome.incarnation
        if lane >= len(self._passes):
            dropped["lane"] += 1
            return
        passing, expected = self._passes[lane], self._posted_seqs[lane]
        is_stale = not self._waiting[lane] & node.bit or (immediate >> SEQ_SHIFT ^ expected) & SEQ_MASK
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
            self.failed(lane, passing.turn, BatchRefused(node.welcome.worker_id, reason))
        else:
            dropped["rows"] += 1

    def _watch_later(self) -> None:
        delay_s = self._timeout_s / WATCH_SHARE
        self._watch_due = self._clock() + delay_s
        self._loop.call_later(delay_s, self._watch)

    def _watch(self) -> None:
        """Ends passes that took too long for a turn; comes again while any is in flight. A timer per turn would cost
        more.
        """
        self._transport.take()  # what lies here while our own computing keeps its reader away is nobody's fault
        in_flight = [
            (lane, passing)
            for lane, passing in enumerate(self._passes)
            if passing is not None and not passing.done.done()
        ]
        self._is_watching = bool(in_flight)
        late_s = self._clock() - self._watch_due
        if late_s >= self._timeout_s / ABSENCE_SHARE:  # we were away ourselves: answers may lie here unread
            self._back_at = self._clock()
        if in_flight:
            self._watch_later()
        for lane, passing in in_flight:
            if passing.held_since is not None:
                if self._clock() - passing.held_since >= self._hold_s:
                    self._fail(lane, passing, self._held_too_long())
            # our own computing is not held against those who answer
            elif self._clock() - max(passing.since, self._back_at) >= self._timeout_s:
                self._expire(lane, passing)

    def _expire(self, lane: int, passing: Pass) -> None:
        waiting = self._waiting[lane]
        for node in range(len(self._nodes)):
            if waiting >> node & 1:
                self.drop(node, f"no answer for {self._timeout_s:g} s")
        if not waiting and not passing.done.done():
            self._fail(lane, passing, TimeoutError(f"nothing was computed for {self._timeout_s:g} s"))
