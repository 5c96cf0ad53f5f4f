"""Requests under which workers crashed: one that did so again and again is not tried once more. Decides; does not act.

Several requests run when a worker crashes, and only one may be why. So one that has ever been answered to its end since
is suspected no longer, and a crash counts for some time only.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from msi.types import Request

CRASHES_ALLOWED = 2
SUSPECTED_FOR_S = 600.0
MOST_SUSPECTS = 4096

_Key = tuple[tuple[int, ...], str]


class Suspects:
    """By what they ask for, whatever they are called."""

    def __init__(self) -> None:
        self._crashes: dict[_Key, list[float]] = {}  # times of the last, by what was asked

    def crashed(self, requests: Iterable[Request], now: float) -> None:
        """A worker ended by itself while it had these."""
        for key in {_key(request) for request in requests}:
            self._crashes[key] = [*self._recent(key, now), now]
        while len(self._crashes) > MOST_SUSPECTS:
            del self._crashes[next(iter(self._crashes))]

    def clear(self, request: Request) -> None:
        """It was answered to its end."""
        if self._crashes:
            self._crashes.pop(_key(request), None)

    def is_guilty(self, request: Request, now: float) -> bool:
        """Whether it is not to be tried again."""
        return bool(self._crashes) and len(self._recent(_key(request), now)) >= CRASHES_ALLOWED

    def _recent(self, key: _Key, now: float) -> list[float]:
        return [at for at in self._crashes.get(key, []) if now - at < SUSPECTED_FOR_S]


def _key(request: Request) -> _Key:
    params = replace(request.params, seed=None)  # an engine draws another one each time
    return request.prompt_token_ids, repr(params)
