"""What is asked at each path, and how it is answered. Who may ask, and what an error becomes, is the gateway's."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from aiohttp import web

import msi
from msi.engine import Engine
from msi.errors import ModelNotFound, shown
from msi.server.calls import Call, Caller, Calls
from msi.server.event_stream import EventStream
from msi.server.exposition import CONTENT_TYPE_LATEST
from msi.server.json_answers import answer_in_pieces, json_response
from msi.server.metrics import Metrics
from msi.server.model_card import model_card
from msi.server.prepare import (
    ANTHROPIC,
    ANTHROPIC_COUNT,
    CHAT,
    COMPLETION,
    DETOKENIZE,
    RESPONSE,
    TOKENIZE,
    Answered,
    NotUnderstood,
)
from msi.server.refusals import Refused
from msi.server.replies import reply_of
from msi.server.request_body import MAX_BODY_BYTES, Bodies
from msi.server.running import Running
from msi.server.websocket import Sockets

ASKED = {
    "/v1/completions": COMPLETION, "/v1/chat/completions": CHAT, "/v1/responses": RESPONSE, "/v1/messages": ANTHROPIC,
    "/v1/messages/count_tokens": ANTHROPIC_COUNT, "/tokenize": TOKENIZE, "/detokenize": DETOKENIZE,
}  # fmt: skip
OF_MODEL = "/v1/models/"  # and its name, which may have slashes
MODEL = OF_MODEL + "{model}"
ID_HEADER = "X-Request-Id"
Handler = Callable[[web.BaseRequest, dict[str, str]], Awaitable[web.StreamResponse]]  # headers: of the answer


class Endpoints:
    """Of one gateway, but for its page.

    Args:
        running: every request is counted there while it runs.
        description: what /openapi.json says.
        flow_of: who asks; see `msi.types.Request`.
        counters: the gateway's own, for /metrics.

    Attributes:
        by_path: each path's handlers, by method.
    """

    def __init__(
        self,
        engine: Engine,
        calls: Calls,
        metrics: Metrics,
        running: Running,
        *,
        description: Mapping[str, Any],
        flow_of: Callable[[web.BaseRequest], str],
        counters: Callable[[], dict[str, float]],
    ) -> None:
        self._engine = engine
        self._calls = calls
        self._metrics = metrics
        self._running = running
        self._description = description
        self._flow_of = flow_of
        self._counters = counters
        self._created = int(time.time())
        self._bodies = Bodies()
        self._sockets = Sockets(calls, running, MAX_BODY_BYTES)
        self.by_path: dict[str, dict[str, Handler]] = {
            **{path: {"POST": self._asking(endpoint)} for path, endpoint in ASKED.items()},
            "/v1/stream": {"GET": self._websocket},
            "/v1/models": {"GET": self._models},
            MODEL: {"GET": self._model},
            "/health": {"GET": self._health},
            "/ready": {"GET": self._ready},
            "/metrics": {"GET": self._prometheus},
            "/version": {"GET": self._version},
            "/openapi.json": {"GET": self._openapi},
        }

    async def close(self) -> None:
        """Ends WebSockets."""
        await self._sockets.close()

    # -- requests for text -------------------------------------------------------------------------------------------

    def _asking(self, endpoint: str) -> Handler:
        return lambda request, headers: self._answer(request, headers, endpoint)

    async def _answer(self, request: web.BaseRequest, headers: dict[str, str], endpoint: str) -> web.StreamResponse:
        came_at = time.monotonic()
        with self._running.request():
            async with self._bodies.read(request) as body:
                asked = await self._calls.understand(endpoint, body, client=request.protocol)
                del body
            if isinstance(asked, NotUnderstood):
                raise asked.failure.error()
            if isinstance(asked, Answered):
                return await answer_in_pieces(request, [asked.body], headers)
            assert asked.request is not None
            parent = request.headers.get("traceparent", "")
            caller = Caller(self._flow_of(request), request.headers, came_at)
            call = self._calls.call(asked.request, headers[ID_HEADER], parent, caller)
            if not call.streaming.stream:
                return await self._whole(request, call, headers)
        return await self._stream(request, call, headers)

    async def _whole(self, request: web.BaseRequest, call: Call, headers: dict[str, str]) -> web.StreamResponse:
        reply = reply_of(call)
        async with contextlib.aclosing(call.outputs):
            async for output in call.outputs:
                reply.add(output)
        parts = []
        for part in reply.parts():
            parts.append(part)
            await asyncio.sleep(0)
        return await answer_in_pieces(request, parts, headers)

    async def _stream(self, request: web.BaseRequest, call: Call, headers: dict[str, str]) -> web.StreamResponse:
        """A failure before the first event is an HTTP error, and one after it an event."""
        response, reply = EventStream(request, headers), reply_of(call)
        connection = response.connection
        try:
            with self._running.request():
                async with contextlib.aclosing(call.outputs):
                    async for output in call.outputs:
                        if connection.is_behind:
                            await connection.caught_up()
                        await response.tell(reply.events(output))
            last = reply.end()
        except ConnectionResetError:
            raise
        except Exception as error:
            if not response.prepared:
                raise
            last = reply.failure(error)
        await response.write_eof(last)
        return response

    async def _websocket(self, request: web.BaseRequest, headers: dict[str, str]) -> web.StreamResponse:
        if request.method != "GET" or request.headers.get("Upgrade", "").lower() != "websocket":
            raise Refused(426, f"{request.path} speaks WebSocket", headers={"Upgrade": "websocket"})
        try:
            return await self._sockets.serve(request, headers, self._flow_of(request))
        except web.HTTPException as error:  # a handshake that is none
            raise Refused(400, f"this is no WebSocket handshake: {error.text}") from error

    # -- what is asked of the server ---------------------------------------------------------------------------------

    async def _models(self, request: web.BaseRequest, headers: dict[str, str]) -> web.StreamResponse:
        card = model_card(self._engine.model_name, self._engine.max_model_len, self._created)
        return json_response({"object": "list", "data": [card]})

    async def _model(self, request: web.BaseRequest, headers: dict[str, str]) -> web.StreamResponse:
        name = request.path.removeprefix(OF_MODEL)
        if name != self._engine.model_name:
            raise ModelNotFound(f"model {shown(name)} is not served here; this is {self._engine.model_name!r}")
        return json_response(model_card(name, self._engine.max_model_len, self._created))

    async def _health(self, request: web.BaseRequest, headers: dict[str, str]) -> web.StreamResponse:
        """Whether the process lives."""
        return json_response({"status": "ok"})

    async def _ready(self, request: web.BaseRequest, headers: dict[str, str]) -> web.StreamResponse:
        """Whether requests are taken now; 503 and what is waited for if not."""
        is_ready, sentence = self._engine.status
        if self._running.is_ending:
            is_ready, sentence = False, "the server is shutting down"
        return json_response({"ready": is_ready, "status": sentence}, status=200 if is_ready else 503)

    async def _prometheus(self, request: web.BaseRequest, headers: dict[str, str]) -> web.StreamResponse:
        own = self._counters() | {"preparations_given_up": self._calls.num_given_up}
        body = self._metrics.exposition(await self._engine.stats(), own)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _openapi(self, request: web.BaseRequest, headers: dict[str, str]) -> web.StreamResponse:
        return json_response(self._description)

    async def _version(self, request: web.BaseRequest, headers: dict[str, str]) -> web.StreamResponse:
        return json_response({"version": msi.__version__})
