"""Answers as bytes: server-sent events while they come, or JSON once they are whole. Pure; knows no HTTP.

A stream of OpenAI's older endpoints is chunks of one type, and says at last that it is done; those of the newer APIs
are events that are named by their types, of which the last one ends it.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any, Protocol

import orjson

from msi.server.calls import Call, ChunkAnswer, TypedAnswer, error_of, status_of
from msi.server.chat_answers import ChatAnswer
from msi.server.completions import CompletionAnswer
from msi.server.fields import Streaming
from msi.server.typed_answers import Event
from msi.server.whole import Whole
from msi.types import Output

DONE = b"data: [DONE]\n\n"
MARK = "\0"  # stands for a text


class Reply(Protocol):
    """To one request: `events` of each output, then `end` or `failure`; or `add` each, then join the `parts`."""

    def events(self, output: Output) -> bytes: ...

    def end(self) -> bytes: ...

    def failure(self, error: Exception) -> bytes: ...

    def add(self, output: Output) -> None: ...

    def parts(self) -> Iterator[bytes]: ...


def reply_of(call: Call) -> Reply:
    """As the endpoint that was asked has it."""
    if isinstance(call.answer, CompletionAnswer | ChatAnswer):
        return ChunkReply(call.answer, call.streaming)
    return TypedReply(call.answer)


class ChunkReply:
    """Of /v1/completions and /v1/chat/completions."""

    def __init__(self, answer: ChunkAnswer, streaming: Streaming) -> None:
        self._answer = answer
        self._streaming = streaming
        self._is_plain = answer.is_plain and not (streaming.include_usage and streaming.continuous_usage)
        self._begun: set[int] = set()  # choices
        self._around: dict[int, tuple[bytes, bytes]] = {}  # see `_cut`

    def events(self, output: Output) -> bytes:
        if not self._is_plain or output.finish_reason is not None or output.index not in self._begun:
            self._begun.add(output.index)
            return self._events([*self._answer.opening(output), self._answer.chunk(output)])
        self._answer.usage.add(output)
        around = self._around.get(output.index)
        if around is None:  # not with the first, for which the client waits
            around = self._around[output.index] = self._cut(output)
        return around[0] + orjson.dumps(output.text) + around[1]

    def _cut(self, output: Output) -> tuple[bytes, bytes]:
        """What stands before and behind the text of a choice's chunks."""
        marked = output._replace(text=MARK, token_ids=())
        before, after = self._events([self._answer.chunk(marked)]).split(orjson.dumps(MARK))
        return before, after

    def _events(self, chunks: list[dict[str, Any]]) -> bytes:
        if self._streaming.include_usage:
            usage = self._answer.usage.values() if self._streaming.continuous_usage else None
            chunks = [{**chunk, "usage": usage} for chunk in chunks]
        return b"".join(_data(chunk) for chunk in chunks)

    def end(self) -> bytes:
        return (_data(self._answer.usage_chunk()) if self._streaming.include_usage else b"") + DONE

    def failure(self, error: Exception) -> bytes:
        return _data({"error": error_of(error)}) + DONE

    @cached_property
    def _whole(self) -> Whole:
        """Where it does not stream."""
        return Whole(self._answer)

    def add(self, output: Output) -> None:
        self._whole.add(output)

    def parts(self) -> Iterator[bytes]:
        return self._whole.parts()


class TypedReply:
    """Of /v1/responses and /v1/messages."""

    def __init__(self, answer: TypedAnswer) -> None:
        self._answer = answer

    def events(self, output: Output) -> bytes:
        return _typed(self._answer.add(output))

    def end(self) -> bytes:
        return b""

    def failure(self, error: Exception) -> bytes:
        return _typed(self._answer.failed(error_of(error), status_of(error)))

    def add(self, output: Output) -> None:
        self._answer.add(output)

    def parts(self) -> Iterator[bytes]:
        yield self._answer.whole()


def _data(values: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(values) + b"\n\n"


def _typed(events: list[Event]) -> bytes:
    return b"".join(b"event: " + event["type"].encode() + b"\n" + _data(event) for event in events)
