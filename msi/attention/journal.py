"""What an attention worker told last, kept for a coordinator that takes over: one may die with words on its way.

The coordinator before may have died before it passed on what it was told, and nobody answers while there is none. So
the last seconds before the last sign of life, and everything since, are kept, with what tells a request from others.
Decides; does not act. Knows no sockets or clock.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

from msi.attention.sequence import Sequence
from msi.types import Progress, Request

KEPT_S = 5.0  # a client that had not read for longer gets its tokens from being computed again
MAX_KEPT = 1 << 17  # Progress; of older ones the same holds

Count = Annotated[int, range(2**40)]


@dataclass(frozen=True, slots=True)
class RequestAccount:
    """One request at a worker that runs there, or has ended not long ago.

    Attributes:
        digest: as `digest_of` has it.
        num_tokens, num_scored: of its output, and of its prompt, that were told before `progress`.
        progress: the last that was told of it, in order; its last one ends it if it has ended.
    """

    request_id: str
    digest: bytes
    num_tokens: Count
    num_scored: Count
    progress: tuple[Progress, ...] = ()


def digest_of(request: Request) -> bytes:
    """The same for requests that have the same tokens: prompt, parameters and seed. Takes a time that grows with it."""
    prompt = hashlib.blake2b(array("q", request.prompt_token_ids).tobytes()).digest()
    return hashlib.blake2b(repr(request.params).encode(), key=prompt[:32], digest_size=16).digest()


class Journal:
    """Of one worker's life."""

    def __init__(self) -> None:
        self._passes: deque[tuple[float, tuple[Progress, ...]]] = deque()
        self._num_passes = 0  # since the start
        self._num_kept = 0
        self._began: dict[str, int] = {}  # with which pass; what was told of the same id before is another request's
        self._ended: dict[str, Sequence] = {}

    def begins(self, request_id: str) -> None:
        """A request comes."""
        self._ended.pop(request_id, None)
        self._began[request_id] = self._num_passes

    def forget(self, request_id: str) -> None:
        """Nobody waits for it any more."""
        self._began.pop(request_id, None)
        self._ended.pop(request_id, None)

    def told(self, progress: tuple[Progress, ...], ended: Iterable[Sequence], now: float) -> None:
        """One pass, and the sequences that ended with it."""
        self._passes.append((now, progress))
        self._num_passes += 1
        self._num_kept += len(progress)
        for sequence in ended:
            self._ended[sequence.request.request_id] = sequence
        while self._num_kept > MAX_KEPT:
            self._drop()

    def heard(self, now: float) -> None:
        """The coordinator lives: what is older than `KEPT_S` has come to whom it concerns, or never will."""
        while self._passes and self._passes[0][0] < now - KEPT_S:
            self._drop()

    def _drop(self) -> None:
        _, progress = self._passes.popleft()
        self._num_kept -= len(progress)
        for one in progress if self._ended else ():
            if one.is_last and one.request_id in self._ended:
                self.forget(one.request_id)

    def accounts(self, running: Iterable[Sequence]) -> list[RequestAccount]:
        """Of those that run, and of those that ended and are still known."""
        told: dict[str, list[Progress]] = {}
        for number, (_, progress) in enumerate(self._passes, self._num_passes - len(self._passes)):
            for one in progress:
                if number >= self._began.get(one.request_id, self._num_passes):
                    told.setdefault(one.request_id, []).append(one)
        sequences = {sequence.request.request_id: sequence for sequence in (*self._ended.values(), *running)}
        return [_account(sequence, told.get(name, [])) for name, sequence in sequences.items()]


def _account(sequence: Sequence, told: list[Progress]) -> RequestAccount:
    request = sequence.request
    num_told = sum(len(one.token_ids) for one in told)
    num_scored_told = sum(num_scored(one) for one in told)
    return RequestAccount(
        request.request_id, digest_of(request),
        len(sequence.tokens) - len(request.prompt_token_ids) - num_told, sequence.num_scored - num_scored_told,
        tuple(told),
    )  # fmt: skip


def num_scored(progress: Progress) -> int:
    """Tokens of the prompt that it scores."""
    return 0 if progress.prompt_logprobs is None else len(progress.prompt_logprobs)
