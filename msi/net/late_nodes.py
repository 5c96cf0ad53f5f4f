"""Nodes of the other side that are late, or slow, and what is done about them while others hold the same experts.

Looks at turns that are away, on the event loop; `msi.net.hedging` decides. A turn is packed again in the way of one
that a lost node owed: same sequence number, a higher attempt. Whoever is late stays connected, gets empty turns, and
what it still answers is dropped as stale.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from threading import Lock

from msi.net.dispatch_nodes import DispatchNodes
from msi.net.hedging import Hedging, slow_nodes
from msi.net.passes import MAX_ATTEMPTS, Pass
from msi.net.turns import Turns

log = logging.getLogger(__name__)

LOOKS = 3  # while an answer becomes late
SLOW_EVERY_S = 1.0  # slow nodes are looked for
SLOW_LOOKS = 5  # in a row that find a node slow, and it is


class LateNodes:
    """Of one dispatching end.

    Args:
        turning: the link's lock.
        try_again: told, with that held, of a pass whose turn is about to be packed again.
        after_s: no answer is late before that; 0 where none ever is.
        use_aside: called when others than before are to get no rows that others can compute.
        clock: seconds, monotonic.

    Attributes:
        hedging: who is set aside.
        look_every_s: how often `look` is to be called.
    """

    def __init__(
        self,
        nodes: DispatchNodes,
        turns: Turns,
        turning: Lock,
        try_again: Callable[[Pass], None],
        after_s: float,
        use_aside: Callable[[], None],
        clock: Callable[[], float],
    ) -> None:
        self.hedging = Hedging(after_s)
        self.look_every_s = after_s / LOOKS if after_s else math.inf
        self._nodes, self._turns, self._turning = nodes, turns, turning
        self._try_again, self._use_aside = try_again, use_aside
        self._clock = clock
        self._back_at = -math.inf
        self._slow_due = 0.0
        self._slow_looks: dict[int, int] = {}  # in a row, in which a node was slow

    @property
    def avoided(self) -> tuple[int, ...]:
        """Nodes that get no rows: who is missing, and who is set aside as long as the others have all experts."""
        missing, aside = self._nodes.missing, self.hedging.aside
        return tuple(sorted({*missing, *aside})) if not self._nodes.lacking(aside) else tuple(missing)

    def look(self, in_flight: Sequence[tuple[int, Pass]], late_s: float) -> None:
        """At the passes of these lanes.

        Args:
            late_s: by how much this call is: while we were away ourselves, nobody was late.
        """
        if not self.hedging.after_s:
            return
        now = self._clock()
        if late_s >= self.look_every_s:
            self._back_at = now
        if self.hedging.take_back(now):
            self._use_aside()
        for lane, passing in in_flight:
            waited_s = now - max(passing.since, self._back_at)
            if self._turns.waiting[lane] and waited_s >= self.hedging.after_s:
                self._hedge(lane, passing, waited_s)
        if now >= self._slow_due:
            self._slow_due = now + SLOW_EVERY_S
            self._look_for_slow_ones()

    def _hedge(self, lane: int, passing: Pass, waited_s: float) -> None:
        """The turn that a late node owes an answer to is packed again for those that hold what it does."""
        turn, waiting, hedging, counters = passing.turn, self._turns.waiting[lane], self.hedging, self._turns.counters
        late = [index for index in range(len(self._nodes)) if waiting >> index & 1]
        if passing.is_over or passing.is_short or passing.attempt == MAX_ATTEMPTS:
            return
        trips_s = [trip_s for node in self._nodes.connected for trip_s, _ in tuple(node.exchanges)]
        if not hedging.is_late(waited_s, trips_s) or self._nodes.lacking({*late, *hedging.aside}):
            return
        if not hedging.may_hedge(sum(self._turns.seqs)):
            return
        if new := [index for index in late if index not in hedging.aside]:
            self._set_aside(new, f"has owed an answer for {waited_s:.2g} s")
        with self._turning:
            if passing.is_over or passing.turn != turn or self._turns.waiting[lane] != waiting:
                counters.hedges_cancelled += 1  # an answer has come first
                return
            self._turns.waiting[lane] = 0
            self._try_again(passing)
        counters.hedges += 1
        passing.gates.pack_again(lane, turn)

    def _look_for_slow_ones(self) -> None:
        residences = {node.index: [there_s for _, there_s in tuple(node.exchanges)] for node in self._nodes.connected}
        found = slow_nodes(residences)
        self._slow_looks = {index: self._slow_looks.get(index, 0) + 1 for index in found}
        slow = [index for index, looks in self._slow_looks.items() if looks >= SLOW_LOOKS]
        slow = [index for index in slow if index not in self.hedging.aside]
        if slow and not self._nodes.lacking({*slow, *self.hedging.aside}):
            self._set_aside(slow, "takes several times as long as the others")

    def _set_aside(self, indices: Sequence[int], why: str) -> None:
        aside_s = self.hedging.set_aside(indices, self._clock())
        for index in indices:
            node = self._nodes[index]
            if node is not None:
                node.exchanges.clear()  # what it did before is not held against it afterwards
                log.warning("%s %s; its rows go to replicas for %g s", node.welcome.worker_id, why, aside_s)
        self._use_aside()
