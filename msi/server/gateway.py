"""The gateway: HTTP in front of an engine.

POST /v1/completions and /v1/chat/completions (server-sent events with "stream": true), GET /v1/models, WebSocket
/v1/stream, GET /health, /ready, /metrics and /version. A client that leaves cancels its requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hmac
import logging
import os
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Any

import orjson
from aiohttp import web

import msi
from msi.engine import Engine
from msi.errors import MAX_SHOWN_CHARS, ConfigError, EngineError
from msi.server.answers import error_object
from msi.server.calls import Call, Calls, error_of, request_id_of, status_of
from msi.server.fields import parse_object
from msi.server.metrics import CONTENT_TYPE_LATEST, Metrics
from msi.server.request_log import LoadLog, RequestLog
from msi.server.websocket import serve_websocket

log = logging.getLogger(__name__)

PROBES = ("/health", "/ready", "/version")  # whoever restarts or balances servers has no key
MAX_BODY_BYTES = 16 * 1024 * 1024
RETRY_AFTER_S = 1  # what a client waits that nothing could take now
ID_HEADER = "X-Request-Id"
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Gateway:
    """Serves an engine over HTTP. `start`, then `close`.

    Args:
        api_key: what clients give as `Authorization: Bearer`, on every path but `PROBES`; "" asks for none.
        chat_template: in Jinja, in place of the model's; "" for the model's.
        log_requests: a line for each request that ended.
        log_load: a line on throughput and load every ten seconds.

    Raises:
        ConfigError: the chat template is not valid.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        host: str,
        port: int,
        api_key: str = "",
        chat_template: str = "",
        log_requests: bool = False,
        log_load: bool = False,
    ) -> None:
        self._engine = engine
        self._host = host
        self._port = port
        self._api_key = api_key.encode()
        self._metrics = Metrics()
        requests = RequestLog(is_told=log_requests)
        self._calls = Calls(engine, self._metrics, chat_template, requests)
        self._load_log = LoadLog(engine, requests) if log_load else None
        self._telling: asyncio.Task[None] | None = None
        app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[_errors_as_json, self._authorised])
        app.on_response_prepare.append(_name_request)
        app.router.add_post("/v1/completions", self._completions)
        app.router.add_post("/v1/chat/completions", self._chat_completions)
        app.router.add_get("/v1/stream", self._websocket)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/health", self._health)
        app.router.add_get("/ready", self._ready)
        app.router.add_get("/metrics", self._prometheus)
        app.router.add_get("/version", self._version)
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=1.0)

    async def start(self) -> str:
        """Listens; returns the URL. Raises ConfigError: the port is in use."""
        await self._runner.setup()
        site = web.TCPSite(self._runner, self._host, self._port)
        try:
            await site.start()
        except OSError as error:
            raise ConfigError(why_not(self._host, self._port, error)) from error
        if self._load_log is not None:
            self._telling = asyncio.create_task(self._load_log.run())
        return url_of(self._host, self._runner.addresses[0][1])

    async def close(self) -> None:
        if self._telling is not None:
            self._telling.cancel()
        await self._runner.cleanup()

    @web.middleware
    async def _authorised(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if self._api_key and request.path not in PROBES:
            scheme, _, given = request.headers.get("Authorization", "").partition(" ")
            # surrogates: a header may hold any bytes
            is_right = hmac.compare_digest(given.strip().encode(errors="surrogateescape"), self._api_key)
            if scheme.lower() != "bearer" or not is_right:
                raise web.HTTPUnauthorized
        return await handler(request)

    # -- endpoints ---------------------------------------------------------------------------------------------------

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        request_id = _id_of(request)
        return await self._answer(
            request, self._calls.completion(parse_object(await request.read()), request_id), request_id
        )

    async def _chat_completions(self, request: web.Request) -> web.StreamResponse:
        request_id = _id_of(request)
        return await self._answer(request, self._calls.chat(parse_object(await request.read()), request_id), request_id)

    async def _answer(self, request: web.Request, call: Call, request_id: str) -> web.StreamResponse:
        headers = {ID_HEADER: request_id}
        async with contextlib.aclosing(call.outputs):
            if call.streaming.stream:
                return await self._stream(request, call, headers)
            return _json(call.answer.whole([output async for output in call.outputs]), headers=headers)

    async def _stream(self, request: web.Request, call: Call, headers: dict[str, str]) -> web.StreamResponse:
        """A failure before the first event is an HTTP error."""
        headers = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache", **headers}
        response = web.StreamResponse(headers=headers)
        try:
            async with contextlib.aclosing(_events(call)) as events:
                async for event in events:
                    if not response.prepared:
                        await response.prepare(request)
                    await response.write(event)
            await response.write_eof()
        except ConnectionResetError:
            log.info("client left; its request is cancelled")
        return response

    async def _websocket(self, request: web.Request) -> web.StreamResponse:
        return await serve_websocket(request, self._calls, MAX_BODY_BYTES)

    async def _models(self, request: web.Request) -> web.Response:
        model = {"id": self._engine.model_name, "object": "model", "created": 0, "owned_by": "msi",
                 "max_model_len": self._engine.max_model_len}  # fmt: skip
        return _json({"object": "list", "data": [model]})

    async def _health(self, request: web.Request) -> web.Response:
        """Whether the process lives."""
        return _json({"status": "ok"})

    async def _ready(self, request: web.Request) -> web.Response:
        """Whether requests are taken now; 503 and what is waited for if not."""
        is_ready, sentence = self._engine.status
        return _json({"ready": is_ready, "status": sentence}, status=200 if is_ready else 503)

    async def _prometheus(self, request: web.Request) -> web.Response:
        body = self._metrics.exposition(await self._engine.stats())
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _version(self, request: web.Request) -> web.Response:
        return _json({"version": msi.__version__})


def url_of(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def why_not(host: str, port: int, error: OSError) -> str:
    """A sentence on a socket that cannot listen."""
    where = f"cannot serve HTTP on {url_of(host, port).removeprefix('http://')}"
    if isinstance(error, socket.gaierror):
        return f"{where}: {error.strerror}; give an address of this machine as --host"
    number = error.errno or 0
    if number == errno.EADDRINUSE:
        return f"{where}: the port is in use; choose another --port"
    if number == errno.EADDRNOTAVAIL:
        return f"{where}: this machine has no such address; give one of its own as --host"
    reason = os.strerror(number) if number else str(error)
    return f"{where}: {reason}; choose another --port or --host"


def _json(values: object, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    return web.Response(body=orjson.dumps(values), content_type="application/json", status=status, headers=headers)


async def _events(call: Call) -> AsyncGenerator[bytes, None]:
    """Server-sent events; a failure after the first is an event too."""
    has_begun = False
    try:
        async for output in call.outputs:
            chunks = [call.answer.chunk(output)]
            if not has_begun:
                chunks = call.answer.opening() + chunks
                has_begun = True
            if call.streaming.include_usage:
                usage = call.answer.usage.values() if call.streaming.continuous_usage else None
                chunks = [{**chunk, "usage": usage} for chunk in chunks]
            yield b"".join(_event(chunk) for chunk in chunks)
        if call.streaming.include_usage:
            yield _event(call.answer.usage_chunk())
    except EngineError as error:
        if not has_begun:
            raise
        yield _event({"error": error_of(error)})
    yield b"data: [DONE]\n\n"


def _event(values: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(values) + b"\n\n"


async def _name_request(request: web.Request, response: web.StreamResponse) -> None:
    """Every answer carries the request's id."""
    response.headers.setdefault(ID_HEADER, _id_of(request))


def _id_of(request: web.Request) -> str:
    """The client's own, or a new one."""
    return request_id_of(request.headers.get(ID_HEADER))


@web.middleware
async def _errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    headers = {}
    try:
        return await handler(request)
    except EngineError as engine_error:
        status, body = status_of(engine_error), error_of(engine_error)
    except web.HTTPException as error:
        status, sentence = error.status, error.reason
        if isinstance(error, web.HTTPUnauthorized):
            sentence = "this server needs an API key: send it as `Authorization: Bearer KEY`"
            headers["WWW-Authenticate"] = "Bearer"
        elif isinstance(error, web.HTTPRequestEntityTooLarge):
            sentence = f"the body is larger than {MAX_BODY_BYTES} bytes"
        elif isinstance(error, web.HTTPNotFound):
            sentence = f"there is no {request.path[:MAX_SHOWN_CHARS]}"
        body = error_object(sentence, status)
    if status in (429, 503):
        headers["Retry-After"] = str(RETRY_AFTER_S)
    return _json({"error": body}, status, headers)
