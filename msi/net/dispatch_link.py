"""The dispatching end of a link: rows out to every node of the other side, combined rows back.

For each turn of a lane every connected node gets exactly one post: rows in its slot, or the bare word that there are
none. A lane has one turn in flight; its slots are free again when the answers have landed, so there are no credits.
A turn is a row of numbers: the last answer opens the gate that the lane's queue waits at, and only the end of the pass
wakes a coroutine. Whatever goes wrong, the gates open, and what is computed behind them is dropped.
A pass keeps to the connections that it was begun with. When a node is lost that owes rows of a turn, the others'
answers are awaited, and then the whole turn is packed again for the nodes that are there, and posted with the same
sequence number and a higher *attempt*; the pass goes on with those. Where what is missing is nowhere else, it is
*held*: until it is somewhere, or for `hold_s`. The same is done about a node that is late, where others hold what it
does (`late_nodes`). A lost node's seat is wiped once nobody reads what it had answered.
Rows themselves are written where they leave to the nodes and read from `landing` by whoever computes, on the thread
that computes; that thread posts them, and takes the answers where the transport lets it, by calls of `Turns` that go
past what is here, which happens on the event loop.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from msi.errors import TransportError
from msi.net.dispatch_nodes import DispatchNodes, Node, greet
from msi.net.late_nodes import LateNodes
from msi.net.link_hello import LinkHello
from msi.net.passes import MAX_ATTEMPTS, Gates, Pass
from msi.net.regions import HOST_MEMORY, Allocator, Region
from msi.net.slots import SEQ_MASK, life_word, split_life_word
from msi.net.transport import CONNECT_TIMEOUT_S, CompletionKind, Endpoint, Transport
from msi.net.turns import Turns, Watch

IMMEDIATE = CompletionKind.IMMEDIATE  # looked up once for each that lands, it would cost as much as its header

WATCH_SHARE = 16  # of the time-out: how often turns are checked against it
MOST_TURNS_MEANWHILE = SEQ_MASK // 2  # while a node connects: it is to tell the next one by an immediate's low bits
ABSENCE_SHARE = 4  # of the time-out: who checks so late has been away, and everybody's time starts anew


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
        hedge_after_s: see `Hedging`.
        use_aside: called when other nodes than before are to get no rows that others can compute.

    Attributes:
        packed, packed_again: see `msi.net.turns.Turns`.
        late: who is set aside.
        nodes: who is connected, and who is missing.
        turns: what is away, and what was counted and measured of it.
        placement_version: of hellos, and of passes that begin.
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
        hedge_after_s: float = 0.0,
        use_aside: Callable[[], None] = lambda: None,
    ) -> None:
        self.layout = hello.dispatch_layout
        self.answer_layout = hello.combine_layout
        self.landing = transport.register(num_nodes, self.answer_layout, allocator)
        self.nodes = DispatchNodes(num_nodes, self.landing, missing=missing, hold_s=hold_s)
        self.turns = Turns(hello, self.nodes, self, clock=clock, watch=watch)
        self.counters = self.turns.counters
        self.placement_version, self._num_counted = hello.placement_version, num_nodes
        self._transport = transport
        self._hello = hello
        self._passes = self.turns.passes
        self._next_turns = [1] * hello.num_lanes
        self._next_seqs = list(hello.next_seqs)
        self._report_loss = report_loss
        self.timeout_s = timeout_s
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._watching: asyncio.TimerHandle | None = None
        self._watch_due = 0.0
        self._back_at = -math.inf
        self._turning = self.turns.lock
        self.late = LateNodes(self.nodes, self.turns, self._turning, self._try_again, hedge_after_s, use_aside, clock)
        self.packed, self.packed_again = self.turns.packed, self.turns.packed_again
        transport.deliver(self._completed, self.turns.take)

    # -- connections -------------------------------------------------------------------------------------------------

    async def connect(self, index: int, address: str, *, timeout_s: float = CONNECT_TIMEOUT_S) -> Region:
        """Connects a node and returns where rows to it leave. Raises TransportError."""
        assert self.nodes[index] is None, f"node {index} is connected already"
        await self.nodes.until_wiped(index)
        hello = replace(
            self._hello,
            next_seqs=tuple(seq + 1 for seq in self.turns.seqs),
            placement_version=self.placement_version,
        )
        node = await greet(self._transport, address, hello, self.landing, index, timeout_s=timeout_s)
        moved = max(now + 1 - then for now, then in zip(self.turns.seqs, hello.next_seqs, strict=True))
        if moved > MOST_TURNS_MEANWHILE:
            node.endpoint.close()
            raise TransportError(address, f"took {moved} turns of a lane to connect; it is tried again")
        with self._turning:
            self.nodes.add(node)
        self._loop.call_soon(self.look_again)  # the caller has to know first where rows leave
        return node.endpoint.out_rows

    def use_placement(self, version: int, num_used_nodes: int) -> None:
        """Passes that begin from now on, and turns that are packed again, send rows by this placement: to its first
        nodes alone.
        """
        self.placement_version, self._num_counted = version, num_used_nodes
        self.look_again()

    @property
    def oldest_placement_version(self) -> int:
        """Of rows that are on their way, or that passes in flight will yet send; those that are held go by ours."""
        in_flight = (one for one in self._passes if one is not None and one.held_since is None)
        return min([self.placement_version, *(split_life_word(one.life_word)[1] for one in in_flight)])

    def drop(self, index: int, reason: str) -> None:
        """Fences a node: its connection is closed, its seat revoked; who waits for it waits no longer. Idempotent."""
        node = self.nodes[index]
        if node is None:
            return
        with self._turning:
            self.nodes.remove(node, reason)
            short = self.turns.lose(node)  # whether it has answered or not, these turns are packed again
        self.late.hedging.forget(index)
        node.endpoint.close()
        self.wipe()
        self._report_loss(index, node.welcome.worker_id, reason)
        self.look_again()
        if not self.nodes.hold_s and not self.nodes.is_complete:
            for lane, passing in enumerate(self._passes):
                if passing is not None:
                    self._fail(lane, passing, TransportError(node.welcome.worker_id, reason))
        for lane, passing in short:
            self.go_on(lane, passing)

    def look_again(self) -> None:
        """Nodes have come or gone, or `missing` says something else: those that are held may go on."""
        self.nodes.look_again()
        if self.nodes.is_complete:
            for lane, passing in enumerate(self._passes):
                if passing is not None and passing.held_since is not None:
                    self.go_on(lane, passing)

    def _try_again(self, passing: Pass) -> None:
        """Its turn is about to be packed again. With the lock held."""
        passing.since = self._clock()
        passing.attempt += 1
        passing.nodes, passing.life_word = self.nodes.connected, self._life_word
        passing.num_counted = self._num_counted

    @property
    def _life_word(self) -> int:
        return life_word(self._hello.incarnation, self.placement_version)

    # -- msi.net.turns.Course ----------------------------------------------------------------------------------------

    def go_on(self, lane: int, passing: Pass) -> None:
        """A turn that lacks answers of lost nodes is packed again, or held until it can be."""
        if passing.is_over or self._passes[lane] is not passing or not passing.is_short:
            return
        if not self.nodes.is_complete:
            if passing.held_since is None:
                passing.held_since = self._clock()
            if not self.nodes.hold_s:
                self._fail(lane, passing, self.nodes.held_too_long())
            return
        if passing.attempt == MAX_ATTEMPTS:
            self._fail(lane, passing, self.nodes.first_loss())
            return
        with self._turning:
            passing.is_short, passing.held_since = False, None
            self._try_again(passing)
        self.counters.packed_again += 1
        passing.gates.pack_again(lane, passing.turn)

    def wipe(self) -> None:
        """The seats of lost nodes whose answers nobody reads any more."""
        with self._turning:
            self.nodes.wipe(self.turns.is_read)

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
                self.turns.waiting[lane] = 0
        passing.gates.open(lane, passing.last)

    def fell_short(self, lane: int, passing: Pass) -> None:
        """Rows that could not be posted are those of nodes that were lost: they are packed again."""
        passing.is_short = True
        if not self.nodes.hold_s and not self.nodes.is_complete:
            self.turns.waiting[lane] = 0
            self.failed(lane, passing.turn, self.nodes.held_too_long())

    def not_posted(self, node: Node, error: TransportError) -> None:
        if not node.is_lost:
            self._loop.call_soon_threadsafe(self._not_posted, node, error)

    def _not_posted(self, node: Node, error: TransportError) -> None:
        """A connection that takes no post is lost, whether or not the transport has said so."""
        if self.nodes[node.index] is node:
            self.drop(node.index, f"connection lost ({error.reason})")

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
            gates, lane, self.nodes.connected, self._life_word, self._num_counted, first, self._next_seqs[lane],
            may_continue, self._clock(), self._loop.create_future(),
        )  # fmt: skip
        self._next_turns[lane] = first + num_layers
        self._next_seqs[lane] += num_layers
        self.turns.more[lane] = more
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
        if self._watching is None:
            self._watch_later()
        await passing.done

    def end(self, lane: int) -> None:
        """A pass is through, its last answers read."""
        passing = self._passes[lane]
        assert passing is not None, f"lane {lane} has no pass"
        self._passes[lane] = None
        self.turns.sent(passing)
        if self.nodes.is_leaving:
            self.wipe()

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
            self._next_seqs[lane] = -(-(self.turns.seqs[lane] + 1) // num_layers) * num_layers
            self.turns.waiting[lane] = 0
            self._passes[lane] = None
            self.turns.sent(passing)
        if self.nodes.is_leaving:
            self.wipe()
        passing.gates.open(lane, passing.last)
        if passing.done.done() and not passing.done.cancelled():
            passing.done.exception()  # whoever gave up has another reason

    def next_seq(self, lane: int) -> int:
        return self._next_seqs[lane]

    # -- completions -------------------------------------------------------------------------------------------------

    def _completed(self, endpoint: Endpoint, kind: CompletionKind, immediate: int, reason: str) -> None:
        if kind is IMMEDIATE:
            self.turns.take(((endpoint, immediate, endpoint.came_at),))
        elif (node := self.nodes.of.get(endpoint)) is None:
            self.counters.dropped["closed endpoint"] += 1
        elif kind is CompletionKind.CLOSED:
            self.drop(node.index, f"connection lost ({reason})")

    # -- time --------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Looks for late answers no more, once no pass is in flight. Idempotent."""
        if self._watching is not None:  # which would hold all that is here until it comes
            self._watching.cancel()

    def _watch_later(self) -> None:
        delay_s = self.timeout_s / WATCH_SHARE
        delay_s = min(delay_s, self.late.look_every_s)
        self._watch_due = self._clock() + delay_s
        self._watching = self._loop.call_later(delay_s, self._watch)

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
        self._watching = None
        late_s = self._clock() - self._watch_due
        if late_s >= self.timeout_s / ABSENCE_SHARE:  # we were away ourselves: answers may lie here unread
            self._back_at = self._clock()
        self.late.look(in_flight, late_s)
        if in_flight:
            self._watch_later()
        for lane, passing in in_flight:
            if passing.held_since is not None:
                if self._clock() - passing.held_since >= self.nodes.hold_s:
                    self._fail(lane, passing, self.nodes.held_too_long())
            # our own computing is not held against those who answer
            elif self._clock() - max(passing.since, self._back_at) >= self.timeout_s:
                self._expire(lane, passing)

    def _expire(self, lane: int, passing: Pass) -> None:
        waiting = self.turns.waiting[lane]
        for index in range(len(self.nodes)):
            if waiting >> index & 1:
                self.drop(index, f"no answer for {self.timeout_s:g} s")
        if not waiting and not passing.done.done():
            self._fail(lane, passing, TimeoutError(f"nothing was computed for {self.timeout_s:g} s"))
