"""What is new of requests, between the connection that brings it and whoever takes it, who may be slow.

Nobody else waits for a slow one: whatever comes is kept, the first few updates as they are, what lies behind them
packed: six bytes a token, some hundred with log-probabilities. So an answer that nobody reads costs little until it
ends, and one beyond `MAX_HELD_BYTES` is given up. What comes out is what went in, update by update. Nobody waits here.
"""

from __future__ import annotations

from array import array
from collections import deque

from msi.errors import Failure, RequestFailed
from msi.net.codec import Codec
from msi.types import Progress

KEPT_WHOLE = 64  # updates
MAX_HELD_BYTES = 32 * 1024 * 1024  # of one inbox
TRIMMED = 4096  # updates that were taken, before their room is given back
CODEC = Codec([Progress])


class Inbox:
    """Of one call, however many requests it makes.

    Attributes:
        num_open: requests whose updates come here and have not ended; whoever puts and takes counts them.
    """

    def __init__(self, max_held_bytes: int = MAX_HELD_BYTES) -> None:
        self.num_open = 0
        self._max_held_bytes = max_held_bytes
        self._whole: deque[Progress] = deque()
        self._packed: _Packed | None = None  # while there is any
        self._is_given_up = False

    @property
    def held_bytes(self) -> int:
        """Of what is packed."""
        return 0 if self._packed is None else self._packed.num_bytes

    def put(self, update: Progress) -> None:
        """Never blocks. Once too much is held, the rest is dropped and the last thing to take is a failure."""
        if self._is_given_up:
            return
        if self._packed is None:
            if len(self._whole) < KEPT_WHOLE:
                self._whole.append(update)
                return
            self._packed = _Packed()
        self._packed.append(update)
        if self._packed.num_bytes > self._max_held_bytes:
            self._is_given_up = True
            self._packed = _Packed()
            error = RequestFailed(
                f"this answer was not read: {self._max_held_bytes >> 20} MiB of it were waiting. Read it as it comes, "
                "or ask for fewer log-probabilities or choices"
            )
            self._packed.append(Progress(update.request_id, failure=Failure.of(error)))

    def take(self) -> Progress | None:
        """The next update; None while there is none."""
        if self._whole:
            return self._whole.popleft()
        if self._packed is None:
            return None
        update = self._packed.popleft()
        if not len(self._packed):
            self._packed = None
        return update


class _Packed:
    """Updates as numbers: whose it is and the token. Those that say more are encoded, by their place."""

    def __init__(self) -> None:
        self._ids: list[str] = []  # of requests
        self._numbers: dict[str, int] = {}
        self._owners = array("H")  # n choices are 128 at most
        self._tokens = array("i")
        self._others: dict[int, bytes] = {}
        self._others_bytes = 0
        self._taken = 0  # of those at the head of the arrays
        self._trimmed = 0  # that were there before

    def __len__(self) -> int:
        return len(self._tokens) - self._taken

    @property
    def num_bytes(self) -> int:
        return len(self._tokens) * (self._owners.itemsize + self._tokens.itemsize) + self._others_bytes

    def append(self, update: Progress) -> None:
        owner = self._numbers.get(update.request_id)
        if owner is None:
            owner = self._numbers[update.request_id] = len(self._ids)
            self._ids.append(update.request_id)
        token = update.token_ids[0] if update.token_ids else 0
        if update != Progress(update.request_id, (token,)):
            encoded = CODEC.encode(update)
            self._others[self._trimmed + len(self._tokens)] = encoded
            self._others_bytes += len(encoded)
        self._owners.append(owner)
        self._tokens.append(token)

    def popleft(self) -> Progress:
        at, self._taken = self._taken, self._taken + 1
        encoded = self._others.pop(self._trimmed + at, None)
        if encoded is None:
            update = Progress(self._ids[self._owners[at]], (self._tokens[at],))
        else:
            self._others_bytes -= len(encoded)
            update = CODEC.decode(encoded)
        if self._taken == len(self._tokens) or self._taken == TRIMMED:
            del self._owners[: self._taken], self._tokens[: self._taken]
            self._trimmed += self._taken
            self._taken = 0
        return update
