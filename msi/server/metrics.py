"""Requests as this edge saw them, for /metrics: counted and timed as their outputs pass. Knows no Prometheus.

What else /metrics tells, and under which names, is in `msi.server.exposition`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from msi.control.client_messages import Stats
from msi.server.edge_counters import EdgeCounters
from msi.server.exposition import exposition
from msi.types import Output

FINISHED_REASONS = {"cancelled": "abort"}  # vLLM's words, where it has others


class Metrics:
    """One edge's.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, model_name: str = "", clock: Callable[[], float] = time.monotonic) -> None:
        self.counters = EdgeCounters()
        self._model_name = model_name
        self._clock = clock

    def request(self, num_choices: int = 1) -> CountedRequest:
        """One that begins now."""
        return CountedRequest(self.counters, self._clock, num_choices)

    def refused(self) -> None:
        """A request ended before it began."""
        _count_end(self.counters, "error")

    def exposition(self, stats: Stats, counters: Mapping[str, float]) -> bytes:
        """Everything, in Prometheus' text format; `counters` are the gateway's own."""
        return exposition(self._model_name, self.counters, stats, counters)


class CountedRequest:
    """Counts and times one request's outputs; implements `msi.server.calls.Observer`.

    One that is closed before all its choices have ended was cancelled, whatever some of them ended with.
    """

    def __init__(self, counters: EdgeCounters, clock: Callable[[], float], num_choices: int) -> None:
        self._counters = counters
        self._clock = clock
        self._num_choices = num_choices
        self._started = clock()
        self._last_at: dict[int, float] = {}  # by choice
        self._first_at = self._now = self._queued_s = 0.0
        self._num_prompt = self._num_tokens = self._num_ended = 0
        self._outcome = "cancelled"

    def saw(self, output: Output) -> None:
        counters, index, last_at = self._counters, output.index, self._last_at
        self._now = now = self._clock()
        if index in last_at:
            counters.inter_token_latency_seconds.observe(now - last_at[index])
        elif not last_at:
            self._first_at, self._queued_s, self._num_prompt = now, output.queued_s, output.num_prompt_tokens
            counters.time_to_first_token_seconds.observe(now - self._started)
            counters.prompt_tokens += output.num_prompt_tokens
        last_at[index] = now
        num_tokens = len(output.token_ids)
        self._num_tokens += num_tokens
        counters.generation_tokens += num_tokens
        if output.finish_reason is not None:
            self._num_ended += 1
            self._outcome = output.finish_reason if self._num_ended == self._num_choices else "cancelled"

    def ended(self, error: BaseException | None) -> None:
        counters, now, first_at, started = self._counters, self._now, self._first_at, self._started
        outcome = "error" if isinstance(error, Exception) else self._outcome
        _count_end(counters, outcome)
        if outcome in ("cancelled", "error"):
            return
        queued_s = min(self._queued_s, first_at - started)  # by another clock
        counters.e2e_request_latency_seconds.observe(now - started)
        counters.request_queue_time_seconds.observe(queued_s)
        counters.request_prefill_time_seconds.observe(first_at - started - queued_s)
        counters.request_decode_time_seconds.observe(now - first_at)
        counters.request_inference_time_seconds.observe(now - started - queued_s)
        counters.request_prompt_tokens.observe(self._num_prompt)
        counters.request_generation_tokens.observe(self._num_tokens)
        if self._num_tokens > self._num_choices:
            spent_s = sum(self._last_at.values()) - len(self._last_at) * first_at
            num_steps = self._num_tokens - self._num_choices
            counters.request_time_per_output_token_seconds.observe(spent_s / num_steps)


def _count_end(counters: EdgeCounters, outcome: str) -> None:
    reason = FINISHED_REASONS.get(outcome, outcome)
    counters.request_success[reason] = counters.request_success.get(reason, 0) + 1
