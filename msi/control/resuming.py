"""Requests whose worker is lost, or that it lets go: they go on at another one, which computes prompt and output again,
or wait for one; or end, where they may not. Decides; does not act. Knows no sockets or clock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from msi.control.fair_queue import FairQueue
from msi.control.move_messages import Released
from msi.control.routed import Routed, Updates
from msi.control.suspects import Suspects, Trials, guilty
from msi.errors import EngineError, Failure, RequestFailed
from msi.types import Progress


class Resuming:
    """Of one instance.

    Args:
        requests: all of them, by id.
        waiting: those without a worker.
        free: a request counts for its worker no longer.
        forget: one has ended.
        max_num_seqs: sequences that run at a time, per worker.
        max_resumptions: how often a request is given to another worker.
        hold_timeout_s: it waits so long for that one.

    Attributes:
        num_resumptions: of all requests, since the start.
        num_moved: requests that workers have let go.
    """

    def __init__(
        self,
        requests: Mapping[str, Routed],
        waiting: FairQueue,
        suspects: Suspects,
        trials: Trials,
        *,
        free: Callable[[Routed], None],
        forget: Callable[[Routed], None],
        max_num_seqs: int,
        max_resumptions: int,
        hold_timeout_s: float,
    ) -> None:
        self.num_resumptions = self.num_moved = 0
        self._requests = requests
        self._waiting = waiting
        self._suspects = suspects
        self._trials = trials
        self._free = free
        self._forget = forget
        self._max_num_seqs = max_num_seqs
        self._max_resumptions = max_resumptions
        self._hold_timeout_s = hold_timeout_s

    def worker_lost(self, worker_id: str, reason: str, now: float, has_crashed: bool) -> Updates:
        """See `Router.worker_lost`."""
        lost = [routed for routed in self._requests.values() if routed.worker_id == worker_id]
        on_trial = [routed for routed in lost if self._trials.end(worker_id, routed.request.request_id)]
        if has_crashed and on_trial:
            self._suspects.convict(on_trial[0].asked, now)
            lost += [one for one in self._waiting if one.is_suspect and one.asked == on_trial[0].asked]
        elif has_crashed:
            ran = [routed for index, routed in enumerate(lost) if index < self._max_num_seqs or routed.token_ids]
            self._suspects.crashed([routed.asked for routed in ran], now)
            for routed in ran:
                routed.is_suspect = True
        return self.resume(lost, f"attention worker {worker_id} was lost: {reason}", now)

    def released(self, released: Released, now: float) -> Updates:
        """See `Router.released`."""
        routed = self._requests.get(released.request_id)
        if routed is None or routed.worker_id != released.worker_id or routed.release != released.number:
            return {}  # it ended meanwhile, or is another one that is called so
        if (len(routed.token_ids), routed.num_scored) != (released.num_tokens, released.num_scored):
            return self.resume([routed], f"tokens of attention worker {routed.worker_id} were lost on the way", now)
        self._take_back(routed)
        routed.lost_by = f"attention worker {released.worker_id} let it go, for another one"
        self.num_moved += 1
        routed.num_moves += 1
        self._wait_again(routed, now)
        return {}

    def resume(self, lost: Iterable[Routed], why: str, now: float) -> Updates:
        """These wait for another worker, before those that came later; the ends of those that may not."""
        updates: Updates = {}
        for routed in lost:
            self._take_back(routed)
            routed.lost_by = why
            error = self._why_not(routed, now)
            if error is not None:
                self._forget(routed)
                updates.setdefault(routed.client, []).append(Progress(routed.name, failure=Failure.of(error)))
                continue
            self.num_resumptions += 1
            self._wait_again(routed, now)
        return updates

    def _take_back(self, routed: Routed) -> None:
        self._free(routed)
        routed.worker_id, routed.predicted, routed.release = "", 0.0, 0

    def _wait_again(self, routed: Routed, now: float) -> None:
        routed.num_resumptions += 1
        routed.waits_until = now + self._hold_timeout_s
        self._waiting.add_again(routed)

    def _why_not(self, routed: Routed, now: float) -> EngineError | None:
        if self._suspects and self._suspects.is_guilty(routed.asked, now):
            return guilty(routed.lost_by)
        times = routed.num_resumptions - routed.num_moves
        if times >= self._max_resumptions:
            before = f"; it had been resumed {times} time{'s' * (times != 1)} before, and is no more" if times else ""
            return RequestFailed(routed.lost_by + before)
        return None
