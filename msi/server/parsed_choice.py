"""The message of one choice, put together while its text comes, where reasoning or calls of tools are looked for."""

from __future__ import annotations

from typing import Any

from msi.server.parsing.deltas import Arguments, CallBegun, Content, Delta, Reasoning
from msi.server.parsing.parser import Parsing


class ParsedChoice:
    """One choice's.

    Args:
        keeps: whether the whole `message` will be asked for.
    """

    def __init__(self, parsing: Parsing, *, keeps: bool) -> None:
        self._parser = parsing.parser()
        self._keeps = keeps
        self._kept: list[dict[str, Any]] = []

    def delta(self, text: str, finish_reason: str | None) -> tuple[dict[str, Any], str | None]:
        """What is new of the message, {} while nothing is certain; and the reason with which it ends, if it does."""
        deltas = self._parser.push(text)
        if finish_reason is not None:
            deltas += self._parser.close(is_cut=finish_reason == "length")
            if finish_reason == "stop" and self._parser.num_calls:
                finish_reason = "tool_calls"
        values = _values(deltas)
        if self._keeps and values:
            self._kept.append(values)
        return values, finish_reason

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
