"""What this edge counts of requests. A field's name is vLLM's for the same thing: vllm:FIELD in /metrics.

Counts are since the start of the process, times in seconds. One token costs two additions and a search in a short
table; what Prometheus wants to see is made when it asks.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

FIRST_TOKEN_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0,
    640.0, 2560.0,
)  # fmt: skip
BETWEEN_TOKENS_S = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
    40.0, 80.0,
)  # fmt: skip
OF_REQUESTS_S = (
    0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
    480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip
TOKENS = tuple(float(step * 10**power) for power in range(7) for step in (1, 2, 5))


class Histogram:
    """Counts values by bucket.

    Attributes:
        bounds: of the buckets, ascending; a value on a bound is below it.
        counts: of each bucket, and behind them of what is above all bounds.
        sum: of all values.
    """

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def cumulative(self) -> list[tuple[str, float]]:
        """(bound, how many values are at most that), up to "+Inf", which are all."""
        found, total = [], 0
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            total += count
            found.append((bound, float(total)))
        return found


@dataclass(slots=True)
class EdgeCounters:
    """The `request_*` and `e2e_*` ones are of requests that came to their end: cancelled and failed ones only count in
    `request_success`, whose name is vLLM's. A request with several choices is one request.
    """

    time_to_first_token_seconds: Histogram = field(
        default_factory=partial(Histogram, FIRST_TOKEN_S), metadata={"meaning": "From request to first token."}
    )
    inter_token_latency_seconds: Histogram = field(
        default_factory=partial(Histogram, BETWEEN_TOKENS_S),
        metadata={"meaning": "From one token of a choice to its next."},
    )
    request_time_per_output_token_seconds: Histogram = field(
        default_factory=partial(Histogram, BETWEEN_TOKENS_S),
        metadata={"meaning": "Mean time between the tokens of a request's choices."},
    )
    e2e_request_latency_seconds: Histogram = field(
        default_factory=partial(Histogram, OF_REQUESTS_S), metadata={"meaning": "From request to its last token."}
    )
    request_queue_time_seconds: Histogram = field(
        default_factory=partial(Histogram, OF_REQUESTS_S),
        metadata={"meaning": "From its coming to an attention worker until it had its place there."},
    )
    request_prefill_time_seconds: Histogram = field(
        default_factory=partial(Histogram, OF_REQUESTS_S),
        metadata={"meaning": "To the first token, less the time in the queue."},
    )
    request_decode_time_seconds: Histogram = field(
        default_factory=partial(Histogram, OF_REQUESTS_S), metadata={"meaning": "From the first token to the last."}
    )
    request_inference_time_seconds: Histogram = field(
        default_factory=partial(Histogram, OF_REQUESTS_S),
        metadata={"meaning": "To the last token, less the time in the queue."},
    )
    request_prompt_tokens: Histogram = field(
        default_factory=partial(Histogram, TOKENS), metadata={"meaning": "Tokens of a request's prompt."}
    )
    request_generation_tokens: Histogram = field(
        default_factory=partial(Histogram, TOKENS), metadata={"meaning": "Tokens that a request's choices have."}
    )
    prompt_tokens: int = field(default=0, metadata={"meaning": "Tokens of prompts."})
    generation_tokens: int = field(default=0, metadata={"meaning": "Tokens that were generated."})
    request_success: dict[str, int] = field(
        default_factory=dict, metadata={"meaning": "Requests that ended, by how: stop, length, abort or error."}
    )
