"""The links of an attention worker to the expert workers: connected as they come, dropped as they go, and reported."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from msi.complaints import Complaints
from msi.control.messages import Assignment, ExpertAddress, Linked, PeerLost, Topology
from msi.errors import TransportError, one_line
from msi.experts.role import link_hello
from msi.net.alarm import Alarm
from msi.net.dispatch_link import DispatchLink
from msi.net.regions import Allocator
from msi.net.transport import Transport
from msi.placement import Placement
from msi.placement_change import lost_experts
from msi.worker.host import AttentionPart, ServedShape

log = logging.getLogger(__name__)

CONNECT_AGAIN_S = 0.25
MOST_NAMED = 8  # experts in a sentence


class ExpertLinks:
    """Of one life.

    Args:
        report: takes the messages for the coordinator.
        clock: seconds, monotonic.

    Attributes:
        link: what lanes post to; it is complete while every expert is on a node that is connected.
        placement: of passes that begin.
    """

    def __init__(
        self,
        assignment: Assignment,
        shape: ServedShape,
        transport: Transport,
        report: Callable[[Any], None],
        *,
        allocator: Allocator,
        clock: Callable[[], float],
    ) -> None:
        self.link = DispatchLink(
            transport,
            hello=link_hello(assignment, shape),
            num_nodes=assignment.placement.num_nodes,
            report_loss=self._lost_peer,
            allocator=allocator,
            timeout_s=assignment.timeouts.peer_timeout_s,
            clock=clock,
            missing=self._missing,
            hold_s=assignment.timeouts.hold_timeout_s,
            hedge_after_s=assignment.timeouts.hedge_after_ms / 1000,
            use_aside=self._use_nodes,
        )
        self.placement = assignment.placement
        self.link.use_placement(self.placement.version, self.placement.num_used_nodes)
        self._half: AttentionPart | None = None
        self._assignment = assignment
        self._report = report
        self._was_complete = False  # as was said last
        self._is_prepared = False  # for the first pass
        self._wanted: dict[int, ExpertAddress] = {}
        self._connected: dict[int, ExpertAddress] = {}
        self._topology_changed = Alarm()
        self._complaints = Complaints(log)

    @property
    def is_complete(self) -> bool:
        """Whether every expert is on a worker that is connected, and was so since passes can begin."""
        return self._is_prepared and self._has_all

    @property
    def _has_all(self) -> bool:
        return not self._missing(self.link.nodes.missing)

    def _missing(self, nodes: Sequence[int]) -> str:
        return lacking(self.placement, nodes)

    def use_placement(self, placement: Placement) -> None:
        """For passes that begin from now on."""
        self.placement = placement
        self.link.use_placement(placement.version, placement.num_used_nodes)
        self._say_if_changed()

    def use_topology(self, topology: Topology) -> None:
        """These expert workers are there now. Others are dropped, new ones connected."""
        self._wanted = {expert.place.node: expert for expert in topology.experts}
        for node, connected in list(self._connected.items()):
            if self._wanted.get(node) != connected:
                self.link.drop(node, topology.lost.get(connected.worker_id, "replaced"))
        self._topology_changed.ring()

    async def keep_connected(self, half: AttentionPart) -> None:
        """For ever; `half` gets the outboxes, and hears who is missing."""
        self._half = half
        while True:
            failed = False
            for node, expert in sorted(self._wanted.items()):
                if node not in self._connected and not await self._connect(node, expert, half):
                    failed = True
            await self._topology_changed.wait(CONNECT_AGAIN_S if failed else float("inf"))

    async def _connect(self, node: int, expert: ExpertAddress, half: AttentionPart) -> bool:
        try:
            half.attach(node, await self.link.connect(node, expert.address))
        except TransportError as error:
            log.warning("%s: %s", expert.worker_id, error.reason)
            return False
        except Exception as error:
            self._complaints.say(error, f"{expert.worker_id} could not be connected")
            self.link.drop(node, one_line(error))
            return False
        if self._wanted.get(node) != expert:  # changed while connecting
            self.link.drop(node, "replaced")
            return False
        self._connected[node] = expert
        self._use_nodes()
        if not self._is_prepared and self._has_all:
            await half.prepare()
            self._is_prepared = True
        self.link.look_again()
        self._say_if_changed()
        return True

    def _lost_peer(self, node: int, worker_id: str, reason: str) -> None:
        expert = self._connected.pop(node, None)
        if expert is None:
            return
        if self._wanted.get(node) == expert:  # we noticed first; it comes back under a new incarnation
            del self._wanted[node]
            ours = self._assignment
            self._report(PeerLost(ours.worker_id, ours.incarnation, expert.worker_id, expert.incarnation, reason))
        self._use_nodes()
        self._say_if_changed()

    def _use_nodes(self) -> None:
        """Rows that others can compute go neither to who is missing nor to who is set aside."""
        if self._half is not None:
            self._half.use_nodes(self.link.late.avoided)

    def _say_if_changed(self) -> None:
        if self._was_complete != self.is_complete:
            self._was_complete = self.is_complete
            self._report(Linked(self._assignment.worker_id, self._assignment.incarnation, self._was_complete))


def lacking(placement: Placement, nodes: Sequence[int]) -> str:
    """What cannot be computed without these nodes, in words; "" where others hold all that they do."""
    missing = lost_experts(placement, [node for node in range(placement.num_nodes) if node not in nodes])
    if not missing:
        return ""
    named = ", ".join(map(str, missing[:MOST_NAMED])) + (", ..." if len(missing) > MOST_NAMED else "")
    return f"no worker has had {len(missing)} of {placement.num_experts} experts ({named})"
