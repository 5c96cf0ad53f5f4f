"""The dispatching end of a link: rows out to every node of the other side, combined rows back.

For each turn of a lane every connected node gets exactly one post: rows in its slot, or the bare word that there are
none. A lane has one turn in flight; its slots are free again when the answers have landed, so there are no credits.
A turn is a row of numbers: the last answer opens the gate that the lane's queue waits at, and only the end of the pass
wakes a coroutine. Whatever goes wrong, the gates open, and what is computed behind them is dropped.
A pass lives and dies with the connections that it was begun with: when a node is lost, what it had answered is wiped
with its seat, so that every pass in flight fails, and none that was begun before goes to a node that came after.
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
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from msi.errors import BatchRefused, ProtocolError, TransportError
from msi.meter import StageMeter
from msi.net.link_hello import LINK_CODEC, LinkHello, decode_welcome
from msi.net.passes import EXCHANGES_APART, Gates, Node, Pass, Watch
from msi.net.regions import HOST_MEMORY, Allocator, Region
from msi.net.slots import (
    ANSWER,
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
ABSENCE_SHARE = 4  # of the time-out: who checks so late has been away, and everybody's time starts anew


@dataclass
class DispatchCounters:
    """Counts since start; `dropped` by the reason why an immediate was not used."""

    posts: int = 0
    rows: int = 0
    answers: int = 0
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
        hello = LINK_CODEC.encode(self._own_hello())
        endpoint = await self._transport.connect(address, hello, self.landing, node, timeout_s=timeout_s)
        try:
            welcome = decode_welcome(endpoint.peer)
        except ProtocolError as error:
            endpoint.close()
            raise TransportError(address, str(error)) from error
        peer = Node(node, endpoint, welcome, self.landing.headers[node])
        with self._turning:
            self._set(node, peer)
            self._node_of[endpoint] = peer
        if all(self._nodes):
            self._complete.set()
        return endpoint.out_rows

    def _own_hello(self) -> LinkHello:
        return replace(
            self._hello, next_seqs=tuple(seq + 1 for seq in self._posted_seqs), placement_version=self.placement_version
        )

    def drop(self, node: int, reason: str) -> None:
        """Fences a node: connection closed, its seat revoked, all passes in flight fail. Idempotent."""
        peer = self._nodes[node]
        if peer is None:
            return
        with self._turning:
            self._set(node, None)
            self._gone[node] = (peer.welcome.worker_id, reason)
        del self._node_of[peer.endpoint]
        self._complete.clear()
        peer.endpoint.close()
        self.landing.revoke(node)
        for lane, passing in enumerate(self._passes):
            if passing is not None:
                self._fail(lane, passing, TransportError(peer.welcome.worker_id, reason))
        self._report_loss(node, peer.welcome.worker_id, reason)

    def _set(self, node: int, peer: Node | None) -> None:
        self._nodes = (*self._nodes[:node], peer, *self._nodes[node + 1 :])

    def _lost(self, node: int) -> TransportError:
        return TransportError(*self._gone.get(node, (f"node {node}", "is not connected")))

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
        return {node.welcome.worker_id: tuple(node.exchanges) for node in self._nodes if node is not None}

    @property
    def num_bytes(self) -> dict[str, tuple[int, int]]:
        """Of the rows that each connected node was sent, and of its answers, by worker id."""
        row_bytes, answer_bytes = self.layout.row_bytes, self.answer_layout.row_bytes
        connected = [node for node in self._nodes if node is not None]
        return {one.welcome.worker_id: (one.num_rows * row_bytes, one.num_rows * answer_bytes) for one in connected}

    @property
    def ways(self) -> dict[str, str]:
        """How rows get to each connected node, by worker id."""
        return {node.welcome.worker_id: node.endpoint.way for node in self._nodes if node is not None}

    async def wait_complete(self) -> None:
        """Until every node is connected. Whoever calls says how long that may take."""
        await self._complete.wait()

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
            gates, self._nodes, life_word(self._incarnation, self.placement_version), first, self._next_seqs[lane],
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
            TransportError: a node was lost; `peer` names it.
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
        """A pass is through, its last answers read. Raises TransportError if a node was lost since it was begun, and
        what it had answered with it.
        """
        passing = self._passes[lane]
        assert passing is not None, f"lane {lane} has no pass"
        for node, peer in enumerate(self._nodes):
            if peer is not passing.nodes[node]:
                raise self._lost(node)
        self._passes[lane] = None

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
        """Needs the lock: no answer is taken before all nodes have their post."""
        nodes, first = passing.nodes, lane * len(passing.nodes)
        seq, more, row_bytes, pack = passing.seq_of_turn_0 + turn, self._more[lane], self._row_bytes, OPENING.pack_into
        if nodes is not self._nodes or not passing.is_whole:
            changed = (node for node, peer in enumerate(nodes) if peer is None or peer is not self._nodes[node])
            self.failed(lane, turn, self._lost(next(changed)))
            return
        word, full, empty = self._words[more][lane]
        full, empty = full | (seq & SEQ_MASK) << SEQ_SHIFT, empty | (seq & SEQ_MASK) << SEQ_SHIFT
        life = passing.life_word
        self._posted_seqs[lane] = seq
        self._posted_at[lane] = passing.since = self._clock()
        passing.turn = turn
        self._awaited[lane] = lane << LANE_SHIFT | (seq & SEQ_MASK) << SEQ_SHIFT
        self._counts[lane] = counts = passing.counts[first : first + len(nodes)].tolist()
        waiting = 0
        peer: Node
        try:
            for peer, count in zip(nodes, counts, strict=True):  # type: ignore[assignment]  # none is None
                if count:
                    waiting |= peer.bit
                    peer.num_rows += count
                    pack(peer.out_headers[lane], 0, word, life, seq, count, row_bytes)  # its times stay 0
                    peer.post(lane, full, count)
                else:
                    peer.post(lane, empty)
        except TransportError as error:
            self._loop.call_soon_threadsafe(self._not_posted, lane, passing, peer.index, error)
            return
        self._waiting[lane] = waiting
        self.counters.posts += len(nodes)
        self.counters.rows += sum(counts)
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

    def _not_posted(self, lane: int, passing: Pass, node: int, error: TransportError) -> None:
        """A connection that takes no post is lost, whether or not the transport has said so, and the pass with it."""
        if self._nodes[node] is passing.nodes[node]:
            self.drop(node, f"connection lost ({error.reason})")
        self._fail(lane, passing, self._lost(node))

    def _landed(self, lane: int, passing: Pass, now: float) -> None:
        """All answers to the turn that is away are here. On whatever thread took the last."""
        turn = passing.turn
        if passing.is_over:
            return
        if turn + 1 == passing.last:
            try:
                self._more[lane] = passing.may_continue(lane)
            except Exception as error:
                self.failed(lane, turn, error)
                return
        passing.since = now
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
            # our own computing is not held against those who answer
            if self._clock() - max(passing.since, self._back_at) >= self._timeout_s:
                self._expire(lane, passing)

    def _expire(self, lane: int, passing: Pass) -> None:
        waiting = self._waiting[lane]
        for node in range(len(self._nodes)):
            if waiting >> node & 1:
                self.drop(node, f"no answer for {self._timeout_s:g} s")
        if not passing.done.done():
            self._fail(lane, passing, TimeoutError(f"nothing was computed for {self._timeout_s:g} s"))
