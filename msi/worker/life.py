"""One life of a worker: what one incarnation hosts, and how it ends. Knows no messages and no loop."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from msi.attention.role import AttentionRole
from msi.control.messages import Assignment, Standing, WorkerBelief, WorkerReady
from msi.experts.role import ExpertRole
from msi.net.transport import Transport
from msi.placement import Placement


class LifeEnds(Exception):
    """The worker is to introduce itself again; `reason` says why."""


class WorkerEnds(Exception):
    """The worker is to end."""


@dataclass
class Life:
    """What one incarnation hosts.

    Attributes:
        last_heard: when the coordinator last said something, by the host's clock.
        ready: what was said once the weights were loaded.
        acked: number of the last HeartbeatAck.
        calibrating: what is being measured, or was last.
        placing: held while a new placement is taken into use.
        term: of the coordinator.
        standing: as the coordinator last said.
        wanted: that placement and the one before it, or those that were wanted last.
    """

    assignment: Assignment
    last_heard: float
    attention: AttentionRole | None = None
    experts: ExpertRole | None = None
    transports: list[Transport] = field(default_factory=list)
    is_draining: bool = False
    ready: WorkerReady | None = None
    acked: int = -1
    calibrating: asyncio.Task[None] | None = None
    placing: asyncio.Lock = field(default_factory=asyncio.Lock)
    term: int = 0
    standing: Standing | None = None
    wanted: tuple[Placement, Placement | None] | None = None

    @property
    def belief(self) -> WorkerBelief:
        """What this worker takes for true, for the coordinator to compare with what it takes for true."""
        attention, experts = self.attention, self.experts
        followed, former = (self.wanted if self.placing.locked() else None) or (None, None)
        return WorkerBelief(
            acked=self.acked,
            ready=self.ready,
            is_linked=attention is not None and attention.links.is_complete,
            num_lanes=0 if attention is None else attention.num_lanes,
            term=self.term,
            request_ids=() if attention is None else attention.requests.ids,
            placement_version=self._placement_version(),
            has_former=experts is not None and experts.placed[1] is not None,
            follows_version=0 if followed is None else followed.version,
            follows_former=former is not None,
        )

    def _placement_version(self) -> int:
        if self.experts is not None:
            return self.experts.placement.version
        return 0 if self.attention is None else self.attention.links.link.oldest_placement_version

    async def close(self) -> None:
        if self.experts is not None:
            self.experts.close()
        if self.attention is not None:
            self.attention.close()
            if self.attention.blocks is not None:
                await self.attention.blocks.close()
        for transport in self.transports:
            await transport.close()


def what_ended(group: BaseExceptionGroup[Any]) -> BaseException:
    """The exception that ended a life: an error before an ending, the worker's end before that of this life."""
    flat: list[BaseException] = []
    pending: list[BaseException] = [group]
    while pending:
        error = pending.pop()
        if isinstance(error, BaseExceptionGroup):
            pending.extend(error.exceptions)
        else:
            flat.append(error)
    return min(flat, key=lambda error: isinstance(error, WorkerEnds) + 2 * isinstance(error, LifeEnds))
