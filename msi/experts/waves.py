"""Waves: which attention nodes' rows an expert node runs together.

Decides, for one expert node, what its device takes next. Knows seats, lanes, sequence numbers and times that are
handed in; knows no sockets, tensors, clock or event loop.

An expert GEMM pays only when the rows of *all* attention nodes at the same layer run together, and an expert node
cannot know who will send. So each lane keeps a *wave*: the seats it expects, each with the base that turns the seat's
own sequence number into the wave's position. The layer of a sequence number is `seq % num_layers`.

- A batch is ready when every member has landed at the wave's position or moved past it, or when W has passed since the
  first rows of a member (also of one that is ahead: two nodes may each wait for a seat that the other holds). A seat
  in good standing is waited for 2 W, so that one node's wait is never the cause of the next node's eviction.
  Whoever is missing is evicted only when the device takes the batch: waiting behind a busy device is free.
- Rows out of step wait until the wave comes round to their layer; meeting there readmits their seat.
- A seat evicted again within a pass of its readmission is slow: its rows run alone, at most one such batch per
  16 T_f, until its next layer 0, where it waits for the wave.
- No rows wait longer than two passes: then they too run alone.
- A seat whose last layer said that no more follows leaves, and meeting does not readmit it.
- An empty lane gathers until every connected seat has landed, or W. A wave that empties is restarted by rows that wait
  here, those of the attention node of lowest rank. If no member of a wave lands for 2 W, it gives way to waiting rows
  of lower rank than its members (for two passes: to any). Without that order two nodes that wait for each other's
  seats would change over for ever and never agree.

W is one turn of the lane as measured here (m T_f in a full pipeline): from a batch to when half of the members have
landed for the next, and what that then waits for the device; the median of the last turns. Waiting for the late half
is left out, or W would feed on itself.
"""

from __future__ import annotations

import math

from msi.experts.batches import WaveBatch
from msi.experts.pace import EPSILON_S, Pace, WaveCounters
from msi.experts.wave import Rider, Wave

ALONE_PERIOD = 16  # batches served alone start at most once per 16 T_f


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
        self._pace = Pace(num_layers=num_layers, default_wait_s=default_wait_s, min_wait_s=min_wait_s)
        self._waves = [Wave(lane, num_layers, self._pace, self.counters) for lane in range(num_lanes)]
        self._alone_at = -math.inf
        self.landings = [wave.landed for wave in self._waves]  # `landed` of each lane, a call less away

    @property
    def wait_s(self) -> float:
        """W: how long a batch waits for members that were late before."""
        return self._pace.wait_s

    # -- events ------------------------------------------------------------------------------------------------------

    def connect(self, seat: int, rank: int) -> None:
        """A seat is taken; it joins a lane's wave where its first rows meet it.

        Args:
            rank: the attention node's number, the same at every expert node; where nodes disagree about who is in
                step, all of them prefer the lowest.
        """
        for wave in self._waves:
            wave.connect(seat, rank)

    def disconnect(self, seat: int, now: float) -> None:
        """A seat is gone, and with it whatever rows it had here."""
        for wave in self._waves:
            wave.disconnect(seat, now)

    def landed(self, seat: int, lane: int, seq: int, num_rows: int, more: bool, now: float) -> bool:
        """Rows of one seat at one layer, or (num_rows 0) the word that there are none.

        Args:
            more: whether this seat goes on after this sequence number; False only at a last layer.

        Returns:
            Whether `take` or `deadline` may answer differently than before.
        """
        return self._waves[lane].landed(seat, seq, num_rows, more, now)

    def again(self, seat: int, lane: int, seq: int, num_rows: int) -> WaveBatch:
        """Rows of a sequence number that landed before, packed anew since another node was lost: a batch of their own,
        for their seat is where it was, and the wave further on.
        """
        self.counters.alone_batches += 1
        self.counters.batch_of(1)
        return WaveBatch(lane, seq % self._num_layers, ((seat, seq, num_rows),), is_alone=True)

    # -- batches -----------------------------------------------------------------------------------------------------

    def take(self, now: float, is_busy: bool = False) -> WaveBatch | None:
        """The batch that a free device runs now, sealed; None when nothing is ready.

        Args:
            is_busy: the device is not free, but would have one more lie ready: only what all have landed for.
        """
        if is_busy:
            ready = [(wave.ready_at, wave.index, wave) for wave in self._waves if wave.ready_at is not None]
            return min(ready)[2].seal(now) if ready else None
        alone = self._take_alone(now)
        if alone is not None:
            return alone
        best: Wave | None = None
        best_at = now + EPSILON_S
        for wave in self._waves:
            if (at := wave.due_at()) <= best_at and (best is None or at < best_at):
                best, best_at = wave, at
        if best is None:
            return None
        if best.ready_at is None:  # W has passed
            best.give_way(now)
            if best.ready_at is None:  # the wave that took over has to wait for its own members
                return self.take(now)
        return best.seal(now)

    def deadline(self) -> float:
        """When `take` may have a batch though nothing lands; infinity if never."""
        at = min([wave.due_at() for wave in self._waves])
        for wave in self._waves:
            for rider in wave.strays:
                at = min(at, self._alone_from(wave, rider))
        return at

    # -- rows served alone -------------------------------------------------------------------------------------------

    def _alone_from(self, wave: Wave, rider: Rider) -> float:
        """From when these rows, which are out of step, may be served alone."""
        if wave.position is None:
            return math.inf
        if rider.is_slow and rider.seq % self._num_layers:
            wanted_at = rider.landed_at
        else:
            wanted_at = rider.landed_at + self._pace.two_passes_s
        num_waves = sum(other.position is not None for other in self._waves)
        return max(wanted_at, self._alone_at + ALONE_PERIOD * self._pace.wait_s / num_waves)  # W = m T_f

    def _take_alone(self, now: float) -> WaveBatch | None:
        """Rows that are not to wait for the wave any more, with all others out of step at their layer."""
        oldest: tuple[float, Wave, Rider] | None = None
        for wave in self._waves:
            for rider in wave.strays:
                due = self._alone_from(wave, rider) <= now + EPSILON_S
                if due and (oldest is None or rider.landed_at < oldest[0]):
                    oldest = (rider.landed_at, wave, rider)
        if oldest is None:
            return None
        _, wave, first = oldest
        layer = first.seq % self._num_layers
        self._alone_at = now
        return wave.take_strays([rider for rider in wave.strays if rider.seq % self._num_layers == layer], now)
