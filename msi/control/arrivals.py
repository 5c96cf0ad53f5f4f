"""Whom a coordinator that takes over still waits for, of the workers that the one before had. Decides; does not act.

Until they are there, or late, nobody hears who is there: an attention worker would drop the link to an expert worker
that only comes a moment later, and a request be computed again whose worker has it still. A launcher saw which workers
served when the coordinator died, and which have ended since; on a network nobody did, and the waiting ends when for a
while nobody more has come.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable

TAKEOVER_S = 8.0  # workers of the coordinator before have so long to come
LULL_S = 3.0  # after the last one: they miss a coordinator within little more than a second of each other


class Arrivals:
    """At one coordinator.

    Args:
        now: when it began.

    Attributes:
        num_came: so far.
        is_taking_over: somebody has come, and others may.
    """

    def __init__(self, now: float) -> None:
        self.is_taking_over = False
        self.num_came = 0
        self._until = now + TAKEOVER_S
        self._lull_until = math.inf
        self._expected: set[str] | None = None  # None: nobody knows

    def expects(self, worker_ids: Iterable[str]) -> None:
        """The launcher says who served the coordinator before, and lives."""
        self._expected = set(worker_ids)

    def ended(self, worker_id: str) -> None:
        """The launcher saw it end."""
        if self._expected is not None:
            self._expected.discard(worker_id)

    def came(self, now: float) -> None:
        """One that goes on as it is."""
        if not self.num_came:
            self.is_taking_over, self._until = True, now + TAKEOVER_S
        self.num_came += 1
        self._lull_until = now + LULL_S

    def excuse(self, late_s: float) -> None:
        """We were late ourselves by so much."""
        self._until += late_s
        self._lull_until += late_s

    def over(self) -> None:
        """All are there, or late."""
        self.is_taking_over = False

    def awaits(self, now: float, *, role: str, known: Collection[str], num_missing: int) -> bool:
        """Whether a worker of this role is waited for.

        Args:
            known: ids of those that are or were here.
            num_missing: places of the role that nobody has.
        """
        if now >= min(self._until, self._lull_until):
            return False
        if self._expected is not None:  # a launcher's ids begin with the role
            return any(one.startswith(f"{role}-") and one not in known for one in self._expected)
        return num_missing > 0
