"""Requests as this edge saw them, for /metrics: counted and timed as their outputs pass. Knows no Prometheus.

What else /metrics tells, and under which names, is in `msi.server.exposition`.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Mapping

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

    async def observed(
        self, outputs: AsyncGenerator[Output, None], num_choices: int = 1
    ) -> AsyncGenerator[Output, None]:
        """The same outputs, counted and timed. Closing it closes them.

        A request that is closed before all its choices have ended was cancelled, whatever some of them ended with.
        """
        counters, clock = self.counters, self._clock
        between = counters.inter_token_latency_seconds.observe
        started = clock()
        last_at: dict[int, float] = {}  # by choice
        first_at = now = queued_s = 0.0
        num_prompt = num_tokens = num_ended = 0
        outcome = "cancelled"
        try:
            async for output in outputs:
                now = clock()
                index = output.index
                if index in last_at:
                    between(now - last_at[index])
                elif not last_at:
                    first_at, queued_s, num_prompt = now, output.queued_s, output.num_prompt_tokens
                    counters.time_to_first_token_seconds.observe(now - started)
                    counters.prompt_tokens += num_prompt
                last_at[index] = now
                num_tokens += len(output.token_ids)
                counters.generation_tokens += len(output.token_ids)
                if output.finish_reason is not None:
                    num_ended += 1
                    outcome = output.finish_reason if num_ended == num_choices else "cancelled"
                yield output
        except Exception:
            outcome = "error"
            raise
        finally:
            self._ended(outcome)
            if outcome not in ("cancelled", "error"):
                queued_s = min(queued_s, first_at - started)  # by another clock
                counters.e2e_request_latency_seconds.observe(now - started)
                counters.request_queue_time_seconds.observe(queued_s)
                counters.request_prefill_time_seconds.observe(first_at - started - queued_s)
                counters.request_decode_time_seconds.observe(now - first_at)
                counters.request_inference_time_seconds.observe(now - started - queued_s)
                counters.request_prompt_tokens.observe(num_prompt)
                counters.request_generation_tokens.observe(num_tokens)
                if num_tokens > num_choices:
                    spent_s = sum(last_at.values()) - len(last_at) * first_at
                    counters.request_time_per_output_token_seconds.observe(spent_s / (num_tokens - num_choices))
            await outputs.aclose()

    def refused(self) -> None:
        """A request ended before it began."""
        self._ended("error")

    def _ended(self, outcome: str) -> None:
        reason = FINISHED_REASONS.get(outcome, outcome)
        self.counters.request_success[reason] = self.counters.request_success.get(reason, 0) + 1

    def exposition(self, stats: Stats, counters: Mapping[str, float]) -> bytes:
        """Everything, in Prometheus' text format; `counters` are the gateway's own."""
        return exposition(self._model_name, self.counters, stats, counters)
