"""The gateway: HTTP in front of an engine. Who may ask, and how it begins and ends; answers are of `Endpoints`.

POST /v1/completions, /v1/chat/completions, /v1/responses and /v1/messages (server-sent events with "stream": true),
/tokenize and /detokenize, GET /v1/models and /v1/models/NAME, WebSocket /v1/stream, GET /health, /ready, /metrics,
/version and /openapi.json, the page and /v1/events. A client that leaves cancels its requests; every answer that is no
success is an error in JSON.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
import socket
from collections.abc import Collection, Sequence

from aiohttp import web

import msi
from msi.engine import Engine
from msi.errors import MAX_SHOWN_CHARS, Overloaded
from msi.request_spans import OpenSpans
from msi.server.answers import error_object
from msi.server.api_keys import ApiKeys
from msi.server.calls import Calls, error_of, request_id_of, status_of
from msi.server.door import Door
from msi.server.endpoints import ID_HEADER, MODEL, OF_MODEL, Endpoints, Handler
from msi.server.events import Events
from msi.server.json_answers import error_response
from msi.server.listening import Entrance, listen, max_connections, url_of
from msi.server.metrics import Metrics
from msi.server.openapi import description
from msi.server.origins import Origins
from msi.server.page import Page
from msi.server.refusals import Refused
from msi.server.request_body import discard
from msi.server.request_log import LoadLog, RequestLog
from msi.server.running import Running
from msi.watchdog import LoopWatch

log = logging.getLogger(__name__)

USUAL_HEADERS = f"Authorization, Content-Type, {ID_HEADER}"
HEADER_NAMES = re.compile(r"[A-Za-z0-9-]{1,64}(, ?[A-Za-z0-9-]{1,64}){0,63}")
KEY_HEADER = "x-api-key"  # Anthropic's clients send the key there
PROBES = ("/health", "/ready", "/version")  # whoever restarts or balances servers has no key
ENDS_WITHIN_S = 2.0  # clients, once their requests have ended


class Gateway:
    """Serves an engine over HTTP. `start`, then `close`.

    Args:
        api_keys: one of them is what clients give as `Authorization: Bearer` or `x-api-key`, on every path but `PROBES`
            and the page.
        chat_template: in Jinja, in place of the model's; "" for the model's.
        log_requests: a line for each request that ended.
        log_load: a line on throughput and load every ten seconds.
        allowed_origins: web pages that may ask, such as "https://chat.example.com"; ("*",) for all.
        has_page: whether / is the page that shows the instance at work, and /v1/events what it shows.
        watch: of the loop that this runs on; what it measures is told in /metrics.
        spans: of requests, closed with this; None where they are not traced.

    Raises:
        ConfigError: the chat template or an origin is not valid.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        host: str,
        port: int,
        api_keys: Collection[str] = (),
        chat_template: str = "",
        log_requests: bool = False,
        log_load: bool = False,
        allowed_origins: tuple[str, ...] = (),
        has_page: bool = True,
        watch: LoopWatch | None = None,
        spans: OpenSpans | None = None,
    ) -> None:
        self._host = host
        self._port = port
        self._api_keys = ApiKeys(api_keys)
        self._origins = Origins(allowed_origins, host, bool(api_keys))
        self._watch = watch
        metrics = Metrics(engine.model_name)
        requests = RequestLog(is_told=log_requests)
        self._calls = Calls(engine, metrics, chat_template, requests, spans)
        self._spans = spans
        self._load_log = LoadLog(engine, requests) if log_load else None
        self._telling: asyncio.Task[None] | None = None
        self._running = Running()
        self._door = Door(self._handle, max_connections())
        self._entrance: Entrance | None = None
        self._endpoints = Endpoints(
            engine,
            self._calls,
            metrics,
            self._running,
            description=description(msi.__version__, needs_key=bool(api_keys), has_page=has_page),
            flow_of=self._flow_of,
            counters=self._counters,
        )
        self._handlers = dict(self._endpoints.by_path)
        self._without_key = frozenset(PROBES)
        self._events: Events | None = None
        self._files: dict[str, dict[str, Handler]] = {}  # of the page
        if has_page:
            page = Page()
            has_chat = bool(chat_template or engine.welcome.chat_templates)
            self._events = Events(engine, requests, has_chat=has_chat, needs_key=bool(api_keys))
            self._handlers |= {"/": {"GET": page.serve}, "/v1/events": {"GET": self._events.serve}}
            self._files = {path: {"GET": page.serve} for path in page.paths}
            self._without_key |= page.paths

    async def start(self, listening: Sequence[socket.socket] | None = None) -> str:
        """Listens; returns the URL.

        Args:
            listening: sockets of `listen`; by default at `host` and `port`.

        Raises:
            ConfigError: the port is in use.
        """
        sockets = list(listening or listen(self._host, self._port))
        self._door.open()
        url = url_of(self._host, sockets[0].getsockname()[1])
        self._entrance = Entrance(sockets, self._door)
        if self._load_log is not None:
            self._telling = asyncio.create_task(self._load_log.run())
        return url

    async def prepare(self) -> None:
        """Starts what large requests need, so that the first does not wait for it."""
        await self._calls.start()

    async def close(self, grace_s: float = 0.0) -> None:
        """Takes no more requests. What runs has `grace_s` seconds, then ends with an error that says so."""
        running = self._running
        running.is_ending = True
        if self._telling is not None:
            self._telling.cancel()
        if self._events is not None:
            self._events.close()
        if self._entrance is not None:
            self._entrance.close()
        if grace_s > 0 and len(running):
            log.info("HTTP takes no more requests; %d that run have %g s to end", len(running), grace_s)
            await running.wait_idle(grace_s)
        self.end_requests()
        await running.wait_idle(ENDS_WITHIN_S)
        await self._endpoints.close()
        await self._door.shutdown(ENDS_WITHIN_S)
        await self._calls.close()
        if self._spans is not None:
            await self._spans.close()

    def end_requests(self) -> None:
        """Each ends with an error that says so."""
        self._running.end()

    # -- every request -----------------------------------------------------------------------------------------------

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Raises nothing but cancellation."""
        headers = {ID_HEADER: request_id_of(request.headers.get(ID_HEADER))}
        origin = request.headers.get("Origin", "")
        if origin and self._origins.is_allowed(origin):
            exposed = f"{ID_HEADER}, Retry-After"
            headers |= {
                "Access-Control-Allow-Origin": origin,
                "Access-Control-Expose-Headers": exposed,
                "Vary": "Origin",
            }
        is_unread = False
        try:
            self._check(request)
            response = await self._endpoint(request)(request, headers)
        except Refused as refusal:
            is_unread = refusal.is_unread
            error = error_object(str(refusal), refusal.status)
            response = error_response(request.path, refusal.status, error, refusal.headers)
        except (ConnectionResetError, asyncio.CancelledError):
            log.info("client left; its request is cancelled")
            raise
        except Exception as failure:
            response = error_response(request.path, status_of(failure), error_of(failure), retry_after(failure))
        if not response.prepared:
            response.headers.update(headers)
            if is_unread or self._running.is_ending:
                response.force_close()
        if is_unread:
            await response.prepare(request)
            await response.write_eof()
            await discard(request)
        return response

    def _check(self, request: web.BaseRequest) -> None:
        """Raises Refused, before anything of the body is read."""
        if sentence := self._origins.refusal(request.headers):
            raise Refused(403, sentence, is_unread=True)
        if self._running.is_ending and request.path not in PROBES:
            raise Refused(503, "the server is shutting down", is_unread=True)
        if request.path in self._without_key or request.method == "OPTIONS":
            return
        if True not in [self._api_keys.admits(bearer) for bearer in bearers_of(request)]:  # all are looked at
            raise Refused(
                401,
                f"this server needs an API key: send it as `Authorization: Bearer KEY` or `{KEY_HEADER}: KEY`",
                headers={"WWW-Authenticate": "Bearer"},
                is_unread=True,
            )

    def _flow_of(self, request: web.BaseRequest) -> str:
        """By its key; "" without one."""
        flows = [self._api_keys.flow_of(bearer) for bearer in bearers_of(request)]
        return next(filter(None, flows), "")

    def _counters(self) -> dict[str, float]:
        return ({} if self._watch is None else self._watch.counters()) | self._door.counters()

    def _endpoint(self, request: web.BaseRequest) -> Handler:
        """Raises Refused."""
        path = MODEL if request.path.startswith(OF_MODEL) else request.path
        methods = self._handlers.get(path) or self._files.get(path)
        if methods is None:
            raise Refused(404, f"there is no {request.path[:MAX_SHOWN_CHARS]}", is_unread=request.can_read_body)
        if request.method == "OPTIONS":
            return self._preflight
        handler = methods.get("GET" if request.method == "HEAD" else request.method)
        if handler is None:
            allowed = ", ".join(methods)
            raise Refused(
                405, f"{request.path} is asked with {allowed}", headers={"Allow": allowed},
                is_unread=request.can_read_body,
            )  # fmt: skip
        return handler

    async def _preflight(self, request: web.BaseRequest, headers: dict[str, str]) -> web.StreamResponse:
        """A browser asks before a web page may. Clients' libraries add headers of their own: what is asked may come."""
        asked = request.headers.get("Access-Control-Request-Headers", "")
        return web.Response(
            status=204,
            headers={
                "Access-Control-Allow-Methods": "GET, POST",
                "Access-Control-Allow-Headers": asked if HEADER_NAMES.fullmatch(asked) else USUAL_HEADERS,
                "Access-Control-Max-Age": "600",
            },
        )


def bearers_of(request: web.BaseRequest) -> list[str]:
    """The keys of a request as Authorization headers."""
    bearers = [request.headers.get("Authorization", "")]
    return bearers + [f"Bearer {key}" for key in request.headers.getall(KEY_HEADER, ())]


def retry_after(error: Exception) -> dict[str, str]:
    """The header of a refusal that knows when it would be none."""
    after_s = error.retry_after_s if isinstance(error, Overloaded) else 0.0
    return {"Retry-After": str(math.ceil(after_s))} if after_s else {}
