"""One item of a response's output: what was thought, the text, or a call of a function."""

from __future__ import annotations

from typing import Any

REASONING, MESSAGE, CALL = "reasoning", "message", "function_call"
PREFIXES = {REASONING: "rs", MESSAGE: "msg", CALL: "fc"}
EVENTS = {
    REASONING: "response.reasoning_text", MESSAGE: "response.output_text", CALL: "response.function_call_arguments",
}  # fmt: skip


class Item:
    """One item, which is open until `close`.

    Args:
        answer_id: what its own id is made of.
        index: in the output.
        fields: of a call: name and call_id.

    Attributes:
        texts: what came, piece by piece: of a call, its arguments.
        event: the name of the events that tell the text, less its end.
        done: the name of the field with the whole text in the last of them.
    """

    def __init__(self, kind: str, answer_id: str, index: int, fields: dict[str, str]) -> None:
        self.kind = kind
        self.index = index
        self.texts: list[str] = []
        self.text = ""
        self.event = EVENTS[kind]
        self.done = "arguments" if kind == CALL else "text"
        self._status = "in_progress"
        self._id = f"{PREFIXES[kind]}_{answer_id}-{index}"
        self._fields = fields

    def close(self, status: str) -> None:
        """Nothing follows."""
        self.text = "".join(self.texts)
        self._status = status

    def place(self) -> dict[str, Any]:
        """Where what an event tells belongs."""
        place = {"item_id": self._id, "output_index": self.index}
        return place if self.kind == CALL else {**place, "content_index": 0}

    def no_logprobs(self) -> dict[str, Any]:
        """What events of the text have besides."""
        return {"logprobs": []} if self.kind == MESSAGE else {}

    def part(self, text: str) -> dict[str, Any] | None:
        """The part of its content that has the text; None for a call."""
        if self.kind == MESSAGE:
            return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
        return {"type": "reasoning_text", "text": text} if self.kind == REASONING else None

    def values(self, status: str = "", *, has_content: bool = True) -> dict[str, Any]:
        """The item; args: status: "" for the one that it has."""
        values: dict[str, Any] = {"id": self._id, "type": self.kind, "status": status or self._status, **self._fields}
        if self.kind == CALL:
            return values | {"arguments": self.text}
        values["content"] = [self.part(self.text)] if has_content else []
        more: dict[str, Any] = {"role": "assistant"} if self.kind == MESSAGE else {"summary": []}
        return values | more
