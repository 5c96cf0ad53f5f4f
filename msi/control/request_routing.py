"""Where requests go: to the attention worker with the least predicted load, or they wait for one.

A decode step of a worker takes a time that grows with its sequences and with their contexts, and every sequence waits
for all of them: so requests are placed by the sum of both, on workers whose KV cache has room. Decides; does not act.
Holds every request's prompt and the tokens emitted so far. Knows no sockets or clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import count

from msi.attention.sequence import CONTEXT_UNIT
from msi.control.suspects import CRASHES_ALLOWED, SUSPECTED_FOR_S, Suspects
from msi.errors import EngineError, Failure, InvalidRequest, RequestFailed, Unavailable
from msi.types import Progress, Request

WAIT_FOR_WORKERS_S = 30.0
OUTPUTS_REMEMBERED = 64  # the mean length of answers is that of about the last so many


@dataclass(slots=True)
class Routed:
    """A request and where it is. `worker_id` is "" while it waits for a worker."""

    request: Request  # by the name that it has here: no two are the same
    client: bytes
    name: str  # that its client gave it: no two of that client's are the same
    arrived_at: float
    num_tokens: int  # the most that it can come to need cache for
    worker_id: str = ""
    ack: int = 0  # number of the first HeartbeatAck that its worker gets after it
    token_ids: list[int] = field(default_factory=list)
    predicted: float = 0.0  # its part of the worker's load


Updates = dict[bytes, list[Progress]]  # by client


@dataclass(slots=True)
class Load:
    """What a worker has been given and has not finished.

    Attributes:
        predicted: of a decode step, in units of one sequence without context (`msi.attention.sequence.CONTEXT_UNIT`).
        num_tokens: of KV cache that may come to be needed.
    """

    predicted: float = 0.0
    num_tokens: int = 0
    num_requests: int = 0


@dataclass(frozen=True, slots=True)
class Reconciled:
    """What comes out of comparing requests with what a worker holds.

    Attributes:
        unknown_here: that it holds and nobody waits for.
        updates: of those that it should hold and does not.
    """

    unknown_here: list[str]
    updates: Updates


class Router:
    """All requests of an instance.

    Args:
        max_model_len: the longest sequence, prompt included.
        max_num_seqs: sequences that run at a time, per worker.
        max_waiting: requests that may wait, here or at workers.
    """

    def __init__(
        self, *, max_model_len: int = 1 << 62, max_num_seqs: int = 1 << 62, max_waiting: int = 1 << 62
    ) -> None:
        self._max_model_len = max_model_len
        self._max_num_seqs = max_num_seqs
        self._max_waiting = max_waiting
        self._suspects = Suspects()
        self._requests: dict[str, Routed] = {}
        self._by_name: dict[tuple[bytes, str], Routed] = {}
        self._waiting: dict[str, Routed] = {}  # those without a worker, in order of arrival
        self._loads: dict[str, Load] = {}
        self._mean_output = 0.0  # of finished answers; 0 before the first

    def __len__(self) -> int:
        return len(self._requests)

    def add(self, request: Request, client: bytes, now: float) -> Progress | None:
        """Takes a request; its end where it cannot."""
        error: EngineError | None = None
        name = request.request_id
        if (client, name) in self._by_name:
            error = InvalidRequest(f"request id {name} is in use")
        elif (num_waiting := self.num_waiting) >= self._max_waiting:
            error = Unavailable(f"{num_waiting} requests wait here already; try again later")
        elif self._suspects.is_guilty(request, now):
            error = RequestFailed(
                f"attention workers crashed {CRASHES_ALLOWED} times while they ran this very request; "
                f"it is not tried again for {SUSPECTED_FOR_S / 60:.0f} minutes"
            )
        if error is not None:
            return Progress(name, failure=Failure.of(error))
        if name in self._requests:  # another client's, which is none of this one's business
            number = next(number for number in count(2) if f"{name}~{number}" not in self._requests)
            request = replace(request, request_id=f"{name}~{number}")
        num_tokens = min(len(request.prompt_token_ids) + request.params.max_tokens, self._max_model_len)
        routed = self._by_name[client, name] = Routed(request, client, name, now, num_tokens)
        self._requests[request.request_id] = self._waiting[request.request_id] = routed
        return None

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a worker, or at one for others to end."""
        excess = (max(0, load.num_requests - self._max_num_seqs) for load in self._loads.values())
        return len(self._waiting) + sum(excess)

    @property
    def num_unrouted(self) -> int:
        """Requests that no worker has yet."""
        return len(self._waiting)

    def route(self, capacities: Mapping[str, int], acks: Mapping[str, int] | None = None) -> list[tuple[str, Request]]:
        """Gives waiting requests to workers, in order of arrival.

        Args:
            capacities: tokens of KV cache of each worker that serves, by id.
            acks: HeartbeatAcks that were sent to each so far.
        """
        if not capacities:
            return []
        given = []
        for routed in self._waiting.values():
            routed.worker_id = self._least_loaded(routed.num_tokens, capacities)
            routed.predicted = self._predicted(routed.request)
            routed.ack = 1 + (acks or {}).get(routed.worker_id, 0)
            load = self._loads[routed.worker_id]
            load.predicted += routed.predicted
            load.num_tokens += routed.num_tokens
            load.num_requests += 1
            given.append((routed.worker_id, routed.request))
        self._waiting.clear()
        return given

    def progress(self, worker_id: str, progress: Iterable[Progress]) -> Updates:
        """New tokens from a worker, as updates for each client. What nobody waits for any more is dropped."""
        updates: Updates = {}
        for one in progress:
            routed = self._requests.get(one.request_id)
            if routed is None or routed.worker_id != worker_id:
                continue
            routed.token_ids.extend(one.token_ids)
            if one.is_last:
                self._forget(routed)
            if one.finish_reason is not None:
                self._suspects.clear(routed.request)
                weight = 1 / OUTPUTS_REMEMBERED if self._mean_output else 1.0
                self._mean_output += weight * (len(routed.token_ids) - self._mean_output)
            its_name = one if routed.name == one.request_id else replace(one, request_id=routed.name)
            updates.setdefault(routed.client, []).append(its_name)
        return updates

    def reconcile(self, worker_id: str, held: Iterable[str], acked: int) -> Reconciled:
        """Compares with what a worker says that it holds; what was lost on its way ends, rather than hang.

        Args:
            acked: number of the last HeartbeatAck that had come to the worker when it said so; see `Routed.ack`.
        """
        ids = set(held)
        ours = {name: routed for name, routed in self._requests.items() if routed.worker_id == worker_id}
        lost = [name for name, routed in ours.items() if name not in ids and routed.ack <= acked]
        error = RequestFailed(f"attention worker {worker_id} does not have this request any more")
        return Reconciled([name for name in ids if name not in ours], self.fail(lost, Failure.of(error)))

    def fail(self, request_ids: Iterable[str], failure: Failure, worker_id: str | None = None) -> Updates:
        """These requests end with an error; only those of `worker_id`, where that is given."""
        updates: Updates = {}
        for request_id in request_ids:
            routed = self._requests.get(request_id)
            if routed is not None and worker_id in (None, routed.worker_id):
                self._forget(routed)
                updates.setdefault(routed.client, []).append(Progress(routed.name, failure=failure))
        return updates

    def fail_all(self, failure: Failure) -> tuple[Updates, list[tuple[str, str]]]:
        """Every request ends with an error; also (worker id, request id) of those that workers have."""
        given = [(routed.worker_id, name) for name, routed in self._requests.items() if routed.worker_id]
        return self.fail(list(self._requests), failure), given

    def worker_lost(self, worker_id: str, reason: str, now: float = 0.0, has_crashed: bool = False) -> Updates:
        """The requests of a worker are lost with it; where it crashed, each is suspected of having done that."""
        lost = [request_id for request_id, routed in self._requests.items() if routed.worker_id == worker_id]
        if has_crashed:
            self._suspects.crashed([self._requests[request_id].request for request_id in lost], now)
        updates = self.fail(lost, Failure.of(RequestFailed(f"attention worker {worker_id} was lost: {reason}")))
        self._loads.pop(worker_id, None)
        return updates

    def expire(self, now: float, reason: str) -> Updates:
        """Requests that have waited for a worker for too long."""
        late = [
            request_id for request_id, routed in self._waiting.items() if now - routed.arrived_at > WAIT_FOR_WORKERS_S
        ]
        error = Unavailable(f"no worker could take it for {WAIT_FOR_WORKERS_S:g} s: {reason}")
        return self.fail(late, Failure.of(error))

    def cancel(self, client: bytes, name: str) -> tuple[str, str] | None:
        """Forgets a request of this client; (worker id, request id) where a worker has it."""
        routed = self._by_name.get((client, name))
        if routed is None:
            return None
        self._forget(routed)
        return (routed.worker_id, routed.request.request_id) if routed.worker_id else None

    def client_lost(self, client: bytes) -> list[tuple[str, str]]:
        """Forgets a client's requests; (worker id, request id) of those that workers have."""
        gone = [routed for routed in self._requests.values() if routed.client == client]
        for routed in gone:
            self._forget(routed)
        return [(routed.worker_id, routed.request.request_id) for routed in gone if routed.worker_id]

    def load(self, worker_id: str) -> Load:
        """What a worker has been given and has not finished."""
        return self._loads.get(worker_id, Load())

    def _least_loaded(self, num_tokens: int, capacities: Mapping[str, int]) -> str:
        """Of the workers with room the one with the least predicted load; the most room where none has enough."""
        loads = {worker: self._loads.setdefault(worker, Load()) for worker in capacities}
        room = {worker: capacity - loads[worker].num_tokens for worker, capacity in capacities.items()}
        roomy = [worker for worker in room if room[worker] >= num_tokens]
        if roomy:
            return min(roomy, key=lambda worker: (loads[worker].predicted, -room[worker]))
        return max(room, key=room.__getitem__)

    def _predicted(self, request: Request) -> float:
        """Of a request in the middle of its answer, whose length is taken to be the mean of those before."""
        most = min(request.params.max_tokens, self._max_model_len)
        num_output = min(most, self._mean_output) if self._mean_output else most
        return 1 + (len(request.prompt_token_ids) + num_output / 2) / CONTEXT_UNIT

    def _forget(self, routed: Routed) -> None:
        del self._requests[routed.request.request_id], self._by_name[routed.client, routed.name]
        self._waiting.pop(routed.request.request_id, None)
        if (load := self._loads.get(routed.worker_id)) is not None:
            load.predicted -= routed.predicted
            load.num_tokens -= routed.num_tokens
            load.num_requests -= 1
