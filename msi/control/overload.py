"""What an instance owes to the requests that it takes, what it refuses for their sake, and what it measures of each.

Decides; knows no workers but by their loads, and no clock.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from msi.control.prediction import Mean, Meters, Occupancy
from msi.control.routed import Load, Routed
from msi.errors import DeadlineExceeded, Overloaded
from msi.settings import ServiceLevel
from msi.types import Progress

HEADROOM = 0.8  # of an objective, up to which predictions may come: half of them are too small
MORE_CAUTION, LESS_CAUTION = 1.1, 0.995  # with each first token that came late, and in time: one in twenty may be late
MOST_CAUTION = 4.0
PASSES_BEHIND = 2  # so many may be through at a worker before it gets what follows from the first
FIRST_ANSWER = 128  # tokens that an answer is thought to have before any has ended


@dataclass(frozen=True, slots=True)
class Objectives:
    """In seconds; infinity for none."""

    ttft_s: float = math.inf
    tpot_s: float = math.inf

    @staticmethod
    def of(level: ServiceLevel) -> Objectives:
        return Objectives(*((one / 1000 if one else math.inf) for one in (level.ttft_slo_ms, level.tpot_slo_ms)))


def backlog_of(max_num_seqs: int, mean_output: float) -> int:
    """Requests that a worker has besides those that it can run: as many as may end before it hears of more.

    No more than that: what waits at a worker is overtaken there by whatever goes first, and computed though its first
    token comes too late; what waits here is ended before it costs anything.

    Args:
        mean_output: tokens of an answer, of which each pass computes one; 0 where that is not known yet.
    """
    most = 1 + max_num_seqs // 4
    return min(most, 1 + math.ceil(PASSES_BEHIND * max_num_seqs / mean_output)) if mean_output else most


def too_late(predicted_s: float, objective_s: float) -> Overloaded:
    """The refusal of a request whose first token would come so late."""
    after_s = max(1.0, math.ceil(predicted_s - objective_s))  # what waits becomes less by a second every second
    return Overloaded(
        f"the first token would come in about {predicted_s:.3g} s, and is to come within {objective_s:g} s; try again "
        f"in {after_s:.0f} s",
        code="overloaded",
        retry_after_s=after_s,
    )


def out_of_time(timeout_s: float, num_tokens: int) -> DeadlineExceeded:
    """The end of a request that had so long, and has so many tokens."""
    came = f"its answer had {num_tokens} tokens" if num_tokens else "it had not begun to run, or had no token yet"
    return DeadlineExceeded(f"the {timeout_s:.4g} s that this request gave itself were over; {came}", code="timeout")


class Service:
    """Of one instance.

    Args:
        max_num_seqs: sequences that run at a time, per worker.

    Attributes:
        meters: what requests took.
    """

    def __init__(self, objectives: Objectives, max_num_seqs: int) -> None:
        self.meters = Meters()
        self._caution = dict.fromkeys((-1, 0, 1), 1.0)  # by urgency: times what is predicted, as so many came late
        self._before = {urgency: Mean() for urgency in (-1, 0, 1)}  # by urgency: of those that begin, who go first
        self._objectives = objectives
        self._max_num_seqs = max_num_seqs

    def num_places(self, capacity: int) -> int:
        """Sequences that a worker with so many tokens of KV cache runs at a time."""
        return self.meters.places(self._max_num_seqs, capacity, self._objectives.tpot_s)

    def is_free(self, load: Load, capacity: int, cost: float) -> bool:
        """Whether a worker could begin at once with a request that takes about so many tokens."""
        return load.num_requests < self.num_places(capacity) and load.num_expected + cost <= capacity

    def refusal(
        self, num_prompt: int, num_before: int, workers: Iterable[tuple[int, Load]], priority: int = 0
    ) -> Overloaded | None:
        """Of a request that comes now, whose first token would come too late.

        Args:
            num_before: requests without a worker that go first.
            workers: capacity and load of each.
        """
        if self._objectives.ttft_s == math.inf:
            return None
        occupied = [
            Occupancy(self.num_places(capacity), load.num_requests, load.num_prompt_tokens)
            for capacity, load in workers
        ]
        urgency = _urgency(priority)
        ttft_s = self.meters.ttft_s(num_prompt, num_before, occupied, self._before[urgency].value)
        return self._too_late(self._caution[urgency] * ttft_s, HEADROOM)

    def is_too_late(self, routed: Routed, now: float) -> Overloaded | None:
        """The refusal of one that has waited for so long that its first token cannot come in time any more."""
        if routed.num_resumptions or self._objectives.ttft_s == math.inf or now <= routed.came_at:
            return None
        prefill_s = self.meters.prefill.at(len(routed.request.prompt_token_ids))
        return self._too_late(now - routed.came_at + prefill_s / HEADROOM)

    def _too_late(self, ttft_s: float, headroom: float = 1.0) -> Overloaded | None:
        objective_s = self._objectives.ttft_s
        return too_late(ttft_s, objective_s) if ttft_s > headroom * objective_s else None

    def started(self, routed: Routed, load: Load, first: Progress, now: float) -> Progress:
        """Its first token from its worker, whose `load` counts it as started, has come; what its client is told."""
        routed.num_beside, routed.load_at_first = load.num_requests - load.num_unstarted, load.predicted
        routed.admitted_at = min(now, routed.given_at + first.queued_s)
        if routed.first_at is not None:
            return first
        routed.first_at = now
        is_late = now - routed.came_at > self._objectives.ttft_s
        urgency = _urgency(routed.request.priority)
        caution = self._caution[urgency] * (MORE_CAUTION if is_late else LESS_CAUTION)
        self._caution[urgency] = min(MOST_CAUTION, max(1.0, caution))
        for other, share in self._before.items():
            share.add(float(urgency < other))
        # where it waited for a place, the prompts before it were computed meanwhile
        has_waited = first.queued_s > 0.5 * (now - routed.given_at)
        num_prompt = len(routed.request.prompt_token_ids)
        self.meters.prefill.add(num_prompt if has_waited else routed.num_computed, now - routed.admitted_at)
        waited_s = routed.given_at - routed.came_at
        return first._replace(queued_s=first.queued_s + waited_s) if waited_s > 0 else first

    def ended(self, routed: Routed, worker_id: str, load: Load, now: float) -> None:
        """It has come to its end, and its worker's `load` is what it left behind."""
        num_output = len(routed.token_ids)
        self.meters.num_tokens.add(len(routed.request.prompt_token_ids) + num_output)
        if routed.num_resumptions or routed.first_at is None:
            return
        self.meters.stay.add(now - routed.admitted_at)
        if num_output > 1:
            num_beside = (routed.num_beside + load.num_requests - load.num_unstarted + 1) / 2
            step_s = (now - routed.first_at) / (num_output - 1)
            self.meters.tpot.add(num_beside, step_s)
            self.meters.add_step(worker_id, (routed.load_at_first + load.predicted + routed.predicted) / 2, step_s)


def _urgency(priority: int) -> int:
    """Whether it goes before most, as most, or after them."""
    return (priority > 0) - (priority < 0)
