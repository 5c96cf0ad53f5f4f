"""The message of one choice, put together while its text comes, where reasoning or calls of tools are looked for."""

from __future__ import annotations

from typing import Any

from msi.server.parsing.deltas import Arguments, CallBegun, Content, Delta, Reasoning
from msi.server.parsing.parser import Parsing
from msi.types import Output


class ParsedChoice:
    """One choice's.

    Args:
        keeps: whether the whole `message` will be asked for.

    Attributes:
        num_reasoning: tokens of what was thought so far, its markers not counted where they are tokens of their own.
    """

    def __init__(self, parsing: Parsing, *, keeps: bool) -> None:
        self._parser = parsing.parser()
        self.num_reasoning = 0
        self._num_open = 0  # tokens of which it is not certain what they belong to
        self._is_thinking = parsing.is_thinking
        self._keeps = keeps
        self._kept: list[dict[str, Any]] = []

    def delta(self, output: Output) -> tuple[dict[str, Any], str | None]:
        """What is new of the message, {} while nothing is certain; and the reason with which it ends, if it does."""
        finish_reason = output.finish_reason
        num_found = self._parser.num_found
        deltas = self._parser.push(output.text)
        if finish_reason is not None:
            deltas += self._parser.close(is_cut=finish_reason == "length")
            if finish_reason == "stop" and self._parser.num_calls:
                finish_reason = "tool_calls"
        self._count(len(output.token_ids), num_found)
        values = _values(deltas)
        if self._keeps and values:
            self._kept.append(values)
        return values, finish_reason

    def _count(self, num_tokens: int, num_found: int) -> None:
        """What is thought, once that is certain of its tokens.

        Args:
            num_found: pieces that were certain before these tokens.
        """
        if not num_found and not self._is_thinking:
            self._num_open = 0  # what came so far begins the thought
        self._num_open += num_tokens
        if self._parser.num_found > num_found:
            if self._parser.last_found is Reasoning:
                self.num_reasoning += self._num_open
            self._num_open = 0

    def message(self) -> dict[str, Any]:
        """The whole message; content is null where there is none, but something else."""
        reasoning = _joined(self._kept, "reasoning")
        calls = [_whole(call) for one in self._kept for call in one.get("tool_calls", ())]
        content = _joined(self._kept, "content")
        message: dict[str, Any] = {"role": "assistant", "content": content or (None if reasoning or calls else "")}
        if reasoning:
            message |= {"reasoning": reasoning, "reasoning_content": reasoning}
        return message | ({"tool_calls": calls} if calls else {})


def _values(deltas: list[Delta]) -> dict[str, Any]:
    """As OpenAI's delta, with what was thought under vLLM's name for it now, and under the one that it had before."""
    values: dict[str, Any] = {}
    calls: dict[int, dict[str, Any]] = {}
    for one in deltas:
        match one:
            case Content(text):
                values["content"] = values.get("content", "") + text
            case Reasoning(text):
                values["reasoning"] = values["reasoning_content"] = values.get("reasoning", "") + text
            case CallBegun(index, call_id, name):
                function = {"name": name, "arguments": ""}
                calls[index] = {"index": index, "id": call_id, "type": "function", "function": function}
            case Arguments(index, text):
                call = calls.setdefault(index, {"index": index, "function": {"arguments": ""}})
                call["function"]["arguments"] += text
    if calls:
        values["tool_calls"] = list(calls.values())
    return values


def _joined(kept: list[dict[str, Any]], name: str) -> str:
    return "".join(one.get(name, "") for one in kept)


def _whole(call: dict[str, Any]) -> dict[str, Any]:
    """A call without its index: calls of a whole message are counted by their places."""
    return {name: value for name, value in call.items() if name != "index"}
