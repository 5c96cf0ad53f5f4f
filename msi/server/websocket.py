"""WebSocket /v1/stream: many requests on one connection, each under an id of the client's own.

Every message is a JSON object in a text frame. From the client:

    {"type": "generate", "id": "a", "prompt": "It is", ...}       the fields of POST /v1/completions, or
    {"type": "generate", "id": "a", "messages": [...], ...}       those of POST /v1/chat/completions, less "stream",
                                                                  "stream_options" and "echo"
    {"type": "cancel", "id": "a"}                                 ends it; an id that is not running is no error

From the server, for each request one or more of the first and exactly one of the others, after which the id is free:

    {"type": "output", "id": "a", "index": 0, "text": " a truth", "token_ids": [..], "finish_reason": null,
     "logprobs": null}                                            logprobs as in chat completions; `index`: the choice
    {"type": "done", "id": "a", "usage": {"prompt_tokens": 3, "completion_tokens": 16, "total_tokens": 19}}
    {"type": "cancelled", "id": "a"}
    {"type": "error", "id": "a", "error": {"message": .., "type": .., "param": null, "code": 400}}

A message that cannot be understood is answered with an error, whose id is null where the message has none. An error
about a message under the id of a request that goes on, such as a second "generate", is not that request's end. It has a
mark of its own, the id in another place:

    {"type": "error", "id": null, "refers_to": "a", "error": {"message": .., "code": "id_in_use", ..}}

Closing the connection cancels what runs on it. Outputs of one request come in order; requests do not wait for one
another.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import orjson
from aiohttp import WSMsgType, web

from msi.errors import EngineError, InvalidRequest, shown
from msi.server.calls import Call, Calls, error_of
from msi.server.chat import logprobs_content
from msi.server.fields import Values, kind_of, parse_object
from msi.types import Output

MAX_REQUESTS = 1024  # at a time, on one connection
MAX_ID_CHARS = 256
HEARTBEAT_S = 30.0  # a peer that vanished is noticed after one and a half of these
NOT_HERE = ("stream", "stream_options", "echo")


async def serve_websocket(request: web.Request, calls: Calls, max_message_bytes: int) -> web.WebSocketResponse:
    """One connection, until either side closes it. Cancellation cancels its requests."""
    socket = web.WebSocketResponse(heartbeat=HEARTBEAT_S, max_msg_size=max_message_bytes)
    await socket.prepare(request)
    connection = _Connection(socket, calls)
    try:
        async for message in socket:
            if message.type is WSMsgType.TEXT:
                await connection.receive(message.data)
            else:
                await connection.send({"type": "error", "id": None, "error": error_of(_NOT_TEXT)})
    except ConnectionResetError:
        pass  # it left while an answer was on its way
    finally:
        await connection.close()
    return socket


_NOT_TEXT = InvalidRequest("a binary frame; messages are JSON in text frames")


class _Connection:
    """The requests of one connection."""

    def __init__(self, socket: web.WebSocketResponse, calls: Calls) -> None:
        self._socket = socket
        self._calls = calls
        self._running: dict[str, asyncio.Task[None]] = {}

    async def receive(self, text: str) -> None:
        """One message from the client."""
        request_id: str | None = None
        try:
            values = parse_object(text)
            request_id = _id_of(values)
            kind = values.get("type")
            if kind == "generate":
                self._start(request_id, values)
            elif kind == "cancel":
                await self._cancel(request_id)
            else:
                raise InvalidRequest(f'type is {shown(kind)}; it must be "generate" or "cancel"', param="type")
        except EngineError as error:
            about = {"id": None, "refers_to": request_id} if request_id in self._running else {"id": request_id}
            await self.send({"type": "error", **about, "error": error_of(error)})

    async def send(self, message: dict[str, Any]) -> None:
        await self._socket.send_str(orjson.dumps(message).decode())

    async def close(self) -> None:
        """Cancels what runs."""
        tasks = list(self._running.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _cancel(self, request_id: str) -> None:
        if (task := self._running.pop(request_id, None)) is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await self.send({"type": "cancelled", "id": request_id})

    def _start(self, request_id: str, values: dict[str, Any]) -> None:
        if request_id in self._running:
            raise InvalidRequest(f"id {request_id!r} is in use on this connection", param="id", code="id_in_use")
        if len(self._running) >= MAX_REQUESTS:
            raise InvalidRequest(
                f"{MAX_REQUESTS} requests run on this connection already; wait for one, or open another"
            )
        for name in NOT_HERE:
            if values.get(name):
                raise InvalidRequest(f"{name} is not a field of WebSocket requests, which always stream", param=name)
        asked = {name: value for name, value in values.items() if name not in ("type", "id")}
        call = self._calls.chat(asked) if "messages" in asked else self._calls.completion(asked)
        self._running[request_id] = asyncio.get_running_loop().create_task(self._run(request_id, call))

    async def _run(self, request_id: str, call: Call) -> None:
        usage = call.answer.usage
        try:
            async with contextlib.aclosing(call.outputs):
                async for output in call.outputs:
                    usage.add(output)
                    await self.send(self._output(request_id, output))
            last: dict[str, Any] = {"type": "done", "id": request_id, "usage": usage.values()}
        except EngineError as error:
            last = {"type": "error", "id": request_id, "error": error_of(error)}
        except ConnectionResetError:
            return  # nobody is left to tell
        del self._running[request_id]  # from here on it cannot be cancelled
        with contextlib.suppress(ConnectionResetError):
            await self.send(last)

    def _output(self, request_id: str, output: Output) -> dict[str, Any]:
        return {
            "type": "output", "id": request_id, "index": output.index, "text": output.text,
            "token_ids": output.token_ids, "finish_reason": output.finish_reason,
            "logprobs": logprobs_content(output, self._calls.decode),
        }  # fmt: skip


def _id_of(values: Values) -> str:
    request_id = values.get("id")
    if not isinstance(request_id, str) or not 0 < len(request_id) <= MAX_ID_CHARS:
        what = kind_of(request_id) if not isinstance(request_id, str) else f"{len(request_id)} characters long"
        raise InvalidRequest(f"id is {what}; it must be a string of 1 to {MAX_ID_CHARS} characters", param="id")
    return request_id
