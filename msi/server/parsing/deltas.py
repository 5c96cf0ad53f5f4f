"""What parsers find, in the order in which it was written."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Content:
    """Text for the user."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """What the model thought."""

    text: str


@dataclass(frozen=True, slots=True)
class Call:
    """A whole call of a tool that the request declared.

    Attributes:
        arguments: a JSON object, as text.
        id: the model's own; "" where it gave none.
    """

    name: str
    arguments: str
    id: str = ""


@dataclass(frozen=True, slots=True)
class CallBegun:
    """A call of a tool; its arguments follow. `index` counts the calls of an answer."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """More of the arguments of call `index`: joined, they are a JSON object."""

    index: int
    text: str


Found = Content | Reasoning | Call  # what readers of one syntax yield
Delta = Content | Reasoning | CallBegun | Arguments  # what a client is told
