"""The nodes of the other side, as the dispatching end of a link knows them: connected, lost, and what is missing.

Knows no lanes and no turns. A lost node's seat is wiped, and free for whoever comes next, once nobody reads what that
node had answered. On the event loop, but for what says otherwise.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Collection, Sequence

from msi.errors import ProtocolError, TransportError
from msi.net.link_hello import LINK_CODEC, LinkHello, LinkWelcome, decode_welcome
from msi.net.slots import Kind, SlotLayout, kind_word, opening_bytes, pack_immediate
from msi.net.transport import Endpoint, Landing, Transport

EXCHANGES_KEPT = 512  # of each node


class Node:
    """A node that is connected, and who it said it is.

    Attributes:
        out_words, in_headers: by lane: where headers to it leave, as 64-bit words, and where its land.
        answer: the immediate of its answer to sequence number 0 of lane 0.
        openings: by lane: what the headers of its answers begin with.
        exchanges: the last ones: seconds from a post to its answer, and those of them that the node had the rows.
        num_rows: that it was sent.
        is_lost: its connection is closed; what it had answered may still be read.
    """

    __slots__ = (
        "answer", "bit", "endpoint", "exchanges", "in_headers", "index", "is_lost", "num_rows", "openings",
        "out_words", "post", "welcome",
    )  # fmt: skip

    def __init__(self, index: int, endpoint: Endpoint, welcome: LinkWelcome, in_headers: Sequence[memoryview]) -> None:
        self.index = index
        self.bit = 1 << index
        self.endpoint = endpoint
        self.welcome = welcome
        self.post = endpoint.post
        self.exchanges: deque[tuple[float, float]] = deque(maxlen=EXCHANGES_KEPT)
        self.num_rows = 0
        self.is_lost = False
        self.out_words = tuple(header.cast("B").cast("Q") for header in endpoint.out_headers)
        self.in_headers = tuple(in_headers)
        self.openings = tuple(
            opening_bytes(kind_word(Kind.COMBINE, lane, False), welcome.incarnation)[:12]
            for lane in range(len(self.in_headers))
        )
        self.answer = pack_immediate(Kind.COMBINE, False, 0, 0, 0, welcome.incarnation)


async def greet(
    transport: Transport, address: str, hello: LinkHello, landing: Landing, index: int, *, timeout_s: float
) -> Node:
    """Connects node `index`, which answers into that seat of `landing`. Raises TransportError."""
    endpoint = await transport.connect(address, LINK_CODEC.encode(hello), landing, index, timeout_s=timeout_s)
    try:
        welcome = decode_welcome(endpoint.peer)
    except ProtocolError as error:
        endpoint.close()
        raise TransportError(address, str(error)) from error
    return Node(index, endpoint, welcome, landing.headers[index])


class DispatchNodes:
    """All nodes of the other side; changed with the link's lock held.

    Args:
        landing: node i answers into its seat i.
        missing: what cannot be computed without these nodes, in words; "" where all can.
        hold_s: passes wait so long for what is missing; where 0, they fail as soon as a node is lost.

    Attributes:
        of: by endpoint.
        is_leaving: seats of lost nodes are not wiped yet. From any thread.
    """

    def __init__(
        self, num_nodes: int, landing: Landing, *, missing: Callable[[Sequence[int]], str], hold_s: float
    ) -> None:
        self.of: dict[Endpoint, Node] = {}
        self.is_leaving = False
        self.hold_s = hold_s
        self._all: tuple[Node | None, ...] = (None,) * num_nodes
        self._landing = landing
        self._lacking = missing
        self._gone: dict[int, tuple[str, str]] = {}  # worker id and reason of the one lost last, by index
        self._left: dict[int, Node] = {}
        self._wiped = asyncio.Event()
        self._complete = asyncio.Event()

    def __len__(self) -> int:
        return len(self._all)

    def __getitem__(self, index: int) -> Node | None:
        return self._all[index]

    @property
    def connected(self) -> tuple[Node, ...]:
        return tuple(node for node in self._all if node is not None)

    @property
    def missing(self) -> list[int]:
        return [index for index, node in enumerate(self._all) if node is None]

    # -- they come and go --------------------------------------------------------------------------------------------

    def add(self, node: Node) -> None:
        self._set(node.index, node)
        self.of[node.endpoint] = node

    def remove(self, node: Node, reason: str) -> None:
        """It is lost, and its seat is to be wiped."""
        self._set(node.index, None)
        self._gone[node.index] = (node.welcome.worker_id, reason)
        del self.of[node.endpoint]
        node.is_lost = True
        self._left[node.index] = node
        self.is_leaving = True

    def _set(self, index: int, node: Node | None) -> None:
        self._all = (*self._all[:index], node, *self._all[index + 1 :])

    def wipe(self, is_read: Callable[[Node], bool]) -> None:
        """The seats of lost nodes whose answers nobody reads any more."""
        for index, node in list(self._left.items()):
            if not is_read(node):
                self._landing.revoke(index)
                del self._left[index]
                self._wiped.set()
        self.is_leaving = bool(self._left)

    async def until_wiped(self, index: int) -> None:
        """Until that seat may be given away. A pass reads for less than a turn."""
        while index in self._left:
            self._wiped.clear()
            await self._wiped.wait()

    # -- what is missing ---------------------------------------------------------------------------------------------

    def lacking(self, without: Collection[int]) -> str:
        """What could not be computed without these nodes and those that are missing, in words; "" where all could."""
        return self._lacking(sorted({*self.missing, *without}))

    @property
    def is_complete(self) -> bool:
        """Whether everything could be computed when somebody last looked. From any thread."""
        return self._complete.is_set()

    def look_again(self) -> None:
        """Nodes have come or gone, or what is lacking without them has changed."""
        if self._lacking(self.missing):
            self._complete.clear()
        else:
            self._complete.set()

    async def wait_complete(self) -> None:
        """Until nothing is lacking. Raises TransportError: not within `hold_s`, where that is more than 0."""
        try:
            async with asyncio.timeout(self.hold_s or None):
                await self._complete.wait()
        except TimeoutError:
            raise self.held_too_long() from None

    def first_loss(self) -> TransportError:
        """Of the nodes that were lost at all."""
        return self._loss_of(next(iter(self._gone)))

    def held_too_long(self) -> TransportError:
        """Names a node that was lost, and what has been lacking since."""
        missing = self.missing
        error = self._loss_of(min(missing, key=lambda index: index not in self._gone, default=0))
        if not self.hold_s:
            return error
        return TransportError(error.peer, f"{error.reason}; {self._lacking(missing)} for {self.hold_s:g} s")

    def _loss_of(self, index: int) -> TransportError:
        return TransportError(*self._gone.get(index, (f"node {index}", "is not connected")))

    # -- how they do -------------------------------------------------------------------------------------------------

    @property
    def exchanges(self) -> dict[str, tuple[tuple[float, float], ...]]:
        """The last ones with each connected node, by worker id: (seconds from post to answer, those it had the rows).

        Each is a difference on one clock; no clocks are compared.
        """
        return {node.welcome.worker_id: tuple(node.exchanges) for node in self.connected}

    def num_bytes(self, layout: SlotLayout) -> dict[str, tuple[int, int]]:
        """Of the rows, laid out like this, that each connected node was sent, and of its answers, by worker id."""
        answer_bytes = self._landing.layout.row_bytes
        return {
            node.welcome.worker_id: (node.num_rows * layout.row_bytes, node.num_rows * answer_bytes)
            for node in self.connected
        }

    @property
    def ways(self) -> dict[str, str]:
        """How rows get to each connected node, by worker id."""
        return {node.welcome.worker_id: node.endpoint.way for node in self.connected}
