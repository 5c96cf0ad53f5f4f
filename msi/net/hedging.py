"""Who is late, and for how long a late node's rows go to replicas.

A node that owes an answer for much longer than exchanges take is *set aside*: its rows of that turn are packed again
for nodes that hold the same experts, and rows of later turns go there, too, until its time is over. Each time that it
is late again soon after that, it is set aside for twice as long. So is one whose answers take several times as long as
the others' do, without being late. Turns that are packed again are a bounded share of all, so that a slow network does
not make everything be computed twice.

Decides; knows no connections, rows or clock.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from statistics import median

from msi.meter import percentile

TAIL_FACTOR = 3  # times the 99th percentile of what exchanges take
SHARE = 0.02  # of turns that may be packed again
MOST_AT_ONCE = 16  # of them
FIRST_ASIDE_S, MOST_ASIDE_S = 1.0, 64.0
SOON_S = 15.0  # after its time: until a slow node is known to be slow again, several looks have passed
SLOW_FACTOR = 4  # times what the median of the others takes
MIN_EXCHANGES = 32  # before a node is called slow


class Hedging:
    """Of one dispatching end.

    Args:
        after_s: no answer is late before that; 0 where none ever is.

    Attributes:
        num_set_aside: how often nodes were.
    """

    def __init__(self, after_s: float) -> None:
        self.after_s = after_s
        self.num_set_aside = 0
        self._until: dict[int, float] = {}  # of nodes that are set aside
        self._last: dict[int, tuple[float, float]] = {}  # how long each was, and until when, the last time
        self._allowance = float(MOST_AT_ONCE)
        self._num_turns = 0

    @property
    def aside(self) -> tuple[int, ...]:
        """Indices of the nodes that are set aside, in ascending order."""
        return tuple(sorted(self._until))

    def is_late(self, waited_s: float, trips_s: Sequence[float]) -> bool:
        """Whether an answer that has been waited for so long is; `trips_s`: what exchanges took lately."""
        if not self.after_s or waited_s < self.after_s:
            return False
        return not trips_s or waited_s >= TAIL_FACTOR * percentile(trips_s, 0.99)

    def may_hedge(self, num_turns: int) -> bool:
        """Whether one turn more may be packed again, which is then counted; `num_turns`: posted since the start."""
        self._allowance = min(MOST_AT_ONCE, self._allowance + SHARE * (num_turns - self._num_turns))
        self._num_turns = num_turns
        if self._allowance < 1:
            return False
        self._allowance -= 1
        return True

    def set_aside(self, nodes: Collection[int], now: float) -> float:
        """From now on; for how long, in seconds, the one that is for longest."""
        longest_s = 0.0
        for node in nodes:
            lasted_s, ended_at = self._last.get(node, (0.0, now))
            is_soon = now - ended_at <= max(SOON_S, 2 * lasted_s)
            aside_s = min(MOST_ASIDE_S, 2 * lasted_s) if lasted_s and is_soon else FIRST_ASIDE_S
            self._until[node] = now + aside_s
            self._last[node] = (aside_s, now + aside_s)
            self.num_set_aside += 1
            longest_s = max(longest_s, aside_s)
        return longest_s

    def take_back(self, now: float) -> bool:
        """Those whose time is over get rows again; whether there were any."""
        over = [node for node, until in self._until.items() if now >= until]
        for node in over:
            del self._until[node]
        return bool(over)

    def forget(self, node: int) -> None:
        """It is lost; whoever takes its place is another."""
        self._until.pop(node, None)
        self._last.pop(node, None)


def slow_nodes(residences_s: Mapping[int, Sequence[float]]) -> list[int]:
    """Nodes whose last answers took several times as long as those of the others, from rows that landed to the answer.

    Args:
        residences_s: of each connected node, by index.
    """
    medians = {node: median(times) for node, times in residences_s.items() if len(times) >= MIN_EXCHANGES}
    slow = []
    for node, its_s in medians.items():
        others = [one for other, one in medians.items() if other != node]
        if others and its_s >= SLOW_FACTOR * median(others) > 0:
            slow.append(node)
    return slow
