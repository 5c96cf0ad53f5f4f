"""Answers of APIs whose streams are events of several types: what they are put together from. Pure; knows no HTTP."""

from __future__ import annotations

from typing import Any

from msi.server.parsing.deltas import Content, Delta
from msi.server.parsing.parser import Parsing
from msi.types import Output

Event = dict[str, Any]  # "type" is its name


class Pieces:
    """What an answer says, as it comes.

    Args:
        parsing: what is looked for; None where all is text.
    """

    def __init__(self, parsing: Parsing | None) -> None:
        self._parser = None if parsing is None else parsing.parser()

    @property
    def has_calls(self) -> bool:
        return self._parser is not None and self._parser.num_calls > 0

    def push(self, output: Output) -> list[Delta]:
        """What is new, in the order in which it was written."""
        if self._parser is None:
            return [Content(output.text)] if output.text else []
        deltas = self._parser.push(output.text)
        if output.finish_reason is not None:
            deltas += self._parser.close(is_cut=output.finish_reason == "length")
        return deltas
