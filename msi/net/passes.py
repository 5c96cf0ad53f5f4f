"""A lane's pass through the model, as the dispatching end of a link sees it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from msi.net.dispatch_nodes import Node

MAX_ATTEMPTS = 255  # what a header holds


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

    def pack_again(self, lane: int, turn: int) -> None:
        """Packs the rows of a turn, whose gate is closed, for the nodes that are there now; then the link's
        `packed_again` is called. On the event loop.
        """


class Pass:
    """One pass of a lane; which of its turns is away is told by the lane's row in the link's table.

    Attributes:
        counts: int32 [num_nodes], the lane's row of its gates'.
        done: gets a result once the answers to the last turn have landed.
        num_counted: nodes that its placement uses, and whose counts count: no rows go to those behind them.
        nodes: that it sends to: those that were there when it was begun, or when rows of it were packed again.
        life_word: our life, and the placement that its rows are of.
        opened: the two words that headers begin with.
        sent: of each turn that was posted since rows were counted last, those to each node: added up once a pass.
        ways: to each of these nodes: itself, its index and bit, the header that is for it, and what posts.
        turn: posted last.
        attempt: how often its rows were packed again.
        is_short: somebody who was lost owes rows of it.
        held_since: since when it has waited for a node that holds what it lacks.
        is_reading: answers to that turn are read by what computes the next.
        is_over: nothing of it is posted any more.
        since: when something happened to it last.
    """

    __slots__ = (
        "attempt", "counts", "done", "first", "gates", "held_since", "is_over", "is_reading", "is_short", "last",
        "life_word", "may_continue", "nodes", "num_counted", "num_sent", "opened", "sent", "seq_of_turn_0", "since",
        "turn", "ways",
    )  # fmt: skip

    def __init__(
        self,
        gates: Gates,
        lane: int,
        nodes: tuple[Node, ...],
        life_word: int,
        num_counted: int,
        first: int,
        first_seq: int,
        may_continue: Callable[[int], bool],
        since: float,
        done: asyncio.Future[None],
    ) -> None:
        self.gates = gates
        self.nodes = nodes
        self.life_word = life_word
        self.num_counted = num_counted
        counts = gates.counts.cast("B").cast("i")
        num_nodes = len(counts) // len(gates.counts)
        self.counts = counts[lane * num_nodes : (lane + 1) * num_nodes]
        self.first = first
        self.last = first + gates.num_layers - 1
        self.seq_of_turn_0 = first_seq - first
        self.may_continue = may_continue
        self.since = since
        self.done = done
        self.turn = first - 1
        self.attempt = 0
        self.is_short = self.is_reading = self.is_over = False
        self.held_since: float | None = None
        self.opened = (0, 0)
        self.sent: list[list[int]] = []
        self.num_sent = 0  # rows, of those that were added up
        self.ways: tuple[tuple[Node, int, int, memoryview, Callable[..., None]], ...] = ()

    def open(self, lane: int, word: int, life: int) -> None:
        """Headers to all nodes begin with these words, as `msi.net.slots.OPENING` has them, until others are given;
        their times stay 0.
        """
        self.opened = word, life
        self._add_up()  # before they go to others
        self.ways = tuple((node, node.index, node.bit, node.out_words[lane], node.post) for node in self.nodes)
        for _, _, _, header, _ in self.ways:
            header[0], header[1] = word, life

    def count_rows(self) -> int:
        """Those that were sent, and not counted before; each node has its own then."""
        self._add_up()
        num_sent, self.num_sent = self.num_sent, 0
        return num_sent

    def _add_up(self) -> None:
        sent, self.sent = self.sent, []
        totals = [sum(of_node) for of_node in zip(*sent, strict=True)]
        if totals:
            for node, index, *_ in self.ways:
                node.num_rows += totals[index]
                self.num_sent += totals[index]
