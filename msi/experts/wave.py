"""One lane's wave: which of its seats' rows run together next; see `msi.experts.waves` for the rules.

Seats are bits. Nearly always all members are at one layer and the wave is *even*: at its position nobody has landed,
or landed elsewhere, or waits as a stray. Then a landing is one less to come, the last one makes the batch ready, and
taking it has all to come again; whatever else happens is settled in full, rider by rider, and may find the wave even
again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from msi.experts.batches import Rows, WaveBatch
from msi.experts.pace import Pace, WaveCounters


@dataclass(slots=True)
class Rider:
    """One seat in one lane."""

    seat: int
    rank: int
    bit: int
    seq: int = -1  # last landed
    num_rows: int = 0  # landed and not yet taken
    landed_at: float = -math.inf
    is_last: bool = True  # it said that nothing follows
    base: int | None = None  # seq - position, while a member of the wave
    was_evicted: bool = False
    readmitted_at: int | None = None  # the wave's position then
    late_at: int | None = None  # the wave's position when it last waited for this seat longer than W
    is_slow: bool = False


@dataclass(slots=True)
class Wave:
    """Of one lane; `position` counts layers, and is None while the lane has no wave."""

    index: int
    num_layers: int
    pace: Pace
    counters: WaveCounters
    riders: dict[int, Rider] = field(default_factory=dict)
    position: int | None = None
    moved_at: float = -math.inf  # when the wave came to its position
    members: int = 0  # bits
    num_members: int = 0
    doubted: int = 0  # bits of members that were late or readmitted, maybe no more than a pass ago
    is_even: bool = False  # all were missing here, and since then some have landed at the position, or all
    num_open: int = 0  # while it is even: members that have not
    num_trusted: int = 0  # while it is even and some are doubted: those of them that are waited for longer
    missing: int = 0  # while it is not: bits of the members that have not landed at the position
    num_missing: int = 0
    trusted: int = 0  # bits of those of them that are waited for longer
    has_rows: bool = False  # for the position
    waited_since: float | None = None  # first rows of a member at the position
    ahead_since: float | None = None  # first rows of a member ahead of the position
    half_at: float | None = None  # when half of the members had landed
    ready_at: float | None = None  # since when everyone has landed and there are rows
    strays: list[Rider] = field(default_factory=list)  # riders with rows that are not members
    gather_since: float | None = None  # first rows in a lane without a wave
    sealed: tuple[int, float] | None = None  # position and time of the last batch

    # -- events ------------------------------------------------------------------------------------------------------

    def connect(self, seat: int, rank: int) -> None:
        assert seat not in self.riders, f"seat {seat} is connected already"
        self.riders[seat] = Rider(seat, rank, 1 << seat)

    def disconnect(self, seat: int, now: float) -> None:
        del self.riders[seat]
        self.settle(now)

    def landed(self, seat: int, seq: int, num_rows: int, more: bool, now: float) -> bool:
        """See `Waves.landed`."""
        rider = self.riders[seat]
        base = rider.base
        if not (self.is_even and more and base is not None and seq - base == self.position):
            return self._landed_out_of_step(rider, seq, num_rows, more, now)
        rider.seq, rider.num_rows, rider.landed_at = seq, num_rows, now
        num_open = self.num_open = self.num_open - 1
        if self.half_at is None and 2 * num_open <= self.num_members:
            self.half_at = now
        is_news = False
        if self.doubted and not self.doubted & rider.bit:
            self.num_trusted -= 1
            is_news = not self.num_trusted  # it was the last that is waited for longer
        if self.waited_since is None:
            if num_rows:
                self.waited_since = now
                is_news = True
        elif now - self.waited_since > self.pace.late_s:
            rider.late_at = self.position
            if not self.doubted:
                self.num_trusted = num_open
            self.doubted |= rider.bit
        if num_open:
            return is_news
        if self.waited_since is None:  # nobody has rows for this layer
            self.settle(now)
        else:
            self.ready_at = now
        return True

    def _landed_out_of_step(self, rider: Rider, seq: int, num_rows: int, more: bool, now: float) -> bool:
        if self.is_even:
            self._count_missing()
        gave_up = rider.num_rows > 0  # rows that were never taken: its worker began a pass anew
        position, bit = self.position, rider.bit
        was_missing = position is not None and rider.base is not None and rider.seq - rider.base < position
        rider.seq, rider.num_rows, rider.landed_at, rider.is_last = seq, num_rows, now, not more
        if was_missing and self.waited_since is not None and now - self.waited_since > self.pace.late_s:
            rider.late_at = position
            self.doubted |= bit
        if position is None or gave_up:
            pass
        elif rider.base is None:
            if num_rows == 0:  # it does not stay: it meets the wave now or not at this layer
                if not self._meets(rider):
                    return False
                self._admit(rider)
        elif not was_missing or self.num_missing > 1:  # nothing gets ready by this
            is_news = False
            if was_missing:
                self.missing ^= bit
                self.num_missing -= 1
                if self.trusted & bit:
                    self.trusted ^= bit
                    is_news = not self.trusted
            return self._watch(rider, now) or is_news
        self.settle(now)
        return True

    def _count_missing(self) -> None:
        """The wave is even no more; what was not kept up meanwhile."""
        position = self.position
        assert position is not None
        self.is_even, self.missing = False, 0
        for rider in self.riders.values():
            if rider.base is not None and rider.seq - rider.base < position:
                self.missing |= rider.bit
        self.num_missing = self.missing.bit_count()
        self.trusted = self.missing & ~self.doubted

    def _watch(self, rider: Rider, now: float) -> bool:
        """Starts the times that a member's landing starts; whether it started one."""
        assert self.position is not None
        if self.half_at is None and 2 * self.num_missing <= self.num_members:
            self.half_at = now
        if rider.base is None or not rider.num_rows:
            return False
        ahead = rider.seq - rider.base - self.position
        if ahead == 0 and self.waited_since is None:
            self.waited_since = now
            return True
        if ahead > 0 and self.ahead_since is None:
            self.ahead_since = now
            return True
        return False

    # -- when --------------------------------------------------------------------------------------------------------

    def due_at(self) -> float:
        """From when there is a batch, if nothing lands; infinity if never."""
        if self.ready_at is not None:
            return self.ready_at
        pace = self.pace
        if self.position is None:
            return math.inf if self.gather_since is None else self.gather_since + pace.wait_s
        if self.waited_since is not None:
            is_trusting = self.trusted
            if self.is_even:
                is_trusting = self.num_trusted if self.doubted else self.num_open
            return self.waited_since + (pace.trusting_wait_s if is_trusting else pace.wait_s)
        if self.ahead_since is not None:
            return self.ahead_since + pace.trusting_wait_s
        if self.strays:  # nobody of the wave lands here, while others wait
            since = max(self.moved_at, min(rider.landed_at for rider in self.strays))
            first = min(rider.rank for rider in self.strays)
            is_first = all(first < rider.rank for rider in self.riders.values() if rider.base is not None)
            return since + (pace.trusting_wait_s if is_first else pace.two_passes_s)
        return math.inf

    def give_way(self, now: float) -> None:
        """Its time is up: whoever is missing is evicted, or those who wait here start it anew."""
        if self.position is None:
            self._start(now)
        else:
            self._evict_missing()
            self.settle(now)

    # -- membership --------------------------------------------------------------------------------------------------

    def _meets(self, rider: Rider) -> bool:
        """Whether a seat that is no member is in step with the wave: at its layer, or just before it."""
        assert self.position is not None
        if (rider.seq - self.position) % self.num_layers > 1 or rider.is_last:
            return False
        return not rider.is_slow or rider.seq % self.num_layers == 0

    def _is_trusted(self, rider: Rider) -> bool:
        """Whether a member is more than a pass away from its last readmission and its last lateness."""
        return not (self._is_within_pass(rider.readmitted_at) or self._is_within_pass(rider.late_at))

    def _is_within_pass(self, since: int | None) -> bool:
        assert self.position is not None
        return since is not None and self.position - since <= self.num_layers

    def _admit(self, rider: Rider) -> None:
        assert self.position is not None
        ahead = (rider.seq - self.position) % self.num_layers
        rider.base = rider.seq - self.position - ahead
        rider.is_slow = False
        if rider.was_evicted:
            rider.readmitted_at = self.position
            self.counters.readmissions += 1

    def _evict_missing(self) -> None:
        assert self.position is not None
        for rider in self.riders.values():
            if rider.base is None or rider.seq - rider.base >= self.position:
                continue
            rider.base = None
            rider.is_slow = self._is_within_pass(rider.readmitted_at)
            rider.was_evicted = True
            rider.readmitted_at = rider.late_at = None
            self.counters.evictions += 1

    def _start(self, now: float) -> None:
        """A new wave at the layer of the oldest rows here, or none."""
        self.gather_since = self.sealed = self.position = None
        self.waited_since = self.ahead_since = self.ready_at = None
        self.is_even = False
        waiting = [rider for rider in self.riders.values() if rider.num_rows]
        first = min(waiting, key=lambda rider: (rider.is_slow, rider.rank), default=None)
        if first is None:
            self.strays = []
            return
        self._move(first.seq, now)
        self.counters.starts += 1
        for rider in self.riders.values():
            rider.base = rider.readmitted_at = rider.late_at = None
            is_alive = rider.num_rows > 0 or rider.landed_at >= now - self.pace.wait_s
            if rider is first or (is_alive and self._meets(rider)):
                self._admit(rider)
        self.settle(now)

    # -- its course --------------------------------------------------------------------------------------------------

    def _move(self, position: int, now: float) -> None:
        self.position, self.moved_at = position, now
        self.waited_since = self.ahead_since = self.half_at = self.ready_at = None

    def settle(self, now: float) -> None:
        """Brings the lane up to date: whom the wave meets, who is missing, positions that nobody has rows for."""
        if self.position is None:
            self._gather(now)
            return
        while True:
            self._look()
            if not self.members:
                self._start(now)
                return
            for rider in self.riders.values():
                self._watch(rider, now)
            if self.missing:
                self.ready_at = None
                return
            if self.has_rows:
                if self.ready_at is None:
                    self.ready_at = now
                return
            self._move(self.position + 1, now)

    def _look(self) -> None:
        """Who is a member, who is missing, and who has rows, at the position as it is now."""
        position = self.position
        assert position is not None
        layer = position % self.num_layers
        members = missing = trusted = doubted = num_members = num_missing = 0
        has_rows, is_even = False, True
        strays = []
        for rider in self.riders.values():
            if rider.base is None and rider.num_rows and self._meets(rider):
                self._admit(rider)
            if rider.base is None:
                if rider.num_rows:
                    strays.append(rider)
                    has_rows |= rider.seq % self.num_layers == layer
                continue
            ahead = rider.seq - rider.base - position
            if ahead < 0 and rider.is_last:  # it has left
                rider.base, rider.was_evicted = None, False
                continue
            members |= rider.bit
            num_members += 1
            is_trusted = self._is_trusted(rider)
            if not is_trusted:
                doubted |= rider.bit
            if ahead < 0:
                is_even = is_even and not rider.num_rows
                missing |= rider.bit
                num_missing += 1
                if is_trusted:
                    trusted |= rider.bit
            has_rows |= ahead == 0 and rider.num_rows > 0
        self.members, self.missing, self.trusted, self.doubted = members, missing, trusted, doubted
        self.num_members, self.num_missing = num_members, num_missing
        self.has_rows, self.strays = has_rows, strays
        self.is_even = is_even and missing == members and not strays and self.waited_since is None
        if self.is_even:
            self._expect_members()

    def _gather(self, now: float) -> None:
        """An empty lane waits for every connected seat."""
        oldest = min((r for r in self.riders.values() if r.num_rows), key=lambda r: r.landed_at, default=None)
        if oldest is None:
            self.gather_since = None
            return
        if self.gather_since is None:
            self.gather_since = now
        for rider in self.riders.values():
            is_near = not rider.is_last and (rider.seq - oldest.seq) % self.num_layers <= 1
            if not rider.num_rows and not (is_near and rider.landed_at >= now - self.pace.wait_s):
                return
        self._start(now)

    # -- batches -----------------------------------------------------------------------------------------------------

    def seal(self, now: float) -> WaveBatch:
        """What is ready, and on to the next layer."""
        position = self.position
        assert position is not None
        layer = position % self.num_layers
        is_even = self.is_even  # and ready, so all members have landed here
        taken = self._take_even() if is_even else self._take_at(position)
        if self.sealed is not None and self.sealed[0] == position - 1 and self.half_at is not None:
            assert self.ready_at is not None
            self.pace.measured((self.half_at - self.sealed[1]) + (now - self.ready_at))
        self.sealed = (position, now)
        self.counters.batch_of(len(taken))
        self._move(position + 1, now)
        if is_even:
            self._expect_all()
        else:
            self.settle(now)
        return WaveBatch(self.index, layer, tuple(taken))

    def _take_even(self) -> list[Rows]:
        riders = self.riders.values()
        taken = [(rider.seat, rider.seq, rider.num_rows) for rider in riders if rider.num_rows]
        for rider in riders:
            rider.num_rows = 0
        return taken

    def _take_at(self, position: int) -> list[Rows]:
        taken = []
        layer = position % self.num_layers
        for rider in self.riders.values():
            if not rider.num_rows:
                continue
            if rider.seq % self.num_layers == layer if rider.base is None else rider.seq - rider.base == position:
                taken.append((rider.seat, rider.seq, rider.num_rows))
                rider.num_rows = 0
        return taken

    def _expect_all(self) -> None:
        """As settling would find it: all members were at the last position and none said that it was its last."""
        if self.doubted:
            for rider in self.riders.values():
                if rider.bit & self.doubted and self._is_trusted(rider):
                    self.doubted ^= rider.bit
        self._expect_members()

    def _expect_members(self) -> None:
        self.num_open = self.num_members
        if self.doubted:
            self.num_trusted = (self.members & ~self.doubted).bit_count()

    def take_strays(self, strays: Sequence[Rider], now: float) -> WaveBatch:
        """The rows of these, which are at one layer, without the wave."""
        taken = []
        for rider in strays:
            taken.append((rider.seat, rider.seq, rider.num_rows))
            rider.num_rows = 0
        self.counters.alone_batches += 1
        self.counters.batch_of(len(taken))
        self.ready_at = None
        self.settle(now)
        return WaveBatch(self.index, strays[0].seq % self.num_layers, tuple(taken), is_alone=True)
