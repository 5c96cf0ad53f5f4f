"""Conversations that are longer than the context: what was said first is left out. Pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from msi.errors import CONTEXT_EXCEEDED, InvalidRequest

T = TypeVar("T")


def cut_to_fit(chat: dict[str, Any], understand: Callable[[dict[str, Any]], T]) -> T:
    """What a chat asks, less as many of its oldest turns as have to go; looked for by halves.

    A turn is what a user says, with all that follows, as calls of tools belong to their results. What the system says
    before all turns stays.

    Args:
        understand: raises InvalidRequest of the code CONTEXT_EXCEEDED where a chat does not fit.

    Raises:
        InvalidRequest: of `understand`: not even the last turn fits, or something else is wrong.
    """
    messages = chat["messages"]
    leading = messages[:1] if messages and messages[0]["role"] == "system" else []
    first = len(leading)
    turns = [at for at, message in enumerate(messages) if message["role"] == "user" and at > first]
    starts = [first, *turns]
    fits: T | None = None
    too_long: InvalidRequest | None = None
    least, at, most = 0, 0, len(starts)  # the first of the starts from which it fits; all of it is tried first
    while least < most:
        try:
            fits, most = understand(chat | {"messages": leading + messages[starts[at] :]}), at
        except InvalidRequest as error:
            if error.code != CONTEXT_EXCEEDED:
                raise
            too_long, least = too_long or error, at + 1
        at = (least + most) // 2
    if fits is None:
        assert too_long is not None
        raise too_long
    return fits
