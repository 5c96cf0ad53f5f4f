"""When the first token of a request would come, and how many sequences a worker may run so that tokens come in time.

Predicted from what this instance's own requests took: how long a prompt took by the tokens that were computed before it
and with it, how long a sequence took from admission to its end, and how long a token took by the sequences beside it.
Nothing is predicted before the first ones have ended, and then everybody is taken.

Pure: values in, values out. Knows no requests or clock.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field

REMEMBERED = 64  # what is measured is a mean of about the last so many
SEEN_OFTEN = 8  # then a worker is known
NOISE = 1.2
MOST_BEFORE = 0.9  # of what begins; somebody else always comes to it
MIN_SPREAD = 0.05  # of x, relative to its mean: below it a slope is not to be told from noise


@dataclass(slots=True)
class Mean:
    """Of the last few; 0 before the first."""

    value: float = 0.0
    num_seen: int = 0

    def add(self, value: float) -> None:
        self.num_seen += 1
        self.value += (value - self.value) / min(self.num_seen, REMEMBERED)


@dataclass(slots=True)
class Line:
    """The straight line through the last few points, by least squares; neither its slope nor its start are below 0."""

    x: Mean = field(default_factory=Mean)
    y: Mean = field(default_factory=Mean)
    xx: Mean = field(default_factory=Mean)
    xy: Mean = field(default_factory=Mean)

    def add(self, x: float, y: float) -> None:
        for mean, value in ((self.x, x), (self.y, y), (self.xx, x * x), (self.xy, x * y)):
            mean.add(value)

    @property
    def start_and_slope(self) -> tuple[float, float]:
        """Where the points are all alike, they are taken to lie on a line through the origin."""
        x, y = self.x.value, self.y.value
        spread = self.xx.value - x * x
        if x <= 0:
            return y, 0.0
        if spread <= (MIN_SPREAD * x) ** 2:
            return 0.0, y / x
        slope = min(max(0.0, (self.xy.value - x * y) / spread), y / x)
        return y - slope * x, slope

    def at(self, x: float) -> float:
        """What y is there; 0 before the first point."""
        start, slope = self.start_and_slope
        return start + slope * x

    def most_x(self, y: float) -> float:
        """The greatest x whose y is at most this; infinity before the first point."""
        start, slope = self.start_and_slope
        if not self.y.num_seen or (slope == 0.0 and start <= y):
            return math.inf
        return max(0.0, (y - start) / slope) if slope > 0.0 else 0.0


@dataclass(slots=True)
class Meters:
    """What requests of this instance took, in seconds.

    Attributes:
        prefill: from a sequence's admission to its first token, by tokens of prompts computed in that time.
        tpot: of each token after the first, by the sequences that ran beside it on its worker.
        step: the same by the load of the worker (`msi.control.routed.Load.predicted`), of all workers.
        slowness: of each worker, what its steps took over what `step` says.
        stay: from a sequence's admission to its end.
        num_tokens: of sequences, prompt and answer.
    """

    prefill: Line = field(default_factory=Line)
    tpot: Line = field(default_factory=Line)
    step: Line = field(default_factory=Line)
    slowness: dict[str, Mean] = field(default_factory=dict)
    stay: Mean = field(default_factory=Mean)
    num_tokens: Mean = field(default_factory=Mean)

    def add_step(self, worker_id: str, load: float, step_s: float) -> None:
        """A worker with this load took so long for a token of each of its sequences."""
        if self.step.y.num_seen and (expected_s := self.step.at(load)) > 0:
            self.slowness.setdefault(worker_id, Mean()).add(step_s / expected_s)
        self.step.add(load, step_s)

    def relative(self, worker_id: str, load: float) -> float:
        """A load as time there, compared with other workers: of those that are slow it counts for more.

        Workers that differ by less than a fifth are taken to be alike: so much is noise. In proportion to the load, so
        that a slow one always gets some, and is measured on.
        """
        seen = self.slowness.get(worker_id)
        slowness = 1.0 if seen is None or seen.num_seen < SEEN_OFTEN else seen.value
        return load if 1 / NOISE < slowness < NOISE else load * slowness

    def step_s(self, worker_id: str, load: float) -> float:
        """What a step takes there with such a load."""
        return self.step.at(load) * self.relative(worker_id, 1.0)

    def places(self, max_num_seqs: int, capacity: int, tpot_slo_s: float) -> int:
        """Sequences that a worker runs at a time, at least 1.

        Args:
            capacity: tokens of its KV cache.
            tpot_slo_s: infinity for none.
        """
        most = float(max_num_seqs)
        if self.num_tokens.value:
            most = min(most, capacity / self.num_tokens.value)
        return max(1, int(min(most, self.tpot.most_x(tpot_slo_s))))

    def ttft_s(
        self, num_prompt: int, num_before: int, workers: Collection[Occupancy], share_before: float = 0.0
    ) -> float:
        """Until the first token of a request that comes now.

        Args:
            num_before: requests that no worker has yet and that go first.
            share_before: of the requests that begin, those that go before it whenever they come.
        """
        if not workers:
            return 0.0
        num_free = sum(max(0, one.num_places - one.num_requests) for one in workers)
        if num_before < num_free:
            ahead = min(one.num_prompt_tokens for one in workers if one.num_requests < one.num_places)
            return self.prefill.at(ahead + num_prompt)
        # places come free at this rate (Little's law), and each that waits takes one
        num_taken = sum(min(one.num_places, one.num_requests) for one in workers)
        num_waiting = num_before - num_free + sum(max(0, one.num_requests - one.num_places) for one in workers)
        wait_s = (num_waiting + 1) * self.stay.value / max(1, num_taken)
        # those that come while it waits and go first take their share of these places (Cobham, 1954: 1 / (1 - rho))
        return wait_s / (1 - min(share_before, MOST_BEFORE)) + self.prefill.at(num_prompt)


@dataclass(frozen=True, slots=True)
class Occupancy:
    """An attention worker as predictions see it.

    Attributes:
        num_places: sequences that it runs at a time.
        num_requests: that it has, be it that they wait.
        num_prompt_tokens: of those that have no token yet.
    """

    num_places: int
    num_requests: int
    num_prompt_tokens: int
