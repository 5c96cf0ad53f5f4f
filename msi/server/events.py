"""GET /v1/events: server-sent events on how the instance is, for its page; see `msi.server.event_values`.

One task looks, twice a second and only while somebody listens, and all listeners are told the same bytes. Who reads too
slowly misses what came meanwhile: of each kind of event only the last is kept.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass

import orjson
from aiohttp import web

import msi
from msi.control.client_messages import Stats
from msi.engine import Engine
from msi.errors import EngineError
from msi.server.event_values import Hello, Load, Percentiles, numbers
from msi.server.pingpong import ExpertCounts, PingpongWindows
from msi.server.refusals import Refused
from msi.server.request_log import RequestLog

EVERY_S = 0.5
ANSWERS_WITHIN_S = 2.0  # the coordinator; else the page says that it does not
MAX_LISTENERS = 32
RATE_OVER_S = 3.0


@dataclass(frozen=True, slots=True)
class _Told:
    turn: int
    event: bytes


class Events:
    """Of one gateway.

    Args:
        requests: what passes here.
        has_chat: whether there is a chat template.
        needs_key: whether requests need one.
    """

    def __init__(self, engine: Engine, requests: RequestLog, *, has_chat: bool, needs_key: bool) -> None:
        self._engine = engine
        self._requests = requests
        self._hello = Hello(msi.__version__, engine.model_name, has_chat, engine.max_model_len, needs_key)
        self._windows = PingpongWindows()
        self._experts = ExpertCounts()
        self._rates: deque[tuple[float, int, int]] = deque()  # when, prompt tokens, tokens
        self._latest: dict[str, _Told] = {}
        self._turn = 0
        self._next = asyncio.Event()  # set with the next turn, and then another takes its place
        self._looking: asyncio.Task[None] | None = None
        self._is_closed = False
        self.num_listeners = 0

    def close(self) -> None:
        """All streams end."""
        self._is_closed = True
        self._next.set()
        if self._looking is not None:
            self._looking.cancel()

    async def serve(self, request: web.BaseRequest, headers: dict[str, str]) -> web.StreamResponse:
        """Until the client leaves, or `close`. Raises Refused."""
        headers = {"Content-Type": "text/event-stream", "Cache-Control": "no-store", **headers}
        if request.method == "HEAD":
            return web.Response(headers=headers)
        if self.num_listeners >= MAX_LISTENERS:
            raise Refused(503, f"{MAX_LISTENERS} listen to this server's events already; close a page, or ask /metrics")
        response = web.StreamResponse(headers=headers)
        self._joined()
        try:
            await response.prepare(request)
            await response.write(sse("hello", self._hello))
            seen = -1
            while not self._is_closed:
                news = self._next
                told = [one for one in self._latest.values() if one.turn > seen]
                seen = max([seen, *(one.turn for one in told)])
                for one in told:
                    await response.write(one.event)
                await news.wait()
            await response.write_eof()
        finally:
            self._left()
        return response

    # -- while somebody listens --------------------------------------------------------------------------------------

    def _joined(self) -> None:
        self.num_listeners += 1
        if self._looking is None and not self._is_closed:
            self._looking = asyncio.create_task(self._look(), name="events")

    def _left(self) -> None:
        self.num_listeners -= 1
        if not self.num_listeners and self._looking is not None:
            self._looking.cancel()
            self._looking = None
            self._latest.clear()
            self._rates.clear()

    async def _look(self) -> None:
        """For ever."""
        while True:
            began = time.monotonic()
            await self._tell(await self._stats(), began)
            await asyncio.sleep(max(0.1, EVERY_S - (time.monotonic() - began)))

    async def _stats(self) -> Stats | None:
        try:
            return await asyncio.wait_for(self._engine.watched_stats(), ANSWERS_WITHIN_S)
        except (EngineError, TimeoutError):
            return None

    async def _tell(self, stats: Stats | None, now: float) -> None:
        is_ready, sentence = self._engine.status
        if stats is None and is_ready:
            is_ready, sentence = False, f"the coordinator did not answer for {ANSWERS_WITHIN_S:g} s"
        self._keep("numbers", numbers(is_ready, sentence, self._load(now), stats))
        if stats is not None:
            await asyncio.sleep(0)  # others have their turn
            if (picture := self._windows.take(stats.workers)) is not None:
                self._keep("pingpong", picture)
                await asyncio.sleep(0)
            if (rows := self._experts.take(stats.workers)) is not None:
                self._keep("experts", rows)
        news, self._next = self._next, asyncio.Event()
        self._turn += 1
        news.set()

    def _keep(self, kind: str, value: object) -> None:
        self._latest[kind] = _Told(self._turn, sse(kind, value))

    def _load(self, now: float) -> Load:
        requests = self._requests
        self._rates.append((now, requests.num_prompt_tokens, requests.num_tokens))
        while len(self._rates) > 2 and self._rates[1][0] <= now - RATE_OVER_S:
            self._rates.popleft()
        since, prompt_tokens, tokens = self._rates[0]
        elapsed_s = max(now - since, EVERY_S)
        return Load(
            (requests.num_prompt_tokens - prompt_tokens) / elapsed_s,
            (requests.num_tokens - tokens) / elapsed_s,
            Percentiles.of(requests.recent_first_tokens_s()),
            Percentiles.of(requests.recent_per_token_s()),
        )


def sse(kind: str, value: object) -> bytes:
    """An event; `value` is a dataclass."""
    return b"event: " + kind.encode() + b"\ndata: " + orjson.dumps(value) + b"\n\n"
