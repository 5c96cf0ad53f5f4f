"""The rules of waves written plainly, rider by rider and with nothing remembered that could be counted: what the quick
ones in `msi.experts` have to agree with to the bit. Not served; slow.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from statistics import median

from msi.experts.batches import WaveBatch
from msi.experts.pace import WaveCounters

EPSILON_S = 1e-9  # a timer may fire one rounding error early
ALONE_PERIOD = 16  # batches served alone start at most once per 16 T_f
TURNS_KEPT = 64
MEDIAN_EVERY = 8


@dataclass(slots=True)
class _Rider:
    """One seat in one lane."""

    seat: int
    rank: int
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
class _Lane:
    index: int
    riders: dict[int, _Rider] = field(default_factory=dict)
    position: int | None = None  # the wave's, in layers; None while the lane has no wave
    moved_at: float = -math.inf  # when the wave came to its position
    num_missing: int = 0  # members that have not landed at the position
    num_trusted_missing: int = 0  # those of them that are waited for longer
    num_members: int = 0
    waited_since: float | None = None  # first rows of a member at the position
    ahead_since: float | None = None  # first rows of a member ahead of the position
    half_at: float | None = None  # when half of the members had landed
    ready_at: float | None = None  # since when everyone has landed and there are rows
    strays: list[_Rider] = field(default_factory=list)  # riders with rows that are not members
    gather_since: float | None = None  # first rows in a lane without a wave
    sealed: tuple[int, float] | None = None  # position and time of the last batch


class Waves:
    """The waves of one expert node, one per lane.

    Args:
        num_layers: layers per pass; a seat's sequence number counts the layers since its start.
        num_lanes: the most lanes that any seat uses.
        default_wait_s: W until a turn was measured.
        min_wait_s: W is never less; it covers the scheduling noise of a real host.
    """

    def __init__(
        self, *, num_layers: int, num_lanes: int, default_wait_s: float = 0.020, min_wait_s: float = 0.0
    ) -> None:
        self.counters = WaveCounters()
        self._num_layers = num_layers
        self._lanes = [_Lane(index) for index in range(num_lanes)]
        self._min_wait_s = min_wait_s
        self._turns: deque[float] = deque(maxlen=TURNS_KEPT)
        self._num_turns = 0
        self._turn_s = default_wait_s
        self._alone_at = -math.inf

    @property
    def wait_s(self) -> float:
        """W: how long a batch waits for members that were late before."""
        return max(self._turn_s, self._min_wait_s)

    @property
    def _trusting_wait_s(self) -> float:
        """How long it waits for the others. More than W, so that one node's wait is never the cause of the next's."""
        return 2 * self.wait_s

    @property
    def _two_passes_s(self) -> float:
        return 2 * self._num_layers * self.wait_s

    # -- events ------------------------------------------------------------------------------------------------------

    def connect(self, seat: int, rank: int) -> None:
        """A seat is taken; it joins a lane's wave where its first rows meet it.

        Args:
            rank: the attention node's number, the same at every expert node; where nodes disagree about who is in
                step, all of them prefer the lowest.
        """
        for lane in self._lanes:
            assert seat not in lane.riders, f"seat {seat} is connected already"
            lane.riders[seat] = _Rider(seat, rank)

    def disconnect(self, seat: int, now: float) -> None:
        """A seat is gone, and with it whatever rows it had here."""
        for lane in self._lanes:
            del lane.riders[seat]
            self._settle(lane, now)

    def landed(self, seat: int, lane_index: int, seq: int, num_rows: int, more: bool, now: float) -> bool:
        """Rows of one seat at one layer, or (num_rows 0) the word that there are none.

        Args:
            more: whether this seat goes on after this sequence number; False only at a last layer.

        Returns:
            Whether `take` or `deadline` may answer differently than before.
        """
        lane = self._lanes[lane_index]
        rider = lane.riders[seat]
        gave_up = rider.num_rows > 0  # rows that were never taken: its worker began a pass anew
        was_missing = lane.position is not None and rider.base is not None and rider.seq - rider.base < lane.position
        was_trusted = was_missing and self._is_trusted(lane, rider)
        rider.seq, rider.num_rows, rider.landed_at, rider.is_last = seq, num_rows, now, not more
        if was_missing and lane.waited_since is not None and now - lane.waited_since > self.wait_s + EPSILON_S:
            rider.late_at = lane.position
        if lane.position is None or gave_up:
            pass
        elif rider.base is None:
            if num_rows == 0:  # it does not stay: it meets the wave now or not at this layer
                if not self._meets(lane, rider):
                    return False
                self._admit(lane, rider)
        elif not was_missing or lane.num_missing > 1:  # nothing gets ready by this
            lane.num_missing -= was_missing
            lane.num_trusted_missing -= was_trusted
            is_news = was_trusted and lane.num_trusted_missing == 0
            return self._watch(lane, rider, now) or is_news
        self._settle(lane, now)
        return True

    def take(self, now: float, is_busy: bool = False) -> WaveBatch | None:
        """The batch that a free device runs now, sealed; None when nothing is ready.

        Args:
            is_busy: the device is not free, but would have one more lie ready: only what all have landed for.
        """
        if is_busy:
            ready = [lane for lane in self._lanes if lane.ready_at is not None]
            return self._seal(min(ready, key=lambda lane: lane.ready_at), now) if ready else None
        alone = self._take_alone(now)
        if alone is not None:
            return alone
        best: _Lane | None = None
        best_at = now + EPSILON_S
        for lane in self._lanes:
            if (at := self._ready_at(lane)) <= best_at and (best is None or at < best_at):
                best, best_at = lane, at
        if best is None:
            return None
        if best.ready_at is None:  # W has passed
            if best.position is None:
                self._start(best, now)
            else:
                self._evict_missing(best)
                self._settle(best, now)
            if best.ready_at is None:  # the wave that took over has to wait for its own members
                return self.take(now)
        return self._seal(best, now)

    def deadline(self) -> float:
        """When `take` may have a batch though nothing lands; infinity if never."""
        at = min(self._ready_at(lane) for lane in self._lanes)
        for lane in self._lanes:
            for rider in lane.strays:
                at = min(at, self._alone_from(lane, rider))
        return at

    def _watch(self, lane: _Lane, rider: _Rider, now: float) -> bool:
        """Starts the times that a member's landing starts; whether it started one."""
        assert lane.position is not None
        if lane.half_at is None and 2 * lane.num_missing <= lane.num_members:
            lane.half_at = now
        if rider.base is None or not rider.num_rows:
            return False
        ahead = rider.seq - rider.base - lane.position
        if ahead == 0 and lane.waited_since is None:
            lane.waited_since = now
            return True
        if ahead > 0 and lane.ahead_since is None:
            lane.ahead_since = now
            return True
        return False

    # -- when --------------------------------------------------------------------------------------------------------

    def _ready_at(self, lane: _Lane) -> float:
        if lane.ready_at is not None:
            return lane.ready_at
        if lane.position is None:
            return math.inf if lane.gather_since is None else lane.gather_since + self.wait_s
        if lane.waited_since is not None:
            return lane.waited_since + (self._trusting_wait_s if lane.num_trusted_missing else self.wait_s)
        if lane.ahead_since is not None:
            return lane.ahead_since + self._trusting_wait_s
        if lane.strays:  # nobody of the wave lands here, while others wait
            since = max(lane.moved_at, min(rider.landed_at for rider in lane.strays))
            first = min(rider.rank for rider in lane.strays)
            is_first = all(first < rider.rank for rider in lane.riders.values() if rider.base is not None)
            return since + (self._trusting_wait_s if is_first else self._two_passes_s)
        return math.inf

    def _alone_from(self, lane: _Lane, rider: _Rider) -> float:
        """From when these rows, which are out of step, may be served alone."""
        if lane.position is None:
            return math.inf
        if rider.is_slow and rider.seq % self._num_layers:
            wanted_at = rider.landed_at
        else:
            wanted_at = rider.landed_at + self._two_passes_s
        num_waves = sum(other.position is not None for other in self._lanes)
        return max(wanted_at, self._alone_at + ALONE_PERIOD * self.wait_s / num_waves)  # W = m T_f

    # -- membership --------------------------------------------------------------------------------------------------

    def _meets(self, lane: _Lane, rider: _Rider) -> bool:
        """Whether a seat that is no member is in step with the wave: at its layer, or just before it."""
        assert lane.position is not None
        if (rider.seq - lane.position) % self._num_layers > 1 or rider.is_last:
            return False
        return not rider.is_slow or rider.seq % self._num_layers == 0

    def _is_trusted(self, lane: _Lane, rider: _Rider) -> bool:
        """Whether a member is more than a pass away from its last readmission and its last lateness."""
        return not (self._is_within_pass(lane, rider.readmitted_at) or self._is_within_pass(lane, rider.late_at))

    def _is_within_pass(self, lane: _Lane, since: int | None) -> bool:
        assert lane.position is not None
        return since is not None and lane.position - since <= self._num_layers

    def _admit(self, lane: _Lane, rider: _Rider) -> None:
        assert lane.position is not None
        ahead = (rider.seq - lane.position) % self._num_layers
        rider.base = rider.seq - lane.position - ahead
        rider.is_slow = False
        if rider.was_evicted:
            rider.readmitted_at = lane.position
            self.counters.readmissions += 1

    def _evict_missing(self, lane: _Lane) -> None:
        assert lane.position is not None
        for rider in lane.riders.values():
            if rider.base is None or rider.seq - rider.base >= lane.position:
                continue
            rider.base = None
            rider.is_slow = self._is_within_pass(lane, rider.readmitted_at)
            rider.was_evicted = True
            rider.readmitted_at = rider.late_at = None
            self.counters.evictions += 1

    def _start(self, lane: _Lane, now: float) -> None:
        """A new wave at the layer of the oldest rows here, or none."""
        lane.gather_since = lane.sealed = lane.position = None
        lane.waited_since = lane.ahead_since = lane.ready_at = None
        waiting = [rider for rider in lane.riders.values() if rider.num_rows]
        first = min(waiting, key=lambda rider: (rider.is_slow, rider.rank), default=None)
        if first is None:
            lane.strays = []
            return
        self._move(lane, first.seq, now)
        self.counters.starts += 1
        for rider in lane.riders.values():
            rider.base = rider.readmitted_at = rider.late_at = None
            is_alive = rider.num_rows > 0 or rider.landed_at >= now - self.wait_s
            if rider is first or (is_alive and self._meets(lane, rider)):
                self._admit(lane, rider)
        self._settle(lane, now)

    # -- the wave's course -------------------------------------------------------------------------------------------

    def _move(self, lane: _Lane, position: int, now: float) -> None:
        lane.position, lane.moved_at = position, now
        lane.waited_since = lane.ahead_since = lane.half_at = lane.ready_at = None

    def _settle(self, lane: _Lane, now: float) -> None:
        """Brings a lane up to date: whom the wave meets, who is missing, positions that nobody has rows for."""
        if lane.position is None:
            self._gather(lane, now)
            return
        while True:
            position = lane.position
            layer = position % self._num_layers
            num_members = num_missing = num_trusted_missing = 0
            has_rows = False
            strays = []
            for rider in lane.riders.values():
                if rider.base is None and rider.num_rows and self._meets(lane, rider):
                    self._admit(lane, rider)
                if rider.base is None:
                    if rider.num_rows:
                        strays.append(rider)
                        has_rows |= rider.seq % self._num_layers == layer
                    continue
                ahead = rider.seq - rider.base - position
                if ahead < 0 and rider.is_last:  # it has left
                    rider.base, rider.was_evicted = None, False
                    continue
                num_members += 1
                if ahead < 0:
                    num_missing += 1
                    num_trusted_missing += self._is_trusted(lane, rider)
                has_rows |= ahead == 0 and rider.num_rows > 0
            lane.num_missing, lane.num_trusted_missing, lane.strays = num_missing, num_trusted_missing, strays
            lane.num_members = num_members
            if num_members == 0:
                self._start(lane, now)
                return
            for rider in lane.riders.values():
                self._watch(lane, rider, now)
            if num_missing:
                lane.ready_at = None
                return
            if has_rows:
                if lane.ready_at is None:
                    lane.ready_at = now
                return
            self._move(lane, position + 1, now)

    def _gather(self, lane: _Lane, now: float) -> None:
        """An empty lane waits for every connected seat."""
        oldest = min((r for r in lane.riders.values() if r.num_rows), key=lambda r: r.landed_at, default=None)
        if oldest is None:
            lane.gather_since = None
            return
        if lane.gather_since is None:
            lane.gather_since = now
        for rider in lane.riders.values():
            is_near = not rider.is_last and (rider.seq - oldest.seq) % self._num_layers <= 1
            if not rider.num_rows and not (is_near and rider.landed_at >= now - self.wait_s):
                return
        self._start(lane, now)

    # -- batches -----------------------------------------------------------------------------------------------------

    def _seal(self, lane: _Lane, now: float) -> WaveBatch:
        position = lane.position
        assert position is not None
        layer = position % self._num_layers
        taken = []
        for rider in lane.riders.values():
            if not rider.num_rows:
                continue
            if rider.seq % self._num_layers == layer if rider.base is None else rider.seq - rider.base == position:
                taken.append((rider.seat, rider.seq, rider.num_rows))
                rider.num_rows = 0
        if lane.sealed is not None and lane.sealed[0] == position - 1 and lane.half_at is not None:
            assert lane.ready_at is not None
            self._measure((lane.half_at - lane.sealed[1]) + (now - lane.ready_at))
        lane.sealed = (position, now)
        self._count(len(taken))
        self._move(lane, position + 1, now)
        self._settle(lane, now)
        return WaveBatch(lane.index, layer, tuple(taken))

    def _take_alone(self, now: float) -> WaveBatch | None:
        """Rows that are not to wait for the wave any more, with all others out of step at their layer."""
        oldest: tuple[float, _Lane, _Rider] | None = None
        for lane in self._lanes:
            for rider in lane.strays:
                due = self._alone_from(lane, rider) <= now + EPSILON_S
                if due and (oldest is None or rider.landed_at < oldest[0]):
                    oldest = (rider.landed_at, lane, rider)
        if oldest is None:
            return None
        _, lane, first = oldest
        layer = first.seq % self._num_layers
        taken = []
        for rider in lane.strays:
            if rider.seq % self._num_layers == layer:
                taken.append((rider.seat, rider.seq, rider.num_rows))
                rider.num_rows = 0
        self._alone_at = now
        self.counters.alone_batches += 1
        self._count(len(taken))
        lane.ready_at = None
        self._settle(lane, now)
        return WaveBatch(lane.index, layer, tuple(taken), is_alone=True)

    def _count(self, num_seats: int) -> None:
        self.counters.batches += 1
        self.counters.wave_sizes[num_seats] = self.counters.wave_sizes.get(num_seats, 0) + 1

    def _measure(self, turn_s: float) -> None:
        self._turns.append(turn_s)
        self._num_turns += 1
        if self._num_turns < MEDIAN_EVERY or self._num_turns % MEDIAN_EVERY == 0:
            self._turn_s = median(self._turns)
