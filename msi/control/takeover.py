"""Requests of the coordinator before: what workers hold of them, what clients have of them, and which is whose.

A client that finds a new coordinator submits again what it waits for, with the tokens that it has; a worker that is
found says what it runs, and what it told last. Where the two meet, the client gets what it lacks and the rest as it
comes. Where a worker has no such request, or no longer knows the first token that is lacking, the request is computed
again from what its client has, as that of a lost worker is. What a worker holds and nobody asks for is cancelled.

Decides; does not act. Knows no sockets or clock.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from msi.attention.journal import RequestAccount, digest_of, num_scored
from msi.types import Progress, Request

CLAIMED_WITHIN_S = 10.0  # a client that is silent for longer is lost
ACCOUNTED_WITHIN_S = 2.0  # what a worker says in one go


@dataclass(slots=True)
class Held:
    """A request at a worker. `told`: everything of it from output token `num_tokens` on."""

    worker_id: str
    digest: bytes
    num_tokens: int
    num_scored: int
    told: list[Progress]
    until: float

    @property
    def is_over(self) -> bool:
        return bool(self.told) and self.told[-1].is_last

    def behind(self, request: Request) -> tuple[Progress, ...] | None:
        """What its client lacks; None where that is not known here."""
        at, wanted = (self.num_tokens, self.num_scored), (len(request.output_token_ids), request.num_scored)
        for index, one in enumerate(self.told):
            if at == wanted:
                return tuple(self.told[index:])
            at = (at[0] + len(one.token_ids), at[1] + num_scored(one))
        return () if at == wanted and not self.is_over else None


@dataclass(frozen=True, slots=True)
class Taken:
    """Decision: this client's request goes on at its worker, where it is called `request_id`; it lacks `behind`."""

    client: bytes
    request: Request
    worker_id: str
    request_id: str
    behind: tuple[Progress, ...]


@dataclass(frozen=True, slots=True)
class Settled:
    """What is decided.

    Attributes:
        resumed: requests, each with its client, that are computed again from what it has.
        cancelled: (worker id, request id) of what goes on for nobody.
    """

    taken: list[Taken]
    resumed: list[tuple[bytes, Request]]
    cancelled: list[tuple[str, str]]


class Takeover:
    """Of one coordinator; empty for all its life where none was before it."""

    def __init__(self) -> None:
        self._held: dict[str, Held] = {}  # by the request's id at its worker
        self._claims: dict[tuple[bytes, str], tuple[Request, bytes]] = {}  # each with its digest
        self._to_come: dict[str, int] = {}  # accounts, by worker
        self._come_until = 0.0

    def __bool__(self) -> bool:
        return bool(self._held or self._claims)

    def holds(self, worker_id: str, request_id: str) -> bool:
        """Whether a worker has this one, and whose it is will turn out."""
        held = self._held.get(request_id)
        return held is not None and held.worker_id == worker_id

    def begins(self, worker_id: str, num_accounts: int, now: float) -> None:
        """A worker is about to say what it has."""
        self._to_come[worker_id] = num_accounts
        self._come_until = now + ACCOUNTED_WITHIN_S

    def account(self, worker_id: str, account: RequestAccount, now: float, *, is_known: bool = False) -> None:
        """A worker says what it has; `is_known`: whose that is has turned out already."""
        self._to_come[worker_id] = max(0, self._to_come.get(worker_id, 0) - 1)
        if is_known:
            return
        self._held[account.request_id] = Held(
            worker_id, account.digest, account.num_tokens, account.num_scored, list(account.progress),
            now + CLAIMED_WITHIN_S,
        )  # fmt: skip

    def progress(self, worker_id: str, progress: Iterable[Progress]) -> None:
        """New tokens of what nobody has claimed yet; others' are left alone."""
        for one in progress:
            held = self._held.get(one.request_id)
            if held is not None and held.worker_id == worker_id:
                held.told.append(one)

    def failed(self, worker_id: str, request_ids: Iterable[str]) -> None:
        """They ended without a word that would be kept: whoever claims one has it computed again."""
        for request_id in request_ids:
            if self.holds(worker_id, request_id):
                del self._held[request_id]

    def claim(self, client: bytes, request: Request) -> None:
        """A client says what it has of a request."""
        self._claims[client, request.request_id] = request, digest_of(request)

    def unclaim(self, client: bytes, name: str) -> None:
        """It wants it no more."""
        self._claims.pop((client, name), None)

    def client_lost(self, client: bytes) -> None:
        self._claims = {key: claim for key, claim in self._claims.items() if key[0] != client}

    def worker_lost(self, worker_id: str) -> None:
        self._to_come.pop(worker_id, None)
        self._held = {name: held for name, held in self._held.items() if held.worker_id != worker_id}

    def settle(self, now: float, *, is_complete: bool) -> Settled:
        """What can be decided by now.

        Args:
            is_complete: no worker that may hold more is waited for.
        """
        settled = Settled([], [], [])
        is_complete &= now > self._come_until or not any(self._to_come.values())
        for (client, name), (request, digest) in list(self._claims.items()):
            request_id = self._found(name, digest)
            if not request_id and not is_complete:
                continue
            del self._claims[client, name]
            held = self._held.pop(request_id or name, None)
            behind = held.behind(request) if held is not None and request_id else None
            if held is not None and behind is not None:
                settled.taken.append(Taken(client, request, held.worker_id, request_id, behind))
                continue
            settled.resumed.append((client, request))
            if held is not None and not held.is_over:
                settled.cancelled.append((held.worker_id, request_id or name))
        for name, held in list(self._held.items()):
            if now > held.until:
                del self._held[name]
                if not held.is_over:
                    settled.cancelled.append((held.worker_id, name))
        return settled

    def displaced(self, request_id: str) -> tuple[str, str] | None:
        """Another request is to be called so: (worker id, request id) of the one that goes on for nobody."""
        held = self._held.pop(request_id, None)
        return None if held is None or held.is_over else (held.worker_id, request_id)

    def _found(self, name: str, digest: bytes) -> str:
        """What a client's request is called at a worker; "" where none has it. Two clients may have had one name."""
        for request_id in (name, *(one for one in self._held if one.startswith(f"{name}~"))):
            held = self._held.get(request_id)
            if held is not None and held.digest == digest:
                return request_id
        return ""
