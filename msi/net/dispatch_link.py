"""The dispatching end of a link: rows out to every node of the other side, combined rows back.

For each turn of a lane every connected node gets exactly one post: rows in its slot, or the bare word that there are
none. A lane has one turn in flight; its slots are free again when the answers have landed, so there are no credits.
A turn is a row of numbers: the last answer opens the gate that the lane's queue waits at, and only the end of the pass
wakes a coroutine. Whatever goes wrong, the gates open, and what is computed behind them is dropped.
A pass lives and dies with the connections that it was begun with: when a node is lost, what it had answered is wiped
with its seat, so that every pass in flight fails, and none that was begun before goes to a node that came after.
Rows themselves are written where they leave to the nodes and read from `landing` by whoever computes, on the thread
that computes; that thread posts them, too. Everything else here happens on the event loop.
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
from typing import Protocol

from msi.errors import BatchRefused, ProtocolError, TransportError
from msi.meter import StageMeter
from msi.net.link_hello import LINK_CODEC, LinkHello, LinkWelcome, decode_welcome
from msi.net.regions import HOST_MEMORY, Allocator, Region
from msi.net.slots import HEADER, HEADER_BYTES, INCARNATION_MASK, MAGIC, SEQ_MASK, Kind, pack_immediate
from msi.net.transport import CONNECT_TIMEOUT_S, CompletionKind, Endpoint, Transport

log = logging.getLogger(__name__)

WATCH_SHARE = 16  # of the time-out: how often turns are checked against it
ABSENCE_SHARE = 4  # of the time-out: who checks so late has been away, and everybody's time starts anew


class Gates(Protocol):
    """The queues of lanes, as a link sees them.

    Attributes:
        num_layers: turns of a pass.
        counts: int32 [num_lanes, num_nodes]: the rows that lie ready for each node, once `packed` is called for a turn.
    """

    num_layers: int
    counts: memoryview

    def open(self, lane: int, turn: int) -> None:
        """What waits for the answers to that turn of a lane, or to one before, may go on. From any thread."""


@dataclass(frozen=True, slots=True, eq=False)
class _Node:
    endpoint: Endpoint
    welcome: LinkWelcome


class _Pass:
    """One pass of a lane; which of its turns is away is told by the lane's row in the link's table."""

    __slots__ = (
        "done", "first", "gates", "is_over", "last", "may_continue", "nodes", "placement_version", "seq_of_turn_0",
        "since", "turn",
    )  # fmt: skip

    def __init__(
        self,
        gates: Gates,
        nodes: tuple[_Node | None, ...],
        placement_version: int,
        first: int,
        first_seq: int,
        may_continue: Callable[[int], bool],
        since: float,
        done: asyncio.Future[None],
    ) -> None:
        self.gates = gates
        self.nodes = nodes  # connected when it was begun: its rows lie where they leave to these
        self.placement_version = placement_version  # that its rows are of, to its end
        self.first = first
        self.last = first + gates.num_layers - 1
        self.seq_of_turn_0 = first_seq - first
        self.may_continue = may_continue
        self.since = since  # when something happened to it last
        self.done = done
        self.turn = first - 1  # posted last
        self.is_over = False  # nothing of it is posted any more


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
    ) -> None:
        self.layout = hello.dispatch_layout
        self.answer_layout = hello.combine_layout
        self.landing = transport.register(num_nodes, self.answer_layout, allocator)
        self.counters = DispatchCounters()
        self.comm_meter = StageMeter()  # T_c: half of a turn that was not the other side's service
        self.compute_meter = StageMeter()  # T_e, as the other side measures it
        self._transport = transport
        self._hello = hello
        self._nodes: tuple[_Node | None, ...] = (None,) * num_nodes
        self._node_of: dict[Endpoint, int] = {}
        self._gone: dict[int, tuple[str, str]] = {}  # worker id and reason of the one lost last, by node
        self.placement_version = hello.placement_version  # of hellos, and of passes that begin
        self._passes: list[_Pass | None] = [None] * hello.num_lanes
        self._next_turns = [1] * hello.num_lanes
        self._next_seqs = list(hello.next_seqs)
        # a row for each lane's turn that is away:
        self._posted_seqs = [seq - 1 for seq in hello.next_seqs]  # the last that any node may have seen
        self._posted_at = [0.0] * hello.num_lanes
        self._waiting = [0] * hello.num_lanes  # bit per node that owes an answer
        self._more = [True] * hello.num_lanes  # whether the lane goes on after it
        self._complete = asyncio.Event()
        self._report_loss = report_loss
        self._timeout_s = timeout_s
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._is_watching = False
        self._watch_due = 0.0
        self._back_at = -math.inf
        self._posting = threading.Lock()  # held while a turn is posted, and while nodes come and go
        self._incarnation = hello.incarnation
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
        with self._posting:
            self._set(node, _Node(endpoint, welcome))
        self._node_of[endpoint] = node
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
        with self._posting:
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

    def _set(self, node: int, peer: _Node | None) -> None:
        self._nodes = (*self._nodes[:node], peer, *self._nodes[node + 1 :])

    def _lost(self, node: int) -> TransportError:
        return TransportError(*self._gone.get(node, (f"node {node}", "is not connected")))

    @property
    def num_nodes(self) -> int:
        return len(self._nodes)

    @property
    def missing_nodes(self) -> list[int]:
        return [node for node, peer in enumerate(self._nodes) if peer is None]

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
        passing = _Pass(
            gates, self._nodes, self.placement_version, first, self._next_seqs[lane], may_continue, self._clock(),
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
        with self._posting:
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
        if passing is None or not passing.first <= turn <= passing.last:
            return
        seq, more, incarnation = passing.seq_of_turn_0 + turn, self._more[lane], self._incarnation
        row_bytes, counts = self.layout.row_bytes, passing.gates.counts
        with self._posting:
            if passing.is_over:
                return
            self._posted_seqs[lane] = seq
            self._posted_at[lane] = passing.since = self._clock()
            passing.turn = turn
            waiting = 0
            for node in range(len(self._nodes)):
                if counts[lane, node]:
                    waiting |= 1 << node
            self._waiting[lane] = waiting
            empty = pack_immediate(Kind.EMPTY, more, lane, 0, seq, incarnation)
            full = pack_immediate(Kind.DISPATCH, more, lane, 0, seq, incarnation)
            try:
                for node, peer in enumerate(self._nodes):
                    if peer is None or peer is not passing.nodes[node]:
                        self.failed(lane, turn, self._lost(node))
                        return
                    count = counts[lane, node]
                    if not count:
                        peer.endpoint.post(lane, empty)
                        continue
                    HEADER.pack_into(
                        peer.endpoint.out_headers[lane], 0, MAGIC, Kind.DISPATCH, lane, 0, more,
                        incarnation, passing.placement_version, seq, count, row_bytes, 0.0, 0.0,
                    )  # fmt: skip
                    peer.endpoint.post(lane, full, count)
                    self.counters.rows += count
            except TransportError as error:
                self._loop.call_soon_threadsafe(self._not_posted, lane, passing, node, error)
                return
            self.counters.posts += len(self._nodes)
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

    def _fail(self, lane: int, passing: _Pass, error: Exception) -> None:
        """Whatever the reason, the lane's queue must run out: behind a closed gate it would be stuck for ever."""
        passing.is_over = True
        if not passing.done.done():
            passing.done.set_exception(error)
        if self._passes[lane] is passing:
            self._waiting[lane] = 0
        passing.gates.open(lane, passing.last)

    def _not_posted(self, lane: int, passing: _Pass, node: int, error: TransportError) -> None:
        """A connection that takes no post is lost, whether or not the transport has said so, and the pass with it."""
        if self._nodes[node] is passing.nodes[node]:
            self.drop(node, f"connection lost ({error.reason})")
        self._fail(lane, passing, self._lost(node))

    def _landed(self, lane: int, passing: _Pass, now: float) -> None:
        """All answers to the turn that is away are here."""
        turn = passing.turn
        if passing.is_over:
            return
        if turn + 1 == passing.last:
            try:
                self._more[lane] = passing.may_continue(lane)
            except Exception as error:
                self._fail(lane, passing, error)
                return
        passing.since = now
        passing.gates.open(lane, turn)
        if turn == passing.last and not passing.done.done():
            passing.done.set_result(None)

    def next_seq(self, lane: int) -> int:
        return self._next_seqs[lane]

    # -- answers -----------------------------------------------------------------------------------------------------

    def _completed(self, endpoint: Endpoint, kind: CompletionKind, immediate: int, reason: str) -> None:
        node = self._node_of.get(endpoint)
        if node is None:
            self.counters.dropped["closed endpoint"] += 1
        elif kind is CompletionKind.IMMEDIATE:
            self._arrived(node, immediate)
        elif kind is CompletionKind.CLOSED:
            self.drop(node, f"connection lost ({reason})")

    def _arrived(self, node: int, immediate: int) -> None:
        lane = immediate >> 26 & 7
        peer = self._nodes[node]
        dropped = self.counters.dropped
        if peer is None or lane >= len(self._waiting):
            dropped["lane"] += 1
            return
        passing, posted_seq = self._passes[lane], self._posted_seqs[lane]
        if (
            passing is None
            or not self._waiting[lane] >> node & 1
            or (immediate >> 12 & SEQ_MASK) != posted_seq & SEQ_MASK
        ):
            dropped["stale"] += 1
            return
        incarnation = peer.welcome.incarnation
        if (immediate & INCARNATION_MASK) != incarnation & INCARNATION_MASK:
            dropped["incarnation"] += 1
            return
        header = self.landing.headers[node][lane]
        magic, kind, its_lane, _, _, its_incarnation, _, seq, num_rows, _, service_s, compute_s = HEADER.unpack_from(
            header
        )
        if (
            magic != MAGIC
            or kind != immediate >> 30
            or its_lane != lane
            or seq != posted_seq
            or its_incarnation != incarnation
        ):
            dropped["header"] += 1
        elif kind == Kind.ERROR:
            reason = bytes(header[HEADER_BYTES : HEADER_BYTES + num_rows]).decode(errors="replace")
            self._fail(lane, passing, BatchRefused(peer.welcome.worker_id, reason))
        elif kind != Kind.COMBINE or num_rows != passing.gates.counts[lane, node]:
            dropped["rows"] += 1
        else:
            waiting = self._waiting[lane] = self._waiting[lane] & ~(1 << node)
            self.counters.answers += 1
            if not waiting:
                now = self._clock()
                if 0.0 <= service_s < math.inf and 0.0 <= compute_s < math.inf:  # bytes may say anything
                    self.comm_meter.add(max(0.0, (now - self._posted_at[lane] - service_s) / 2))
                    self.compute_meter.add(compute_s)
                self._landed(lane, passing, now)

    def _watch_later(self) -> None:
        delay_s = self._timeout_s / WATCH_SHARE
        self._watch_due = self._clock() + delay_s
        self._loop.call_later(delay_s, self._watch)

    def _watch(self) -> None:
        """Ends passes that took too long for a turn; comes again while any is in flight. A timer per turn would cost
        more.
        """
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

    def _expire(self, lane: int, passing: _Pass) -> None:
        waiting = self._waiting[lane]
        for node in range(len(self._nodes)):
            if waiting >> node & 1:
                self.drop(node, f"no answer for {self._timeout_s:g} s")
        if not passing.done.done():
            self._fail(lane, passing, TimeoutError(f"nothing was computed for {self._timeout_s:g} s"))
