"""What another number of workers means for m and for the balance of both sides, from the stages as they are now.

T_a, T_e and T_c are the medians of what workers measured last, so a while has to pass after a change. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from msi.control.members import Member
from msi.planner.pipeline import MAX_MICRO_BATCHES, Stages, is_full

SETTLES_S = 10.0  # until most of what the meters hold is of the new number of workers


class SizeWatch:
    """Of one instance."""

    def __init__(self) -> None:
        self._size: tuple[int, int] | None = None
        self._before: tuple[int, int] | None = None
        self._changed_at = 0.0

    def look(
        self, attention: Sequence[Member], experts: Sequence[Member], num_lanes: int, now: float
    ) -> tuple[str, Stages] | None:
        """A sentence, and stages as they are since, once after each change; None while there is nothing to say.

        Args:
            attention, experts: those that serve.
        """
        size = (len(attention), len(experts))
        if not num_lanes or not all(size):
            return None
        if self._size is None:
            self._size = self._before = size
        if size != self._size:
            self._size, self._changed_at = size, now
        if size == self._before or now - self._changed_at < SETTLES_S:
            return None
        before, self._before = self._before, size
        stages = Stages(
            median(one.status.times.attention_s for one in attention),
            median(one.status.times.expert_s for one in experts),
            median(one.status.times.comm_s for one in attention),
        )
        return _sentence(before, size, stages, num_lanes), stages


def _sentence(before: tuple[int, int] | None, size: tuple[int, int], stages: Stages, num_lanes: int) -> str:
    changed = f"{size[0]} attention and {size[1]} expert workers serve" + (
        f", not {before[0]} and {before[1]}" if before else ""
    )
    if not stages.attention_s or not stages.expert_s:
        return f"{changed}; no stages were measured since"
    wanted = next((m for m in range(1, MAX_MICRO_BATCHES + 1) if is_full(stages, m)), MAX_MICRO_BATCHES)
    ratio = stages.attention_s / stages.expert_s
    balance = "the two sides are balanced"
    if not 0.8 <= ratio <= 1.25:
        slower, faster = ("attention", "expert") if ratio > 1 else ("expert", "attention")
        balance = f"{faster} workers wait: one more {slower} worker, or one {faster} worker less, would balance them"
    return (
        f"{changed}: T_a {stages.attention_s * 1e3:.2f} ms, T_e {stages.expert_s * 1e3:.2f} ms, T_c "
        f"{stages.comm_s * 1e3:.2f} ms; {balance}; m={wanted} hides the round trip, m={num_lanes} runs"
    )
