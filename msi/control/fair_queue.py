"""Requests that wait for a worker, in the order in which they get one.

A lower priority goes first, among equals what had a worker before, and then flows share what is computed evenly: a flow
is whoever asks, by an API key or a connection. By start-time fair queueing (Goyal et al., 1996): each request has a
tag, in tokens, the greater of what was last handed out and of the end of its flow's last one, which comes its own
tokens later. So a flow that asks little is soon served, however much another asks; one that was idle has saved nothing
up; and a flow alone is served in order of arrival.

Decides; knows no workers or clock. Each request's place is its `Routed.order`.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator

from msi.control.routed import Order, Routed

FLOWS_REMEMBERED = 1024


class FairQueue:
    """What waits, in order."""

    def __init__(self) -> None:
        self._waiting: list[Routed] = []
        self._reached = 0.0  # the tag that was last handed out
        self._ends: dict[str, float] = {}  # of flows: where their last request ends
        self._num_arrived = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Routed]:
        return iter(self._waiting)

    def order_of(self, flow: str, priority: int) -> Order:
        """Of a request that would come now."""
        return (priority, True, max(self._reached, self._ends.get(flow, 0.0)), self._num_arrived)

    def num_before(self, order: Order) -> int:
        """How many would be served before it."""
        return bisect_left(self._waiting, order, key=_order)

    @property
    def last(self) -> Routed | None:
        """Whoever is served last; None where nobody waits."""
        return self._waiting[-1] if self._waiting else None

    def add(self, one: Routed, cost: float) -> None:
        """One has come, which takes about so many tokens."""
        flow = one.flow
        one.order = self.order_of(flow, one.request.priority)
        self._num_arrived += 1
        self._charge(flow, one.order[2] + cost)
        insort(self._waiting, one, key=_order)

    def add_again(self, one: Routed) -> None:
        """It lost its worker: nothing of its priority goes before it that had none."""
        priority, _, tag, number = one.order
        one.order = (priority, False, tag, number)
        insort(self._waiting, one, key=_order)

    def remove(self, one: Routed) -> None:
        """It waits no longer; nothing happens where it did not."""
        index = bisect_left(self._waiting, one.order, key=_order)
        if index < len(self._waiting) and self._waiting[index] is one:
            del self._waiting[index]

    def hand_out(self, one: Routed) -> None:
        """It has its worker."""
        self.remove(one)
        self._reached = max(self._reached, one.order[2])

    def took(self, flow: str, more: float) -> None:
        """A request of this flow took so many tokens more than it was thought to take; less than 0 for fewer."""
        if (end := self._ends.get(flow)) is not None:
            self._charge(flow, max(0.0, end + more))

    def _charge(self, flow: str, end: float) -> None:
        self._ends[flow] = end
        if len(self._ends) > FLOWS_REMEMBERED:  # those that were idle for longest, in effect, begin anew
            kept = sorted(self._ends.items(), key=lambda item: -item[1])[: FLOWS_REMEMBERED // 2]
            self._ends = dict(kept)


def _order(one: Routed) -> Order:
    return one.order
