"""The answer to a request that does not stream, put together while its outputs come.

Log-probabilities of many choices are a hundred megabytes of JSON: each output's are written when they come, so that
at the end there is nothing left that others would have to wait for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import orjson

from msi.types import Output


class Shape(Protocol):
    """How an endpoint shapes it."""

    num_choices: int

    def chunk(self, output: Output) -> dict[str, Any]: ...

    def frame(self) -> dict[str, Any]:
        """All but the choices, once every output has been a chunk."""

    def echoed(self, index: int) -> Mapping[str, bytes]:
        """What comes before a choice's own log-probabilities, items as JSON by name."""

    def choice(self, index: int, text: str, finish_reason: str | None) -> dict[str, Any]:
        """One choice, without log-probabilities."""


@dataclass(slots=True)
class _Choice:
    texts: list[str] = field(default_factory=list)
    finish_reason: str | None = None
    logprobs: dict[str, list[bytes]] | None = None  # by name, items as JSON


class Whole:
    """One answer: `add` each output, then join the `parts`."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._choices = [_Choice() for _ in range(shape.num_choices)]

    def add(self, output: Output) -> None:
        (part,) = self._shape.chunk(output)["choices"]
        choice = self._choices[output.index]
        choice.texts.append(output.text)
        choice.finish_reason = part["finish_reason"]
        if part["logprobs"] is not None:
            if choice.logprobs is None:
                echoed = self._shape.echoed(output.index)
                choice.logprobs = {name: [echoed[name]] if name in echoed else [] for name in part["logprobs"]}
            for name, items in part["logprobs"].items():
                if items:
                    choice.logprobs[name].append(orjson.dumps(items)[1:-1])

    def parts(self) -> Iterator[bytes]:
        """The JSON, piece by piece: each takes little time."""
        yield orjson.dumps(self._shape.frame())[:-1] + b',"choices":['
        for index, choice in enumerate(self._choices):
            values = self._shape.choice(index, "".join(choice.texts), choice.finish_reason)
            logprobs = b"null"
            if choice.logprobs is not None:
                items = (orjson.dumps(name) + b":[" + b",".join(one) + b"]" for name, one in choice.logprobs.items())
                logprobs = b"{" + b",".join(items) + b"}"
            yield (b"," if index else b"") + orjson.dumps(values)[:-1] + b',"logprobs":' + logprobs + b"}"
        yield b"]}"
