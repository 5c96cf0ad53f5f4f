"""Who has been slow for long beside its peers, by what workers have computed since they began. Pure.

A worker's time is held against the median of the others of its role by every amount that they have in common: batches,
rows, and what else makes one worker's work heavier than another's. The least of these ratios counts, so whoever has
more rows, longer contexts or more weights to read than the others is not slow for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from statistics import median

from msi.control.counters import AttentionCounters, ExpertCounters
from msi.settings import SlowWorkers

LOOK_EVERY_S = 1.0
LEAST_BATCHES = 8  # of a worker, before its time says anything: who is set aside as late has few
LEAST_LOOKS = 3  # that find a worker slow: none counts for more than this part of the time that is asked for
HYSTERESIS = 0.75  # of the factor: below it, a worker that was slow is not any more

Life = tuple[str, int]  # a worker's id, and which life of it


@dataclass(frozen=True, slots=True)
class Done:
    """What a life has computed since its beginning: batches first, then amounts of any kind, in a role's order."""

    seconds: float
    amounts: tuple[float, ...]

    @staticmethod
    def by(counted: AttentionCounters | ExpertCounters) -> Done:
        """Of a role, as a worker's heartbeat has it."""
        if isinstance(counted, AttentionCounters):
            return Done(counted.attention_s, (counted.passes, counted.batch_tokens, counted.batch_contexts))
        return Done(counted.expert_batches_s, (counted.batches, counted.rows_landed, counted.weight_bytes_read))

    def since(self, before: Done) -> Done:
        pairs = zip(self.amounts, before.amounts, strict=True)
        return Done(self.seconds - before.seconds, tuple(now - then for now, then in pairs))


@dataclass(frozen=True, slots=True)
class _Known:
    """Of a life: what it had done when it was last held against the others, when that was, and what came of it."""

    done: Done
    at: float
    ratio: float = 0.0  # 0 until it is known
    slow_s: float = 0.0  # for which it has been slow


class Slowness:
    """Of one role's workers."""

    def __init__(self, settings: SlowWorkers) -> None:
        self._settings = settings
        self._lives: dict[Life, _Known] = {}
        self._due = 0.0

    def look(self, done: Mapping[Life, Done], now: float) -> None:
        """At those that are there; whoever is not is forgotten."""
        self._lives = {life: self._lives.get(life, _Known(its, now)) for life, its in done.items()}
        if now < self._due:
            return
        self._due = now + LOOK_EVERY_S
        news = {life: done[life].since(known.done) for life, known in self._lives.items()}
        enough = {life: its for life, its in news.items() if its.amounts[0] >= LEAST_BATCHES and its.seconds > 0}
        for life, its in enough.items():
            others = [other for one, other in enough.items() if one != life]
            if ratio := ratio_to(its, others):
                self._lives[life] = self._after(self._lives[life], done[life], ratio, now)

    def _after(self, known: _Known, done: Done, ratio: float, now: float) -> _Known:
        factor, after_s = self._settings.drain_slow_factor, self._settings.drain_slow_after_s
        slow_s = known.slow_s
        if ratio >= factor:
            slow_s += min(now - known.at, after_s / LEAST_LOOKS)
        elif ratio < HYSTERESIS * factor:
            slow_s = 0.0
        return replace(known, done=done, at=now, ratio=ratio, slow_s=slow_s)

    def ratio(self, life: Life) -> float:
        """How many times as long as the others it takes; 0 where that is not known."""
        return self._lives[life].ratio if life in self._lives else 0.0

    @property
    def slow(self) -> list[Life]:
        """Those that are, be it for a moment; who has been for longest first."""
        return [life for life, known in self._longest_first() if known.slow_s > 0]

    @property
    def slow_for_long(self) -> list[Life]:
        """Those that have been for as long as was asked for."""
        after_s = self._settings.drain_slow_after_s
        return [life for life, known in self._longest_first() if after_s and known.slow_s >= after_s * (1 - 1e-9)]

    def _longest_first(self) -> list[tuple[Life, _Known]]:
        return sorted(self._lives.items(), key=lambda item: (-item[1].slow_s, item[0]))


def ratio_to(done: Done, others: Iterable[Done]) -> float:
    """How many times as long as the others something took, by the amount by which that is least; 0 without others."""
    peers = list(others)
    found = []
    for number, amount in enumerate(done.amounts):
        paces = [peer.seconds / peer.amounts[number] for peer in peers if peer.amounts[number] > 0]
        if amount > 0 and paces and (usual := median(paces)) > 0:
            found.append(done.seconds / amount / usual)
    return min(found, default=0.0)
