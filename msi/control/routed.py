"""The values that routing decides about: a request of an instance, and a worker's load of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from msi.control.suspects import asked_by
from msi.types import Progress, Request

Order = tuple[int, bool, float, int]  # priority; has it had no worker; tag, in tokens; number in the order of arrival


@dataclass(slots=True)
class Routed:
    """A request and where it is.

    Attributes:
        request: by the name that it has here: no two are the same.
        name: that its client gave it: no two of that client's are the same.
        waits_until: where no worker takes it before, it ends.
        num_tokens: the most that it can come to need cache for.
        worker_id: "" while it waits for a worker.
        ack: number of the first HeartbeatAck that its worker gets after it.
        token_ids: that its client was told.
        predicted: its part of the worker's load.
        num_scored: tokens of its prompt whose log-probabilities its client was told.
        num_resumptions: workers that it had before.
        num_moves: those of them that let it go, as it was better off elsewhere.
        moves_to: where it goes next; "" for wherever it fits.
        release: by this number its worker is asked to let it go; 0 where it is not.
        lost_by: why it has none, once it had one.
        is_suspect: it runs alone.
        flow: who asks; see `msi.control.fair_queue`.
        order: its place among those that wait.
        cost: tokens that it was thought to take, prompt and answer.
        came_at, given_at: when it came, and when its worker got it.
        ends_at: when nobody wants its answer any more.
        is_started: a token has come from its worker.
        num_computed: tokens of prompts that were to be computed there before its first one, its own among them.
        num_beside, load_at_first: sequences on its worker at its first token, and its load then.
        admitted_at: when its worker began with it, once it has a token.
        first_at: when its first token came.
    """

    request: Request
    client: bytes
    name: str
    waits_until: float
    num_tokens: int
    worker_id: str = ""
    ack: int = 0
    token_ids: list[int] = field(default_factory=list)
    predicted: float = 0.0
    num_scored: int = 0
    num_resumptions: int = 0
    num_moves: int = 0
    moves_to: str = ""
    release: int = 0
    lost_by: str = ""
    is_suspect: bool = False
    flow: str = ""
    order: Order = (0, True, 0.0, 0)
    cost: float = 0.0
    came_at: float = 0.0
    given_at: float = 0.0
    ends_at: float = math.inf
    is_started: bool = False
    num_computed: int = 0
    num_beside: int = 0
    load_at_first: float = 0.0
    admitted_at: float = 0.0
    first_at: float | None = None
    _asked: bytes = b""

    @property
    def asked(self) -> bytes:
        """What suspects are known by."""
        if not self._asked:
            self._asked = asked_by(self.request)
        return self._asked

    @property
    def is_moving(self) -> bool:
        """Whether it has been asked for, or has no token yet of where it has come to."""
        return bool(self.release) or not self.worker_id or not self.is_started

    def handed_out(self, now: float) -> Request:
        """What its next worker is told."""
        request = self.request
        if self.ends_at < math.inf:
            request = replace(request, timeout_s=max(0.001, self.ends_at - now))
        if not self.num_resumptions:
            return request
        return replace(
            request,
            output_token_ids=tuple(self.token_ids),
            num_scored=self.num_scored,
            num_resumptions=self.num_resumptions,
        )


Updates = dict[bytes, list[Progress]]  # by client


@dataclass(slots=True)
class Load:
    """What a worker has been given and has not finished.

    Attributes:
        predicted: of a decode step, in units of one sequence without context (`msi.attention.sequence.CONTEXT_UNIT`).
        num_tokens: of KV cache that may come to be needed.
        num_expected: the same as it is thought to be.
        num_unstarted: requests that have no token from it yet.
        num_prompt_tokens: of those.
    """

    predicted: float = 0.0
    num_tokens: int = 0
    num_requests: int = 0
    num_expected: float = 0.0
    num_unstarted: int = 0
    num_prompt_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Reconciled:
    """What comes out of comparing requests with what a worker holds.

    Attributes:
        unknown_here: that it holds and nobody waits for.
        updates: of those that it should hold and does not, and that are not resumed.
    """

    unknown_here: list[str]
    updates: Updates
