"""A lane's pass through the model, as the dispatching end of a link sees it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from msi.net.link_hello import LinkWelcome
from msi.net.slots import Kind, pack_immediate
from msi.net.transport import Endpoint

EXCHANGES_KEPT = 512  # of each node
EXCHANGES_APART = 7  # turns of a lane: to keep each would cost 0.5 us an answer (tools/bench_links.py)
Watch = Callable[[str, int, float, float, float], None]  # worker id, lane, posted at, answer came at, residence


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


class Node:
    """A node that is connected, and who it said it is.

    Attributes:
        out_headers, in_headers: by lane: where headers to it leave, and where its land.
        answer: the immediate of its answer to sequence number 0 of lane 0.
        exchanges: the last ones: seconds from a post to its answer, and those of them that the node had the rows.
        num_rows: that it was sent.
    """

    __slots__ = (
        "answer", "bit", "endpoint", "exchanges", "in_headers", "index", "num_rows", "out_headers", "post", "welcome",
    )  # fmt: skip

    def __init__(self, index: int, endpoint: Endpoint, welcome: LinkWelcome, in_headers: Sequence[memoryview]) -> None:
        self.index = index
        self.bit = 1 << index
        self.endpoint = endpoint
        self.welcome = welcome
        self.post = endpoint.post
        self.exchanges: deque[tuple[float, float]] = deque(maxlen=EXCHANGES_KEPT)
        self.num_rows = 0
        self.out_headers = tuple(endpoint.out_headers)
        self.in_headers = tuple(in_headers)
        self.answer = pack_immediate(Kind.COMBINE, False, 0, 0, 0, welcome.incarnation)


class Pass:
    """One pass of a lane; which of its turns is away is told by the lane's row in the link's table."""

    __slots__ = (
        "counts", "done", "first", "gates", "is_over", "is_whole", "last", "life_word", "may_continue", "nodes",
        "seq_of_turn_0", "since", "turn",
    )  # fmt: skip

    def __init__(
        self,
        gates: Gates,
        nodes: tuple[Node | None, ...],
        life_word: int,
        first: int,
        first_seq: int,
        may_continue: Callable[[int], bool],
        since: float,
        done: asyncio.Future[None],
    ) -> None:
        self.gates = gates
        self.nodes = nodes  # connected when it was begun: its rows lie where they leave to these
        self.is_whole = all(nodes)
        self.life_word = life_word  # our life, and the placement that its rows are of to its end
        self.counts = gates.counts.cast("B").cast("i")  # lane after lane
        self.first = first
        self.last = first + gates.num_layers - 1
        self.seq_of_turn_0 = first_seq - first
        self.may_continue = may_continue
        self.since = since  # when something happened to it last
        self.done = done
        self.turn = first - 1  # posted last
        self.is_over = False  # nothing of it is posted any more

    def set_done(self) -> None:
        """On the event loop: wakes who awaits it."""
        if not self.done.done():
            self.done.set_result(None)
