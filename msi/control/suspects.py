"""Requests under which workers crashed, and which of them is the one that does it. Decides; does not act.

Several requests run when a worker crashes, and only one may be why. So each of them is suspected, and goes on alone: no
other suspect, and nothing new, is given to a worker meanwhile. One that gets on is suspected no longer; one whose
worker crashes again is guilty, and is not tried a third time. Whatever asks for the very same is treated like it, for
some time.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, replace

from msi.errors import RequestFailed
from msi.types import Request

CRASHES_ALLOWED = 2
SUSPECTED_FOR_S = 600.0
MOST_SUSPECTS = 4096
ACQUITTED_AFTER = 4  # tokens: as many as may have been lost with the worker that crashed, and more


def asked_by(request: Request) -> bytes:
    """The same for all requests that ask for the same, whatever they are called. Takes a time that grows with it."""
    params = replace(request.params, seed=None)  # an engine draws another one each time
    prompt = array("q", request.prompt_token_ids).tobytes()
    return hashlib.blake2b(repr(params).encode(), key=hashlib.blake2b(prompt).digest()[:32]).digest()


def guilty(lost_by: str = "") -> RequestFailed:
    """The end of one that is not tried again; `lost_by`: why it has no worker."""
    return RequestFailed(
        f"{lost_by}{'; ' * bool(lost_by)}attention workers crashed {CRASHES_ALLOWED} times while they ran this very "
        f"request; it is not tried again for {SUSPECTED_FOR_S / 60:.0f} minutes"
    )


class Suspects:
    """By what they ask for (`asked_by`)."""

    def __init__(self) -> None:
        self._crashed_at: dict[bytes, float] = {}  # of those that are suspected
        self._guilty: dict[bytes, float] = {}

    def __bool__(self) -> bool:
        """Whether anybody is, or was."""
        return bool(self._crashed_at or self._guilty)

    def crashed(self, asked: Iterable[bytes], now: float) -> None:
        """A worker ended by itself while it had these."""
        for one in asked:
            _remember(self._crashed_at, one, now)

    def convict(self, asked: bytes, now: float) -> None:
        """It was alone when a worker crashed once more."""
        self.clear(asked)
        _remember(self._guilty, asked, now)

    def clear(self, asked: bytes) -> None:
        """It got on."""
        self._crashed_at.pop(asked, None)

    def is_suspected(self, asked: bytes, now: float) -> bool:
        """Whether it is to run alone."""
        return _is_recent(self._crashed_at.get(asked), now)

    def is_guilty(self, asked: bytes, now: float) -> bool:
        """Whether it is not to be tried again."""
        return _is_recent(self._guilty.get(asked), now)


@dataclass(frozen=True, slots=True)
class Trial:
    """A suspect that runs. `acquitted_at`: with so many tokens of its answer."""

    name: str
    asked: bytes
    acquitted_at: int


class Trials:
    """Which suspect runs at which worker, alone."""

    def __init__(self) -> None:
        self._running: dict[str, Trial] = {}  # by worker

    def __contains__(self, worker_id: str) -> bool:
        return worker_id in self._running

    def __bool__(self) -> bool:
        return bool(self._running)

    def is_tried(self, asked: bytes) -> bool:
        """Whether one that asks for the same runs."""
        return any(trial.asked == asked for trial in self._running.values())

    def begin(self, worker_id: str, name: str, asked: bytes, num_tokens: int) -> None:
        """A suspect is given to this worker, with so many tokens of its answer."""
        assert worker_id not in self._running, f"{name} at {worker_id}, which has {self._running[worker_id]}"
        self._running[worker_id] = Trial(name, asked, num_tokens + ACQUITTED_AFTER)

    def is_acquitted(self, worker_id: str, name: str, num_tokens: int) -> bool:
        """Whether it is on trial there, and has come far enough."""
        trial = self._running.get(worker_id)
        return trial is not None and trial.name == name and num_tokens >= trial.acquitted_at

    def end(self, worker_id: str, name: str) -> bool:
        """It is over, or was lost with its worker; False where it was not on trial there."""
        trial = self._running.get(worker_id)
        if trial is None or trial.name != name:
            return False
        del self._running[worker_id]
        return True


def _remember(times: dict[bytes, float], asked: bytes, now: float) -> None:
    times.pop(asked, None)  # the oldest come first
    times[asked] = now
    while len(times) > MOST_SUSPECTS:
        del times[next(iter(times))]


def _is_recent(at: float | None, now: float) -> bool:
    return at is not None and now - at < SUSPECTED_FOR_S
