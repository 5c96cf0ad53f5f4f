"""The gateway: HTTP in front of an engine. /v1/completions with server-sent events, /v1/models, /health, /ready."""

from __future__ import annotations

import contextlib
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable

import orjson
from aiohttp import web

import msi
from msi.engine import Engine
from msi.errors import ConfigError, EngineError, InvalidRequest, RequestFailed, Unavailable
from msi.server.completions import CompletionRequest, completion_body, completion_chunk, error_body, parse_completion
from msi.types import Output

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 16 * 1024 * 1024
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
STATUS_OF = {InvalidRequest: 400, Unavailable: 503, RequestFailed: 502}


class Gateway:
    """Serves an engine over HTTP. `start`, then `close`."""

    def __init__(self, engine: Engine, *, host: str, port: int) -> None:
        self._engine = engine
        self._host = host
        self._port = port
        app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[_errors_as_json])
        app.router.add_post("/v1/completions", self._completions)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/health", self._health)
        app.router.add_get("/ready", self._ready)
        app.router.add_get("/version", self._version)
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True)

    async def start(self) -> str:
        """Listens; returns the URL. Raises ConfigError: the port is in use."""
        await self._runner.setup()
        site = web.TCPSite(self._runner, self._host, self._port)
        try:
            await site.start()
        except OSError as error:
            raise ConfigError(
                f"cannot serve HTTP on {self._host}:{self._port}: {error.strerror}; choose another --port"
            ) from error
        port = self._runner.addresses[0][1]
        return f"http://{self._host}:{port}"

    async def close(self) -> None:
        await self._runner.cleanup()

    # -- endpoints ---------------------------------------------------------------------------------------------------

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        asked = parse_completion(await request.read())
        if asked.model and asked.model != self._engine.model_name:
            raise InvalidRequest(f"model {asked.model!r} is not served here; this is {self._engine.model_name!r}")
        created = int(time.time())
        outputs = self._engine.generate(asked.prompt, asked.params, request_id=f"cmpl-{uuid.uuid4().hex}")
        async with contextlib.aclosing(outputs):
            if asked.stream:
                return await self._stream(request, asked, outputs, created)
            collected = [output async for output in outputs]
        body = completion_body(collected, self._engine.model_name, created)
        return web.Response(body=body, content_type="application/json")

    async def _stream(
        self, request: web.Request, asked: CompletionRequest, outputs: AsyncGenerator[Output, None], created: int
    ) -> web.StreamResponse:
        """Server-sent events; a failure before the first is an HTTP error, a later one is an event."""
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
        try:
            async for output in outputs:
                if not response.prepared:
                    await response.prepare(request)
                chunk = completion_chunk(output, self._engine.model_name, created)
                await response.write(b"data: " + chunk + b"\n\n")
        except ConnectionResetError:
            log.info("client left; its request is cancelled")
            return response
        except EngineError as error:
            if not response.prepared:
                raise
            await response.write(b"data: " + _error_of(error)[1] + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response

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

    async def _version(self, request: web.Request) -> web.Response:
        return _json({"version": msi.__version__})


def _json(values: object, status: int = 200) -> web.Response:
    return web.Response(body=orjson.dumps(values), content_type="application/json", status=status)


def _error_of(error: EngineError) -> tuple[int, bytes]:
    code = next((code for kind, code in STATUS_OF.items() if isinstance(error, kind)), 500)
    kind = "invalid_request_error" if code == 400 else "server_error"
    return code, error_body(str(error), kind, code)


@web.middleware
async def _errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except EngineError as error:
        code, body = _error_of(error)
    except web.HTTPRequestEntityTooLarge as error:
        code = error.status
        body = error_body(f"the body is larger than {MAX_BODY_BYTES} bytes", "invalid_request_error", code)
    except web.HTTPNotFound as error:
        code, body = error.status, error_body(f"there is no {request.path}", "invalid_request_error", error.status)
    except web.HTTPException as error:
        code, body = error.status, error_body(error.reason, "invalid_request_error", error.status)
    return web.Response(body=body, status=code, content_type="application/json")
