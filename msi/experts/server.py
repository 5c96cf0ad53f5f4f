"""The expert half's course: take a closed wave for a layer, run its experts, write back, take the next.

What lands is told by the link on the event loop; what is finished is a word that the device raises, seen first on its
own thread, where it has one: there the next batch is taken and launched, and then the answers are posted, without going
through the loop. The link's lock keeps the waves whole.
Knows seats, waves and answers; knows no requests, weights or sockets.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from msi.complaints import Complaints
from msi.errors import one_line
from msi.experts.batch_meter import BatchMeter
from msi.experts.batches import WaveBatch
from msi.experts.waves import Waves
from msi.net.combine_link import CombineLink
from msi.net.combine_seats import Told
from msi.net.regions import Region

log = logging.getLogger(__name__)


class ExpertCompute(Protocol):
    """The experts of one node on a device."""

    depth: int  # batches that may be out: more than 1 where the device would stand still from one to the next

    def attach(self, seat: int, out_rows: Region) -> None:
        """Answers to this seat go into `out_rows` from now on."""

    def run(self, batch: WaveBatch, ticket: int) -> None:
        """Launches one layer's experts over the batch's rows, and a signal of the ticket behind them. Tickets rise."""

    def follow(self, seen: Callable[[int], None]) -> None:
        """Calls `seen` with each ticket, on whatever thread sees it: answers lie where they leave."""

    def outcome(self) -> tuple[float, Exception | None]:
        """Seconds of the device's time that it took, and an error if any; for each ticket, as it is seen, once."""


class ExpertServer:
    """Serves the seats of one expert node; implements `msi.net.combine_seats.Listener`.

    Args:
        clock: seconds; the one that `waves` and `link` were given.

    Attributes:
        meter: of batches, by their size.
    """

    def __init__(
        self, link: CombineLink, waves: Waves, compute: ExpertCompute, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._link = link
        self._waves = waves
        self._compute = compute
        self._clock = clock
        self._lock = link.lock  # over the waves and what follows
        self.meter = BatchMeter()
        self._num_tickets = 0
        self._out: dict[int, WaveBatch] = {}  # by ticket, on the device
        self._again: deque[WaveBatch] = deque()  # to run before what the waves say
        self._is_closed = False
        self._timer_at = math.inf
        self._timer: asyncio.TimerHandle | None = None  # that was set last
        self._loop = asyncio.get_running_loop()
        self._complaints = Complaints(log)
        compute.follow(self._finished)

    def close(self) -> None:
        """Starts no more batches. Idempotent."""
        with self._lock:
            self._is_closed = True
        self._stop_timer()

    # -- on the event loop -------------------------------------------------------------------------------------------

    def joined(self, seat: int, node: int, out_rows: Region) -> None:
        self._compute.attach(seat, out_rows)
        with self._lock:
            self._waves.connect(seat, node)

    def left(self, seat: int) -> None:
        with self._lock:
            self._waves.disconnect(seat, self._clock())
            self._start_next()

    def told(self, lane: int) -> Told:
        return self._waves.landings[lane]

    def not_taken(self, seat: int, lane: int, seq: int, error: Exception) -> None:
        self._complaints.say(error, "rows that landed could not be taken")
        self._link.refuse(seat, lane, seq, _why(error))

    def landed_again(self, seat: int, lane: int, seq: int, num_rows: int) -> bool:
        """Their peer waits for these alone, and its wave has gone on: they run next."""
        self._again.append(self._waves.again(seat, lane, seq, num_rows))
        return True

    def all_landed(self) -> None:
        try:
            self._start_next()
        except Exception as error:
            self._complaints.say(error, "the next batch could not be started")

    def _set_timer(self) -> None:
        self._stop_timer()
        if not self._is_closed:
            delay_s = max(0.0, self._timer_at - self._clock())
            self._timer = self._loop.call_later(delay_s, self._time_is_up, self._timer_at)

    def _stop_timer(self) -> None:
        """Else it would hold all that is here until it comes."""
        if self._timer is not None:
            self._timer.cancel()

    def _time_is_up(self, timer_at: float) -> None:
        self._link.take()  # nobody is evicted whose rows lie here
        with self._lock:
            if timer_at == self._timer_at:  # no earlier one was set meanwhile
                self._timer_at = math.inf
                self._start_next()

    # -- on either thread --------------------------------------------------------------------------------------------

    def _start_next(self) -> None:
        """Gives the device what it may have, or sees to it that this is called when there may be more. Needs the lock.

        A device that is busy gets only what all have landed for: time evicts nobody before it is free. Deadlines mostly
        move on before they come, so a timer that is set already is let run out and set anew then.
        """
        if self._is_closed:
            return
        while len(self._out) < self._compute.depth:
            batch = self._again.popleft() if self._again else self._waves.take(self._clock(), bool(self._out))
            if batch is None:
                break
            self._num_tickets += 1
            self._out[self._num_tickets] = batch
            try:
                self._compute.run(batch, self._num_tickets)
            except Exception as error:
                del self._out[self._num_tickets]
                self._complaints.say(error, "a batch could not be launched")
                self._refuse(batch, error)
        if not self._out and (deadline := self._waves.deadline()) < self._timer_at:
            self._timer_at = deadline
            self._loop.call_soon_threadsafe(self._set_timer)

    def _finished(self, ticket: int) -> None:
        """Must not raise: the device's thread calls it. A batch of several seats that failed runs again seat by seat,
        so that only the one whose rows are to blame is refused.
        """
        batch = self._out[ticket]
        compute_s, error = self._compute.outcome()
        try:
            with self._lock:
                del self._out[ticket]
                if error is not None and len(batch.rows) > 1:
                    self._again += [replace(batch, rows=(rows,)) for rows in batch.rows]
                self._start_next()
        except Exception as second:
            self._complaints.say(second, "the next batch could not be started")
        if error is not None:
            self._complaints.say(error, f"layer {batch.layer} failed")
            if len(batch.rows) > 1:
                return
        try:
            if error is None:
                self._link.answer(batch.lane, batch.rows, compute_s)
                self.meter.add(sum([num_rows for _, _, num_rows in batch.rows]), compute_s)
            else:
                self._refuse(batch, error)
        except Exception as second:
            self._complaints.say(second, "an answer could not be given")

    def _refuse(self, batch: WaveBatch, error: Exception) -> None:
        for seat, seq, _ in batch.rows:
            self._link.refuse(seat, batch.lane, seq, _why(error))


def _why(error: Exception) -> str:
    return f"could not compute its experts: {one_line(error)}"
