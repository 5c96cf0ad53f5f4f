"""The dispatching end of a link: rows out to every node of the other side, combined rows back.

For each turn of a lane every connected node gets exactly one post: rows in its slot, or the bare word that there are
none. A lane has one turn in flight; its slots are free again when the answers have landed, so there are no credits.
A pass lives and dies with the connections that it was begun with: when a node is lost, what it had answered is wiped
with its seat, so that every turn in flight fails, and none that was opened before goes to a node that came after.
Rows themselves are written into the nodes' outboxes and read from `landing` by whoever computes, on the thread that
computes; that thread posts them, too. Everything else here happens on the event loop.
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
from msi.net.link_hello import LINK_CODEC, LinkHello, LinkWelcome, decode_welcome
from msi.net.slots import HEADER, HEADER_BYTES, INCARNATION_MASK, MAGIC, SEQ_MASK, Kind, pack_immediate
from msi.net.transport import CONNECT_TIMEOUT_S, CompletionKind, Endpoint, Transport

log = logging.getLogger(__name__)

WATCH_SHARE = 16  # of the time-out: how often turns are checked against it
ABSENCE_SHARE = 4  # of the time-out: who checks so late has been away, and everybody's time starts anew


class Turn:
    """One turn of a lane: opened on the event loop, posted by the thread that fills the outboxes, then awaited."""

    __slots__ = (
        "_link", "done", "is_over", "lane", "more", "nodes", "num_rows", "opened_at", "posted_at", "seq", "waiting",
    )  # fmt: skip

    def __init__(
        self,
        link: DispatchLink,
        nodes: tuple[_Node | None, ...],
        lane: int,
        seq: int,
        more: bool,
        opened_at: float,
        done: asyncio.Future[None],
    ):
        self.lane = lane
        self.seq = seq
        self.more = more
        self.opened_at = opened_at
        self.done = done
        self.nodes = nodes  # connected when it was opened: its rows are in their outboxes
        self.waiting = 0  # bit per node that owes an answer
        self.num_rows: Sequence[int] = ()
        self.posted_at = 0.0
        self.is_over = False  # nobody waits for it any more
        self._link = link

    def post(self, num_rows: Sequence[int]) -> None:
        """The rows lie in the outboxes, so many for each node. From any thread; does not raise."""
        self._link.post(self, num_rows)

    def fail(self, error: Exception) -> None:
        """There will be no rows; the await raises `error`. From any thread."""
        self._link.fail(self, error)


@dataclass(frozen=True, slots=True, eq=False)
class _Node:
    endpoint: Endpoint
    welcome: LinkWelcome


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
        report_loss: called with (node, worker id, reason) when a connected node is lost.
        timeout_s: a turn that has been posted and lacks answers for that long loses the nodes that owe them; one that
            is not posted within that time fails.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        hello: LinkHello,
        num_nodes: int,
        report_loss: Callable[[int, str, str], None],
        timeout_s: float = 4.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.layout = hello.dispatch_layout
        self.answer_layout = hello.combine_layout
        self.landing = transport.register(num_nodes, self.answer_layout.region_bytes)
        self.counters = DispatchCounters()
        self.comm_meter = StageMeter()  # T_c: half of a turn that was not the other side's service
        self.compute_meter = StageMeter()  # T_e, as the other side measures it
        self._transport = transport
        self._hello = hello
        self._nodes: tuple[_Node | None, ...] = (None,) * num_nodes
        self._node_of: dict[Endpoint, int] = {}
        self._gone: dict[int, tuple[str, str]] = {}  # worker id and reason of the one lost last, by node
        self.placement_version = hello.placement_version  # of hellos, and of passes that begin
        self._placement_versions = [hello.placement_version] * hello.num_lanes  # of the passes in flight
        self._turns: list[Turn | None] = [None] * hello.num_lanes
        self._next_seqs = list(hello.next_seqs)
        self._posted_seqs = [seq - 1 for seq in hello.next_seqs]  # the last that any node may have seen
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
        self._offsets = [self.layout.offset(lane) for lane in range(hello.num_lanes)]
        self._answer_offsets = [self.answer_layout.offset(lane) for lane in range(hello.num_lanes)]
        transport.deliver(self._completed)

    # -- connections -------------------------------------------------------------------------------------------------

    async def connect(self, node: int, address: str, *, timeout_s: float = CONNECT_TIMEOUT_S) -> memoryview:
        """Connects a node and returns its outbox. Raises TransportError."""
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
        return endpoint.outbox

    def _own_hello(self) -> LinkHello:
        return replace(self._hello, next_seqs=tuple(self._next_seqs), placement_version=self.placement_version)

    def drop(self, node: int, reason: str) -> None:
        """Fences a node: connection closed, its seat revoked, all turns in flight fail. Idempotent."""
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
        for turn in self._turns:
            if turn is not None:
                _fail(turn, TransportError(peer.welcome.worker_id, reason))
        self._report_loss(node, peer.welcome.worker_id, reason)

    def _set(self, node: int, peer: _Node | None) -> None:
        self._nodes = (*self._nodes[:node], peer, *self._nodes[node + 1 :])

    def _lost(self, node: int) -> TransportError:
        return TransportError(*self._gone.get(node, (f"node {node}", "is not connected")))

    @property
    def missing_nodes(self) -> list[int]:
        return [node for node, peer in enumerate(self._nodes) if peer is None]

    async def wait_complete(self) -> None:
        """Until every node is connected. Whoever calls says how long that may take."""
        await self._complete.wait()

    # -- the layer loop ----------------------------------------------------------------------------------------------

    def begin(self, lane: int) -> None:
        """A pass begins: its rows are of the placement that is used now, to its end."""
        self._placement_versions[lane] = self.placement_version

    def open(self, lane: int, more: bool) -> Turn:
        """The next turn of a lane, to be posted and then awaited with `landed`.

        Args:
            more: whether the lane goes on after it; the nodes need not expect it otherwise.
        """
        seq = self._next_seqs[lane]
        self._next_seqs[lane] = seq + 1
        turn = self._turns[lane] = Turn(self, self._nodes, lane, seq, more, self._clock(), self._loop.create_future())
        return turn

    async def landed(self, turn: Turn) -> None:
        """Until every answer to a turn has landed.

        Raises:
            TransportError: a node was lost; `peer` names it. Cancelling, too, leaves the lane's slots in use until
                `skip_to`.
            BatchRefused: a node is there, but has no answer to this turn.
            TimeoutError: the turn was not posted in time.
            Exception: what `Turn.fail` was given.
        """
        if not self._is_watching:
            self._is_watching = True
            self._watch_later()
        try:
            await turn.done
        finally:
            turn.is_over = True

    def post(self, turn: Turn, num_rows: Sequence[int]) -> None:
        """See `Turn.post`: one post to every node; the turn then waits for those that got rows."""
        lane, seq, more, incarnation = turn.lane, turn.seq, turn.more, self._incarnation
        offset, row_bytes = self._offsets[lane], self.layout.row_bytes
        with self._posting:
            if turn.is_over:
                return  # its pass was given up while the rows were computed
            self._posted_seqs[lane] = seq
            turn.num_rows, turn.posted_at = num_rows, self._clock()
            turn.waiting = sum(1 << node for node, count in enumerate(num_rows) if count)
            empty = pack_immediate(Kind.EMPTY, more, lane, 0, seq, incarnation)
            full = pack_immediate(Kind.DISPATCH, more, lane, 0, seq, incarnation)
            try:
                for node, peer in enumerate(self._nodes):
                    if peer is None or peer is not turn.nodes[node]:
                        self.fail(turn, self._lost(node))
                        return
                    count = num_rows[node]
                    if not count:
                        peer.endpoint.post(empty)
                        continue
                    HEADER.pack_into(
                        peer.endpoint.outbox, offset, MAGIC, Kind.DISPATCH, lane, 0, more,
                        incarnation, self._placement_versions[lane], seq, count, row_bytes, 0, 0,
                    )  # fmt: skip
                    peer.endpoint.post(full, offset, HEADER_BYTES + count * row_bytes)
                    self.counters.rows += count
            except TransportError as error:
                self._loop.call_soon_threadsafe(self._not_posted, turn, node, error)
                return
            self.counters.posts += len(self._nodes)
        if not turn.waiting:
            self._loop.call_soon_threadsafe(_succeed, turn)

    def fail(self, turn: Turn, error: Exception) -> None:
        """See `Turn.fail`."""
        self._loop.call_soon_threadsafe(_fail, turn, error)

    def _not_posted(self, turn: Turn, node: int, error: TransportError) -> None:
        """A connection that takes no post is lost, whether or not the transport has said so, and the turn with it."""
        if self._nodes[node] is turn.nodes[node]:
            self.drop(node, f"connection lost ({error.reason})")
        _fail(turn, self._lost(node))

    def check(self, turn: Turn) -> None:
        """Raises TransportError if a node was lost since the turn was opened, and what it had answered with it."""
        for node, peer in enumerate(self._nodes):
            if peer is not turn.nodes[node]:
                raise self._lost(node)

    def skip_to(self, lane: int, multiple: int) -> None:
        """After a turn that failed: the lane goes on at the next multiple of `multiple` that nobody has been told of.

        So passes that fail one after the other without a post do not run away from what the nodes have seen.
        """
        with self._posting:
            if (turn := self._turns[lane]) is not None:
                turn.is_over = True
            self._next_seqs[lane] = -(-(self._posted_seqs[lane] + 1) // multiple) * multiple

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
        if peer is None or lane >= len(self._turns):
            dropped["lane"] += 1
            return
        turn = self._turns[lane]
        if turn is None or not turn.waiting >> node & 1 or (immediate >> 12 & SEQ_MASK) != turn.seq & SEQ_MASK:
            dropped["stale"] += 1
            return
        incarnation = peer.welcome.incarnation
        if (immediate & INCARNATION_MASK) != incarnation & INCARNATION_MASK:
            dropped["incarnation"] += 1
            return
        at = node * self.landing.stride + self._answer_offsets[lane]
        magic, kind, its_lane, _, _, its_incarnation, _, seq, num_rows, _, service_ns, compute_ns = HEADER.unpack_from(
            self.landing.memory, at
        )
        if (
            magic != MAGIC
            or kind != immediate >> 30
            or its_lane != lane
            or seq != turn.seq
            or its_incarnation != incarnation
        ):
            dropped["header"] += 1
        elif kind == Kind.ERROR:
            start = at + HEADER_BYTES
            length = min(num_rows, self.answer_layout.slot_bytes - HEADER_BYTES)
            reason = bytes(self.landing.memory[start : start + length]).decode(errors="replace")
            _fail(turn, BatchRefused(peer.welcome.worker_id, reason))
        elif kind != Kind.COMBINE or num_rows != turn.num_rows[node]:
            dropped["rows"] += 1
        else:
            turn.waiting &= ~(1 << node)
            self.counters.answers += 1
            if not turn.waiting:
                self.comm_meter.add(max(0.0, (self._clock() - turn.posted_at - service_ns * 1e-9) / 2))
                self.compute_meter.add(compute_ns * 1e-9)
                _succeed(turn)

    def _watch_later(self) -> None:
        delay_s = self._timeout_s / WATCH_SHARE
        self._watch_due = self._clock() + delay_s
        self._loop.call_later(delay_s, self._watch)

    def _watch(self) -> None:
        """Ends turns that took too long; comes again while any is in flight. A timer per turn would cost more."""
        in_flight = [turn for turn in self._turns if turn is not None and not turn.is_over]
        self._is_watching = bool(in_flight)
        late_s = self._clock() - self._watch_due
        if late_s >= self._timeout_s / ABSENCE_SHARE:  # we were away ourselves: answers may lie here unread
            self._back_at = self._clock()
        if in_flight:
            self._watch_later()
        for turn in in_flight:
            # our own computing is not held against those who answer
            if self._clock() - max(turn.opened_at, turn.posted_at, self._back_at) >= self._timeout_s:
                self._expire(turn)

    def _expire(self, turn: Turn) -> None:
        for node in range(len(self._nodes)):
            if turn.waiting >> node & 1:
                self.drop(node, f"no answer for {self._timeout_s:g} s")
        if not turn.done.done():
            _fail(turn, TimeoutError(f"nothing was computed for {self._timeout_s:g} s"))


def _succeed(turn: Turn) -> None:
    if not turn.done.done():
        turn.done.set_result(None)


def _fail(turn: Turn, error: Exception) -> None:
    if not turn.done.done():
        turn.done.set_exception(error)
