"""The dispatching end of a link: rows out to every node of the other side, combined rows back.

For each turn of a lane every connected node gets exactly one post: rows in its slot, or the bare word that there are
none. A lane has one turn in flight; its slots are free again when the answers have landed, so there are no credits.
Rows themselves are written into `outbox(node)` and read from `landing` by whoever computes; this moves and checks them.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from msi.errors import ProtocolError, TransportError
from msi.meter import StageMeter
from msi.net.link_hello import LINK_CODEC, LinkHello, LinkWelcome, decode_welcome
from msi.net.slots import HEADER, HEADER_BYTES, INCARNATION_MASK, MAGIC, SEQ_MASK, Header, Kind, pack_immediate
from msi.net.transport import CONNECT_TIMEOUT_S, CompletionKind, Endpoint, Transport

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Turn:
    """What a lane waits for."""

    seq: int = -1
    waiting: int = 0  # bit per node
    num_rows: Sequence[int] = ()
    posted_at: float = 0.0
    done: asyncio.Future[None] | None = None


@dataclass(slots=True)
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
        timeout_s: a turn without its answer for that long loses the nodes that owe it.
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
        self._nodes: list[_Node | None] = [None] * num_nodes
        self._node_of: dict[Endpoint, int] = {}
        self._turns = [_Turn() for _ in range(hello.num_lanes)]
        self._next_seqs = list(hello.next_seqs)
        self._complete = asyncio.Event()
        self._report_loss = report_loss
        self._timeout_s = timeout_s
        self._clock = clock

    # -- connections -------------------------------------------------------------------------------------------------

    async def connect(self, node: int, address: str, *, timeout_s: float = CONNECT_TIMEOUT_S) -> memoryview:
        """Connects a node and returns its outbox. Raises TransportError."""
        assert self._nodes[node] is None, f"node {node} is connected already"
        hello = LINK_CODEC.encode(replace(self._hello, next_seqs=tuple(self._next_seqs)))
        endpoint = await self._transport.connect(address, hello, self.landing, node, timeout_s=timeout_s)
        try:
            welcome = decode_welcome(endpoint.peer)
        except ProtocolError as error:
            endpoint.close()
            raise TransportError(address, str(error)) from error
        self._nodes[node] = _Node(endpoint, welcome)
        self._node_of[endpoint] = node
        if all(self._nodes):
            self._complete.set()
        return endpoint.outbox

    def drop(self, node: int, reason: str) -> None:
        """Fences a node: connection closed, its seat revoked, turns that wait for it fail. Idempotent."""
        peer = self._nodes[node]
        if peer is None:
            return
        self._nodes[node] = None
        del self._node_of[peer.endpoint]
        self._complete.clear()
        peer.endpoint.close()
        self.landing.revoke(node)
        error = TransportError(peer.welcome.worker_id, reason)
        for turn in self._turns:
            if turn.waiting >> node & 1 and turn.done is not None and not turn.done.done():
                turn.done.set_exception(error)
        self._report_loss(node, peer.welcome.worker_id, reason)

    @property
    def missing_nodes(self) -> list[int]:
        return [node for node, peer in enumerate(self._nodes) if peer is None]

    async def wait_complete(self) -> None:
        """Until every node is connected. Whoever calls says how long that may take."""
        await self._complete.wait()

    # -- the layer loop ----------------------------------------------------------------------------------------------

    async def exchange(self, lane: int, num_rows: Sequence[int], more: bool) -> None:
        """One turn: posts the rows that lie in the outboxes and returns when every answer has landed.

        Args:
            num_rows: per node.
            more: whether this lane goes on after this turn; the nodes need not expect it otherwise.

        Raises:
            TransportError: a node that owes an answer was lost; `peer` names it. Cancelling leaves the lane's slots
                in use until `skip_to`.
        """
        turn = self._post(lane, num_rows, more)
        if not turn.waiting:
            return
        loop = asyncio.get_running_loop()
        turn.done = loop.create_future()
        timer = loop.call_later(self._timeout_s, self._expire, turn, turn.seq)
        try:
            await turn.done
        finally:
            timer.cancel()
            turn.done = None
            turn.waiting = 0

    def _post(self, lane: int, num_rows: Sequence[int], more: bool) -> _Turn:
        """One post to every node; the turn then waits for those that got rows."""
        seq = self._next_seqs[lane]
        self._next_seqs[lane] = seq + 1
        hello, layout = self._hello, self.layout
        incarnation, row_bytes = hello.incarnation, layout.row_bytes
        offset = layout.offset(lane)
        turn = self._turns[lane]
        turn.seq, turn.waiting, turn.num_rows, turn.posted_at = seq, 0, num_rows, self._clock()
        empty = pack_immediate(Kind.EMPTY, more, lane, 0, seq, incarnation)
        full = pack_immediate(Kind.DISPATCH, more, lane, 0, seq, incarnation)
        for node, peer in enumerate(self._nodes):
            if peer is None:
                raise TransportError(f"node {node}", "is not connected")
            count = num_rows[node]
            if not count:
                peer.endpoint.post(empty)
                continue
            HEADER.pack_into(
                peer.endpoint.outbox, offset, MAGIC, Kind.DISPATCH, lane, 0, more,
                incarnation, hello.placement_version, seq, count, row_bytes, 0, 0,
            )  # fmt: skip
            peer.endpoint.post(full, offset, HEADER_BYTES + count * row_bytes)
            turn.waiting |= 1 << node
            self.counters.rows += count
        self.counters.posts += len(self._nodes)
        return turn

    def skip_to(self, lane: int, multiple: int) -> None:
        """After a turn that failed: the lane goes on at the next multiple of `multiple`."""
        self._next_seqs[lane] = -(-self._next_seqs[lane] // multiple) * multiple

    def next_seq(self, lane: int) -> int:
        return self._next_seqs[lane]

    async def run(self) -> None:
        """Takes what arrives, for ever. Cancel it to stop."""
        while True:
            for endpoint, kind, immediate, reason in await self._transport.completions():
                node = self._node_of.get(endpoint)
                if node is None:
                    self.counters.dropped["closed endpoint"] += 1
                elif kind is CompletionKind.IMMEDIATE:
                    self._arrived(node, immediate)
                elif kind is CompletionKind.CLOSED:
                    self.drop(node, f"connection lost ({reason})")

    # -- answers -----------------------------------------------------------------------------------------------------

    def _arrived(self, node: int, immediate: int) -> None:
        lane = immediate >> 26 & 7
        peer = self._nodes[node]
        if peer is None or lane >= len(self._turns):
            self.counters.dropped["lane"] += 1
            return
        turn = self._turns[lane]
        if not turn.waiting >> node & 1 or (immediate >> 12 & SEQ_MASK) != turn.seq & SEQ_MASK:
            self.counters.dropped["stale"] += 1
            return
        if (immediate & INCARNATION_MASK) != peer.welcome.incarnation & INCARNATION_MASK:
            self.counters.dropped["incarnation"] += 1
            return
        kind = immediate >> 30
        at = node * self.landing.stride + self.answer_layout.offset(lane)
        header = Header._make(HEADER.unpack_from(self.landing.memory, at))
        if (
            header.magic != MAGIC
            or header.kind != kind
            or header.lane != lane
            or header.seq != turn.seq
            or header.incarnation != peer.welcome.incarnation
        ):
            self.counters.dropped["header"] += 1
            return
        if kind == Kind.ERROR:
            start = at + HEADER_BYTES
            length = min(header.num_rows, self.answer_layout.slot_bytes - HEADER_BYTES)
            reason = bytes(self.landing.memory[start : start + length]).decode(errors="replace")
            if turn.done is not None and not turn.done.done():
                turn.done.set_exception(TransportError(peer.welcome.worker_id, reason))
            return
        if kind != Kind.COMBINE or header.num_rows != turn.num_rows[node]:
            self.counters.dropped["rows"] += 1
            return
        turn.waiting &= ~(1 << node)
        self.counters.answers += 1
        if not turn.waiting and turn.done is not None and not turn.done.done():
            self.comm_meter.add(max(0.0, (self._clock() - turn.posted_at - header.service_ns * 1e-9) / 2))
            self.compute_meter.add(header.compute_ns * 1e-9)
            turn.done.set_result(None)

    def _expire(self, turn: _Turn, seq: int) -> None:
        if turn.seq != seq:
            return
        for node in range(len(self._nodes)):
            if turn.waiting >> node & 1:
                self.drop(node, f"no answer for {self._timeout_s:g} s")
