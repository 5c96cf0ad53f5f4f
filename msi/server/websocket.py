"""WebSocket /v1/stream: many requests on one connection, each under an id of the client's own.

Every message is a JSON object in a text frame. From the client:

    {"type": "generate", "id": "a", "prompt": "It is", ...}       the fields of POST /v1/completions, or
    {"type": "generate", "id": "a", "messages": [...], ...}       those of POST /v1/chat/completions, less "stream",
                                                                  "stream_options" and "echo"
    {"type": "cancel", "id": "a"}                                 ends it; an id that is not running is no error

From the server, for each request one or more of the first and exactly one of the others, after which the id is free:

    {"type": "output", "id": "a", "index": 0, "text": " a truth", "token_ids": [..], "finish_reason": null,
     "logprobs": null}                                            logprobs as in chat completions; `index`: the choice.
                                                                  A chat with tools has also what is new of "reasoning"
                                                                  and "tool_calls", as in deltas of chat completions
    {"type": "prompt", "id": "a", "index": 0, "prompt_logprobs": [..]}
                                                                  before a prompt's first output, where they are asked
                                                                  for; joined they are those of the whole prompt
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
from collections.abc import Mapping
from typing import Any

import orjson
from aiohttp import WSCloseCode, WSMsgType, web

from msi.errors import InvalidRequest, Unavailable, shown
from msi.server.calls import Call, Caller, Calls, error_of
from msi.server.chat_answers import ChatAnswer, logprobs_content
from msi.server.completions import CompletionAnswer
from msi.server.door import Connection, connection_of
from msi.server.prepare import MESSAGE, Answered, NotUnderstood, Prepared
from msi.server.running import Running
from msi.server.token_ids import named_by_id
from msi.types import Output

MAX_REQUESTS = 1024  # at a time, on one connection
HEARTBEAT_S = 30.0  # a peer that vanished is noticed after one and a half of these
CLOSES_WITHIN_S = 2.0


class Sockets:
    """The WebSockets that are open."""

    def __init__(self, calls: Calls, running: Running, max_message_bytes: int) -> None:
        self._calls = calls
        self._running = running
        self._max_message_bytes = max_message_bytes
        self._open: set[web.WebSocketResponse] = set()

    async def serve(self, request: web.BaseRequest, headers: Mapping[str, str], flow: str = "") -> web.StreamResponse:
        """One connection, until either side closes it. Cancellation cancels its requests.

        Args:
            headers: of the handshake's answer.
            flow: who asks; see `msi.types.Request`.
        """
        socket = web.WebSocketResponse(
            heartbeat=HEARTBEAT_S, max_msg_size=self._max_message_bytes, compress=False, timeout=CLOSES_WITHIN_S
        )
        socket.headers.update(headers)
        await socket.prepare(request)
        connection = _Connection(socket, connection_of(request), self._calls, self._running, Caller(flow))
        self._open.add(socket)
        try:
            async for message in socket:
                if message.type is WSMsgType.ERROR:
                    break  # what is no WebSocket's; it has been closed with a code that says so
                if message.type is WSMsgType.TEXT:
                    await connection.receive(message.data.encode(errors="surrogatepass"))
                else:
                    await connection.send({"type": "error", "id": None, "error": error_of(_NOT_TEXT)})
        except ConnectionResetError:
            pass  # it left while an answer was on its way
        finally:
            self._open.discard(socket)
            await connection.close()
        return socket

    async def close(self) -> None:
        """Tells every client that this server ends."""
        closing = (socket.close(code=WSCloseCode.GOING_AWAY, message=b"the server ends") for socket in self._open)
        await asyncio.gather(*closing, return_exceptions=True)


_NOT_TEXT = InvalidRequest("a binary frame; messages are JSON in text frames")


class _Connection:
    """The requests of one connection."""

    def __init__(
        self,
        socket: web.WebSocketResponse,
        below: Connection,
        calls: Calls,
        all_running: Running,
        caller: Caller,
    ) -> None:
        self._caller = caller
        self._socket = socket
        self._below = below
        self._calls = calls
        self._all_running = all_running
        self._running: dict[str, asyncio.Task[None]] = {}

    async def receive(self, text: bytes) -> None:
        """One message from the client; the next is not read before this one is understood."""
        asked = await self._calls.understand(MESSAGE, text, client=self)
        assert not isinstance(asked, Answered), "no message asks for that"
        if isinstance(asked, NotUnderstood):
            is_second = asked.client_id in self._running and asked.failure.param != "type"
            await self._refuse(asked.client_id, in_use(asked.client_id) if is_second else asked.failure.error())
        elif asked.request is None:
            await self._cancel(asked.client_id)
        else:
            try:
                self._start(asked.client_id, asked.request)
            except Exception as error:
                await self._refuse(asked.client_id, error)

    async def send(self, message: dict[str, Any]) -> None:
        """Waits for a client that reads slowly. Raises ConnectionResetError."""
        if self._below.is_behind:
            await self._below.caught_up()
        await self._socket.send_str(orjson.dumps(message).decode())

    async def close(self) -> None:
        """Cancels what runs."""
        tasks = list(self._running.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _refuse(self, request_id: str | None, error: Exception) -> None:
        """Of a message; a request that runs under the same id is not touched, so the error is not told as its end."""
        message: dict[str, Any] = {"type": "error", "id": request_id, "error": error_of(error)}
        if request_id in self._running:
            message |= {"id": None, "refers_to": request_id}
        await self.send(message)

    async def _cancel(self, request_id: str) -> None:
        if (task := self._running.pop(request_id, None)) is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await self.send({"type": "cancelled", "id": request_id})

    def _start(self, request_id: str, asked: Prepared) -> None:
        """Raises InvalidRequest or Unavailable."""
        if self._all_running.is_ending:
            raise Unavailable("the server is shutting down")
        if request_id in self._running:
            raise in_use(request_id)
        if len(self._running) >= MAX_REQUESTS:
            raise InvalidRequest(
                f"{MAX_REQUESTS} requests run on this connection already; wait for one, or open another"
            )
        call = self._calls.call(asked, caller=self._caller)
        self._running[request_id] = asyncio.get_running_loop().create_task(self._run(request_id, call))

    async def _run(self, request_id: str, call: Call) -> None:
        try:
            with self._all_running.request():
                async with contextlib.aclosing(call.outputs):
                    async for output in call.outputs:
                        if output.prompt_logprobs is not None and call.prompts is not None:
                            for part in call.prompts.listed_in_parts(output.index):
                                await self.send({"type": "prompt", "id": request_id, "index": output.index, **part})
                        await self.send(self._output(request_id, output, call))
            last: dict[str, Any] = {"type": "done", "id": request_id, "usage": call.answer.usage.values()}
        except ConnectionResetError:
            return  # nobody is left to tell
        except Exception as error:
            last = {"type": "error", "id": request_id, "error": error_of(error)}
        del self._running[request_id]  # from here on it cannot be cancelled
        with contextlib.suppress(ConnectionResetError):
            await self.send(last)

    def _output(self, request_id: str, output: Output, call: Call) -> dict[str, Any]:
        delta, reason = {"content": output.text}, output.finish_reason
        if isinstance(call.answer, ChatAnswer):
            delta, reason = call.answer.delta(output)
        else:
            call.answer.usage.add(output)
        prompt: dict[str, Any] = {}
        if isinstance(call.answer, ChatAnswer | CompletionAnswer) and call.answer.token_ids is not None:
            prompt = call.answer.token_ids.first_of(output)
            call.answer.token_ids.take(output)
        logprobs = None
        if call.has_logprobs:
            by_id = call.streaming.tokens_as_ids
            token_text = named_by_id(self._calls.token_text) if by_id else self._calls.token_text
            logprobs = logprobs_content(output, token_text, names_by_id=by_id)
        return {
            "type": "output", "id": request_id, "index": output.index, "text": delta.pop("content", ""),
            "token_ids": output.token_ids, "finish_reason": reason,
            "logprobs": logprobs, **prompt, **delta,
        }  # fmt: skip


def in_use(request_id: str | None) -> InvalidRequest:
    return InvalidRequest(f"id {shown(request_id)} is in use on this connection", param="id", code="id_in_use")
