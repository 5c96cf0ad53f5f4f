"""OpenAI's response object, and the events of its stream, put together while the answer comes.

response.created, response.in_progress
    response.output_item.added                      for what was thought, for the text, for each call
        response.content_part.added                 not for calls
            response.output_text.delta ... .done    or reasoning_text, or function_call_arguments
        response.content_part.done
    response.output_item.done
response.completed, or .incomplete at the end of the room, or .failed
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import orjson

from msi.server.answers import Usage
from msi.server.parsing.deltas import Arguments, CallBegun, Content, Delta, Reasoning
from msi.server.prepare import Prepared
from msi.server.responses.output import CALL, MESSAGE, REASONING, Item
from msi.server.typed_answers import Event, Pieces
from msi.types import Output


class ResponseAnswer:
    """Shapes the outputs of one request.

    Args:
        answer_id: the client's or a new one; ids of the answer and of its items are made of it.
        created: in seconds since 1970.
        clock: the same, now.
    """

    def __init__(
        self, answer_id: str, model: str, created: int, asked: Prepared, clock: Callable[[], float] = time.time
    ) -> None:
        self._is_streamed = asked.streaming.stream
        self.request_id = f"resp_{answer_id}"
        self.usage = Usage()
        self._id = answer_id
        self._clock = clock
        self._pieces = Pieces(asked.parsing)
        self._num_reasoning = 0  # tokens
        self._num_events = 0
        self._items: list[Item] = []
        self._open: Item | None = None
        self._status = "in_progress"
        self._error: dict[str, Any] | None = None
        self._told = b"," + asked.told[1:] if len(asked.told) > len(b"{}") else b"}"
        self._fields = {
            "id": self.request_id, "object": "response", "created_at": created, "model": model, "background": False,
            "previous_response_id": None, "service_tier": "default", "store": False,
            "temperature": asked.params.temperature, "top_p": asked.params.top_p, "top_logprobs": 0,
        }  # fmt: skip

    def add(self, output: Output) -> list[Event]:
        """What to tell of it: with the first one what comes before it, with the last one all that is left."""
        self.usage.add(output)
        events = [] if self._num_events else [*self._stage("created"), *self._stage("in_progress")]
        deltas = self._pieces.push(output)
        if any(isinstance(one, Reasoning) for one in deltas):
            self._num_reasoning += len(output.token_ids)
        for one in deltas:
            events += self._delta(one)
        if output.finish_reason is not None:
            self._status = "incomplete" if output.finish_reason == "length" else "completed"
            events += self._close(self._status)
            events += self._stage(self._status)
        return events

    def failed(self, error: dict[str, Any], status: int) -> list[Event]:
        """The end of a stream whose request failed; `error`: OpenAI's error object."""
        self._status, self._error = "failed", {"code": "server_error", "message": error["message"]}
        return [*self._close("incomplete"), *self._stage("failed")]

    def whole(self) -> bytes:
        """The answer to a request that does not stream, in JSON."""
        return orjson.dumps(self._response())

    # -- events ------------------------------------------------------------------------------------------------------

    def _stage(self, name: str) -> list[Event]:
        """The response so far, which takes time that is only spent where somebody reads it."""
        return [self._event(f"response.{name}", response=self._response())] if self._is_streamed else []

    def _delta(self, delta: Delta) -> list[Event]:
        match delta:
            case Content(text):
                return self._text(MESSAGE, text)
            case Reasoning(text):
                return self._text(REASONING, text)
            case CallBegun(_, call_id, name):
                return self._begin(CALL, call_id=call_id, name=name)
            case Arguments(_, text):
                assert self._open is not None, "arguments follow their call"
                return self._more(self._open, text)

    def _text(self, kind: str, text: str) -> list[Event]:
        events = [] if self._open is not None and self._open.kind == kind else self._begin(kind)
        assert self._open is not None, "it was begun"
        return events + self._more(self._open, text)

    def _more(self, item: Item, text: str) -> list[Event]:
        item.texts.append(text)
        return [self._event(f"{item.event}.delta", **item.place(), delta=text, **item.no_logprobs())]

    def _begin(self, kind: str, **fields: str) -> list[Event]:
        events = self._close("completed")
        item = self._open = Item(kind, self._id, len(self._items), fields)
        self._items.append(item)
        told = item.values("in_progress", has_content=False)
        events.append(self._event("response.output_item.added", output_index=item.index, item=told))
        if (part := item.part("")) is not None:
            events.append(self._event("response.content_part.added", **item.place(), part=part))
        return events

    def _close(self, status: str) -> list[Event]:
        """The end of what is open."""
        item, self._open = self._open, None
        if item is None:
            return []
        item.close(status)
        last = {item.done: item.text, **item.no_logprobs()}
        events = [self._event(f"{item.event}.done", **item.place(), **last)]
        if (part := item.part(item.text)) is not None:
            events.append(self._event("response.content_part.done", **item.place(), part=part))
        events.append(self._event("response.output_item.done", output_index=item.index, item=item.values()))
        return events

    def _event(self, kind: str, **fields: Any) -> Event:
        self._num_events += 1
        return {"type": kind, "sequence_number": self._num_events - 1, **fields}

    # -- the whole ---------------------------------------------------------------------------------------------------

    def _response(self) -> orjson.Fragment:
        """As far as it has come, in JSON; what it repeats of the request is JSON already."""
        is_over = self._status != "in_progress"
        fields = self._fields | {
            "status": self._status, "error": self._error, "output": [item.values() for item in self._items],
            "incomplete_details": {"reason": "max_output_tokens"} if self._status == "incomplete" else None,
            "completed_at": int(self._clock()) if self._status == "completed" else None,
            "usage": self._usage() if is_over else None,
        }  # fmt: skip
        return orjson.Fragment(orjson.dumps(fields)[:-1] + self._told)

    def _usage(self) -> dict[str, Any]:
        counts = self.usage.values()
        return {
            "input_tokens": counts["prompt_tokens"],
            "input_tokens_details": {**counts["prompt_tokens_details"], "cache_write_tokens": 0},
            "output_tokens": counts["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": self._num_reasoning},
            "total_tokens": counts["total_tokens"],
        }
