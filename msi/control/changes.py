"""Changes of placement that somebody asked for: one after the other, each awaited to its end."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from msi.control.due_changes import Choose
from msi.control.members import Instruction
from msi.control.membership import Cluster
from msi.errors import ConfigError
from msi.placement import Placement

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Asked:
    choose: Choose
    remark: str
    done: asyncio.Future[Placement]


class ChangesOfPlacement:
    """Of one instance; says in the log what the placement changes to, whoever asked for it.

    Args:
        carry_out: what the cluster says is to be done.
    """

    def __init__(self, cluster: Cluster, carry_out: Callable[[Sequence[Instruction]], None]) -> None:
        self._cluster = cluster
        self._carry_out = carry_out
        self._waiting: deque[_Asked] = deque()
        self._running: _Asked | None = None
        self._said = (0, "settled")

    async def ask(self, choose: Choose, remark: str) -> Placement:
        """See `msi.control.coordinator.Coordinator.change_placement`."""
        asked = _Asked(choose, remark, asyncio.get_running_loop().create_future())
        self._waiting.append(asked)
        self.look()
        return await asked.done

    def look(self) -> None:
        """After whatever happened: ends what has come to its end, and begins what comes next."""
        placing = self._cluster.placing
        self._say()
        if placing.is_changing:
            self._carry_out(self._cluster.places.advance())
            self._say()
        if self._cluster.placing.is_changing:
            return
        if self._running is not None:
            _end(self._running, placing.placement, placing.failure)
            self._running = None
        while self._waiting and not placing.is_changing:
            self._begin(self._waiting.popleft())

    def _begin(self, asked: _Asked) -> None:
        try:
            self._carry_out(self._cluster.places.change(asked.choose, asked.remark))
        except Exception as error:  # whoever asked has it, and the instance goes on
            if not asked.done.done():
                asked.done.set_exception(error)
        else:
            self._running = asked
            self._say()

    def _say(self) -> None:
        """In the log, where something is new."""
        placing = self._cluster.placing
        now = (placing.placement.version, placing.stage)
        if now == self._said:
            return
        self._said = now
        if placing.failure:
            log.warning("placement: %s came to nothing: %s", placing.remark, placing.failure)
        elif placing.is_changing:
            log.info("placement %d (%s): %s", placing.placement.version, placing.remark, placing.stage)
        elif placing.placement.version:
            held = [placing.placement.num_held_by(node) for node in range(placing.placement.num_nodes)]
            by_layer = ", by layer" if placing.placement.further else ""
            log.info("placement %d is used: experts per node %s%s", placing.placement.version, held, by_layer)


def _end(asked: _Asked, placement: Placement, failure: str) -> None:
    if asked.done.done():
        return
    if failure:
        asked.done.set_exception(ConfigError(failure))
    else:
        asked.done.set_result(placement)
