"""What the log says of requests: a line for each that ended, and every ten seconds one on load.

    cmpl-4f2..: 12 prompt tokens, 34 generated, first token after 0.120 s, 0.900 s in all: length
    12.0 prompt tokens/s, 45.6 generated tokens/s, 3 requests (3 running, 0 waiting),
        KV cache 1.2 % used, prefix hits 34 %                                                            (on one line)

Knows no HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from msi.control.client_messages import Stats
from msi.engine import Engine
from msi.errors import EngineError
from msi.json_log import with_fields
from msi.types import Output

log = logging.getLogger(__name__)

EVERY_S = 10.0
RECENT_S = 60.0
RECENT_KEPT = 512  # requests
MAX_ERROR_CHARS = 300


@dataclass(slots=True)
class Served:
    """One request, however many prompts and choices it has.

    Attributes:
        prompts: tokens of each prompt, by the index of its choice.
        outcome: "stop", "length", "cancelled", or what went wrong.
    """

    request_id: str
    started_at: float
    prompts: dict[int, int] = field(default_factory=dict)
    num_tokens: int = 0
    first_at: float | None = None
    outcome: str = "cancelled"

    def sentence(self, now: float) -> str:
        first = "no token" if self.first_at is None else f"first token after {self.first_at - self.started_at:.3f} s"
        return (
            f"{self.request_id}: {sum(self.prompts.values())} prompt tokens, {self.num_tokens} generated, {first}, "
            f"{now - self.started_at:.3f} s in all: {self.outcome}"
        )

    def fields(self, now: float) -> dict[str, Any]:
        """The same for programs."""
        return {
            "request_id": self.request_id,
            "prompt_tokens": sum(self.prompts.values()),
            "generated_tokens": self.num_tokens,
            "first_token_s": None if self.first_at is None else round(self.first_at - self.started_at, 6),
            "total_s": round(now - self.started_at, 6),
            "outcome": self.outcome,
        }


class RequestLog:
    """Counts what passes, and says what ended.

    Args:
        is_told: whether each request gets its line.
        clock: seconds, monotonic.
    """

    def __init__(self, *, is_told: bool = True, clock: Callable[[], float] = time.monotonic) -> None:
        self._is_told = is_told
        self._clock = clock
        self.num_prompt_tokens = 0
        self.num_tokens = 0
        self.num_ended = 0
        self._first_tokens_s: deque[tuple[float, float]] = deque(maxlen=RECENT_KEPT)  # when, and how long
        self._per_token_s: deque[tuple[float, float]] = deque(maxlen=RECENT_KEPT)

    def recent_first_tokens_s(self) -> list[float]:
        """From request to first token, of those whose first token came in the last minute."""
        return self._recent(self._first_tokens_s)

    def recent_per_token_s(self) -> list[float]:
        """From one token of a choice to its next, the mean of each request that ended in the last minute."""
        return self._recent(self._per_token_s)

    def _recent(self, kept: deque[tuple[float, float]]) -> list[float]:
        since = self._clock() - RECENT_S
        return [duration_s for at, duration_s in kept if at >= since]

    def request(self, request_id: str, num_choices: int = 1) -> LoggedRequest:
        """One that begins now.

        Args:
            num_choices: of each prompt; choices of one prompt have indices that follow one another.
        """
        return LoggedRequest(self, Served(request_id, self._clock()), num_choices)

    def first_token(self, served: Served) -> None:
        served.first_at = self._clock()
        self._first_tokens_s.append((served.first_at, served.first_at - served.started_at))

    def ended(self, served: Served, num_choices: int) -> None:
        self.num_ended += 1
        now, num_steps = self._clock(), served.num_tokens / max(1, num_choices * len(served.prompts)) - 1
        if served.first_at is not None and num_steps > 0:
            self._per_token_s.append((now, (now - served.first_at) / num_steps))
        if self._is_told:
            log.info("%s", served.sentence(now), extra=with_fields(**served.fields(now)))


class LoggedRequest:
    """Counts one request's outputs; implements `msi.server.calls.Observer`."""

    def __init__(self, requests: RequestLog, served: Served, num_choices: int) -> None:
        self._requests = requests
        self._served = served
        self._num_choices = num_choices

    def saw(self, output: Output) -> None:
        requests, served = self._requests, self._served
        prompt = output.index // self._num_choices
        if prompt not in served.prompts:
            served.prompts[prompt] = output.num_prompt_tokens
            requests.num_prompt_tokens += output.num_prompt_tokens
        if served.first_at is None:
            requests.first_token(served)
        num_tokens = len(output.token_ids)
        served.num_tokens += num_tokens
        requests.num_tokens += num_tokens
        served.outcome = output.finish_reason or served.outcome

    def ended(self, error: BaseException | None) -> None:
        if isinstance(error, Exception):
            self._served.outcome = f"failed: {str(error)[:MAX_ERROR_CHARS]}"
        elif error is not None:
            self._served.outcome = "cancelled"
        self._requests.ended(self._served, self._num_choices)


class LoadLog:
    """A line on load every ten seconds, while anything happens. `run` it."""

    def __init__(self, engine: Engine, requests: RequestLog) -> None:
        self._engine = engine
        self._requests = requests
        self._last = (0, 0, 0)

    async def run(self) -> None:
        """For ever. It only reports: what it cannot ask for, it leaves out."""
        while True:
            await asyncio.sleep(EVERY_S)
            try:
                line = self.line(await self._engine.stats(), EVERY_S)
            except EngineError:
                continue
            if line:
                log.info("%s", line)

    def line(self, stats: Stats, elapsed_s: float) -> str:
        """What happened since the last one; "" if nothing did."""
        now = (self._requests.num_prompt_tokens, self._requests.num_tokens, self._requests.num_ended)
        last, self._last = self._last, now
        if now == last and not stats.num_requests:
            return ""
        return load_sentence(stats, (now[0] - last[0]) / elapsed_s, (now[1] - last[1]) / elapsed_s)


def load_sentence(stats: Stats, prompt_per_s: float, tokens_per_s: float) -> str:
    attention = [worker.status for worker in stats.workers if worker.role == "attention"]
    counters = [one.attention for one in attention if one.attention is not None]  # not of those that load
    num_blocks = sum(one.blocks for one in counters)
    num_free = sum(one.num_free_blocks for one in attention if one.attention is not None)
    num_asked = sum(one.prompt_tokens for one in counters)
    num_hit = sum(one.prefix_hit_tokens for one in counters)
    num_running = sum(one.num_running for one in attention)
    num_waiting = stats.num_waiting + sum(one.num_waiting for one in attention)
    return (
        f"{prompt_per_s:.1f} prompt tokens/s, {tokens_per_s:.1f} generated tokens/s, {stats.num_requests} requests "
        f"({num_running} running, {num_waiting} waiting), "
        f"KV cache {100 * (1 - num_free / num_blocks if num_blocks else 0):.1f} % used, "
        f"prefix hits {100 * num_hit / num_asked if num_asked else 0:.0f} %"
    )
