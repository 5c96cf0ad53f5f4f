"""Anthropic's message object, and the events of its stream, put together while the answer comes.

message_start
    content_block_start, content_block_delta ..., content_block_stop      for what was thought, text, each call
message_delta       why it ended, and usage
message_stop
"""

from __future__ import annotations

import hashlib
from typing import Any

import orjson

from msi.server.answers import Usage
from msi.server.anthropic.errors import error_body
from msi.server.parsing.deltas import Arguments, CallBegun, Content, Delta, Reasoning
from msi.server.prepare import Prepared
from msi.server.typed_answers import Event, Pieces
from msi.types import Output

TEXT, THINKING, TOOL_USE = "text", "thinking", "tool_use"
DELTAS = {TEXT: ("text_delta", "text"), THINKING: ("thinking_delta", "thinking"),
          TOOL_USE: ("input_json_delta", "partial_json")}  # fmt: skip


class MessageAnswer:
    """Shapes the outputs of one request.

    Args:
        answer_id: the client's or a new one.
    """

    def __init__(self, answer_id: str, model: str, asked: Prepared) -> None:
        self.request_id = f"msg_{answer_id}"
        self.usage = Usage()
        self._pieces = Pieces(asked.parsing)
        self._has_begun = False
        self._blocks: list[_Block] = []
        self._open: _Block | None = None
        self._end: dict[str, Any] = {"stop_reason": None, "stop_sequence": None}
        self._head = {"id": self.request_id, "type": "message", "role": "assistant", "model": model}

    def add(self, output: Output) -> list[Event]:
        """What to tell of it: with the first one what comes before it, with the last one all that is left."""
        self.usage.add(output)
        events: list[Event] = []
        if not self._has_begun:
            self._has_begun = True
            message = self._head | self._end | {"content": [], "usage": self._usage()}
            events.append({"type": "message_start", "message": message})
        for one in self._pieces.push(output):
            events += self._delta(one)
        if output.finish_reason is not None:
            events += self._close()
            self._end = self._why(output)
            events += [
                {"type": "message_delta", "delta": self._end, "usage": self._usage()},
                {"type": "message_stop"},
            ]
        return events

    def failed(self, error: dict[str, Any], status: int) -> list[Event]:
        """The end of a stream whose request failed; `error`: OpenAI's error object."""
        return [error_body(error, status)]

    def whole(self) -> bytes:
        """The answer to a request that does not stream, in JSON."""
        content = [block.values() for block in self._blocks]
        return orjson.dumps(self._head | self._end | {"content": content, "usage": self._usage()})

    def _why(self, output: Output) -> dict[str, Any]:
        if output.finish_reason == "length":
            return {"stop_reason": "max_tokens", "stop_sequence": None}
        if output.stopped_by:
            return {"stop_reason": "stop_sequence", "stop_sequence": output.stopped_by}
        return {"stop_reason": "tool_use" if self._pieces.has_calls else "end_turn", "stop_sequence": None}

    def _delta(self, delta: Delta) -> list[Event]:
        match delta:
            case Content(text):
                return self._text(TEXT, text)
            case Reasoning(text):
                return self._text(THINKING, text)
            case CallBegun(_, call_id, name):
                return self._begin(_Block(TOOL_USE, len(self._blocks), {"id": call_id, "name": name}))
            case Arguments(_, text):
                assert self._open is not None, "arguments follow their call"
                return [self._open.more(text)]

    def _text(self, kind: str, text: str) -> list[Event]:
        events: list[Event] = []
        if self._open is None or self._open.kind != kind:
            events = self._begin(_Block(kind, len(self._blocks), {}))
        assert self._open is not None, "it was begun"
        return [*events, self._open.more(text)]

    def _begin(self, block: _Block) -> list[Event]:
        events = self._close()
        self._open = block
        self._blocks.append(block)
        return [*events, {"type": "content_block_start", "index": block.index, "content_block": block.beginning()}]

    def _close(self) -> list[Event]:
        """The end of what is open."""
        block, self._open = self._open, None
        if block is None:
            return []
        events: list[Event] = []
        if block.kind == THINKING:
            signature = {"type": "signature_delta", "signature": block.signature()}
            events.append({"type": "content_block_delta", "index": block.index, "delta": signature})
        return [*events, {"type": "content_block_stop", "index": block.index}]

    def _usage(self) -> dict[str, int]:
        """Prompt tokens that the prefix cache had are counted apart from the others."""
        counts = self.usage.values()
        num_cached = counts["prompt_tokens_details"]["cached_tokens"]
        return {
            "input_tokens": counts["prompt_tokens"] - num_cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": num_cached,
            "output_tokens": counts["completion_tokens"],
        }


class _Block:
    """One block of the content; `fields`: of a call, its id and name."""

    def __init__(self, kind: str, index: int, fields: dict[str, str]) -> None:
        self.kind = kind
        self.index = index
        self._fields = fields
        self._texts: list[str] = []

    def more(self, text: str) -> Event:
        self._texts.append(text)
        kind, name = DELTAS[self.kind]
        return {"type": "content_block_delta", "index": self.index, "delta": {"type": kind, name: text}}

    def beginning(self) -> dict[str, Any]:
        """The block before anything of it has come."""
        empty: dict[str, Any] = {TEXT: {"text": ""}, THINKING: {"thinking": "", "signature": ""}}.get(self.kind, {})
        return {"type": self.kind, **self._fields, **(empty or {"input": {}})}

    def signature(self) -> str:
        """Clients give back only thoughts that have one; nobody checks it."""
        return hashlib.sha256("".join(self._texts).encode(errors="replace")).hexdigest()

    def values(self) -> dict[str, Any]:
        """The whole block."""
        text = "".join(self._texts)
        if self.kind == TOOL_USE:
            return {"type": TOOL_USE, **self._fields, "input": orjson.Fragment(text.encode())}
        values = {"type": self.kind, self.kind: text}
        return values | {"signature": self.signature()} if self.kind == THINKING else values
