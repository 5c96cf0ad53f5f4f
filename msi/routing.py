"""Where requests go: to the attention worker with the least predicted load, or they wait for one.

A decode step of a worker takes a time that grows with its sequences and with their contexts, and every sequence waits
for all of them: so requests are placed by the sum of both, on workers whose KV cache has room. Decides; does not act.
Holds every request's prompt and the tokens emitted so far. Knows no sockets or clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from msi.errors import Failure, InvalidRequest, RequestFailed, Unavailable
from msi.messages import RequestUpdate
from msi.sequence import CONTEXT_UNIT
from msi.types import Progress, Request

WAIT_FOR_WORKERS_S = 30.0
OUTPUTS_REMEMBERED = 64  # the mean length of answers is that of about the last so many


@dataclass(slots=True)
class Routed:
    """A request and where it is. `worker_id` is "" while it waits for a worker."""

    request: Request
    client: bytes
    arrived_at: float
    worker_id: str = ""
    token_ids: list[int] = field(default_factory=list)
    predicted: float = 0.0  # its part of the worker's load

    @property
    def num_tokens(self) -> int:
        """The most tokens it can come to need cache for."""
        return len(self.request.prompt_token_ids) + self.request.params.max_tokens


Updates = dict[bytes, list[RequestUpdate]]  # by client


@dataclass(slots=True)
class Load:
    """What a worker has been given and has not finished.

    Attributes:
        predicted: of a decode step, in units of one sequence without context (`msi.sequence.CONTEXT_UNIT`).
        num_tokens: of KV cache that may come to be needed.
    """

    predicted: float = 0.0
    num_tokens: int = 0


class Router:
    """All requests of an instance."""

    def __init__(self) -> None:
        self._requests: dict[str, Routed] = {}
        self._waiting: dict[str, Routed] = {}  # those without a worker, in order of arrival
        self._loads: dict[str, Load] = {}
        self._mean_output = 0.0  # of finished answers; 0 before the first

    def __len__(self) -> int:
        return len(self._requests)

    def add(self, request: Request, client: bytes, now: float) -> RequestUpdate | None:
        """Takes a request; an update where its id is in use."""
        if request.request_id in self._requests:
            error = InvalidRequest(f"request id {request.request_id} is in use")
            return RequestUpdate(request.request_id, failure=Failure.of(error))
        routed = Routed(request, client, now)
        self._requests[request.request_id] = self._waiting[request.request_id] = routed
        return None

    def route(self, capacities: Mapping[str, int]) -> list[tuple[str, Request]]:
        """Gives waiting requests to workers, in order of arrival.

        Args:
            capacities: tokens of KV cache of each worker that serves, by id.
        """
        if not capacities:
            return []
        given = []
        for routed in self._waiting.values():
            routed.worker_id = self._least_loaded(routed.num_tokens, capacities)
            routed.predicted = self._predicted(routed.request)
            load = self._loads[routed.worker_id]
            load.predicted += routed.predicted
            load.num_tokens += routed.num_tokens
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
            if one.finish_reason is not None:
                self._forget(routed)
                weight = 1 / OUTPUTS_REMEMBERED if self._mean_output else 1.0
                self._mean_output += weight * (len(routed.token_ids) - self._mean_output)
            update = RequestUpdate(
                one.request_id, one.token_ids, one.finish_reason or "", one.logprobs, None, one.num_cached_tokens
            )
            updates.setdefault(routed.client, []).append(update)
        return updates

    def fail(self, request_ids: Iterable[str], failure: Failure) -> Updates:
        """These requests end with an error."""
        updates: Updates = {}
        for request_id in request_ids:
            routed = self._requests.get(request_id)
            if routed is not None:
                self._forget(routed)
                updates.setdefault(routed.client, []).append(RequestUpdate(request_id, failure=failure))
        return updates

    def worker_lost(self, worker_id: str, reason: str) -> Updates:
        """The requests of a worker are lost with it."""
        lost = [request_id for request_id, routed in self._requests.items() if routed.worker_id == worker_id]
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

    def cancel(self, client: bytes, request_id: str) -> str:
        """Forgets a request of this client; the worker that has it, or ""."""
        routed = self._requests.get(request_id)
        if routed is None or routed.client != client:
            return ""
        self._forget(routed)
        return routed.worker_id

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
        most = request.params.max_tokens
        num_output = min(most, self._mean_output) if self._mean_output else most
        return 1 + (len(request.prompt_token_ids) + num_output / 2) / CONTEXT_UNIT

    def _forget(self, routed: Routed) -> None:
        del self._requests[routed.request.request_id]
        self._waiting.pop(routed.request.request_id, None)
        if (load := self._loads.get(routed.worker_id)) is not None:
            load.predicted -= routed.predicted
            load.num_tokens -= routed.num_tokens
