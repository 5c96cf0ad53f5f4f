"""Handing completions to a handler, and keeping those that come before there is one."""

from __future__ import annotations

from collections.abc import Sequence

from msi.net.transport import CompletionKind, Endpoint, Handler, Landed, Together

IMMEDIATE = CompletionKind.IMMEDIATE


class Delivery:
    """Call it with what happened, where the transport says; what was gathered before goes first.

    A transport that finds several immediates at a time gathers them, and hands them over when it has looked everywhere.

    Attributes:
        all: takes immediates that lie there together, in order.
    """

    def __init__(self) -> None:
        self.all: Together = self._each
        self._gathered: list[Landed] = []
        self._early: list[tuple[Endpoint, CompletionKind, int, str]] = []
        self._handler: Handler | None = None

    def __call__(self, endpoint: Endpoint, kind: CompletionKind, immediate: int = 0, reason: str = "") -> None:
        if self._gathered:
            self.hand_over()
        if self._handler is None:
            self._early.append((endpoint, kind, immediate, reason))
        else:
            self._handler(endpoint, kind, immediate, reason)

    def gather(self, endpoint: Endpoint, immediate: int, came_at: float = 0.0) -> bool:
        """One that lies there, perhaps with others; whether it is the first of them."""
        gathered = self._gathered
        gathered.append((endpoint, immediate, came_at))
        return len(gathered) == 1

    def hand_over(self) -> None:
        """What was gathered."""
        if self._gathered:
            gathered, self._gathered = self._gathered, []
            self.all(gathered)

    def _each(self, landed: Sequence[Landed]) -> None:
        for endpoint, immediate, came_at in landed:
            endpoint.came_at = came_at
            self(endpoint, IMMEDIATE, immediate)

    def start(self, handler: Handler, together: Together | None = None) -> None:
        """From now on to this handler, beginning with what came before."""
        self._handler = handler
        early, self._early = self._early, []
        for completion in early:
            handler(*completion)
        self.all = together or self._each
