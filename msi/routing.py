"""Where requests go: to the attention worker with the most free KV cache, or they wait for one.

Decides; does not act. Holds every request's prompt and the tokens emitted so far. Knows no sockets or clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from msi.messages import RequestUpdate
from msi.scheduler import Progress, Request

WAIT_FOR_WORKERS_S = 30.0


@dataclass(slots=True)
class Routed:
    """A request and where it is. `worker_id` is "" while it waits for a worker."""

    request: Request
    client: bytes
    arrived_at: float
    worker_id: str = ""
    token_ids: list[int] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """The most tokens it can come to need cache for."""
        return len(self.request.prompt_token_ids) + self.request.params.max_tokens


Updates = dict[bytes, list[RequestUpdate]]  # by client


class Router:
    """All requests of an instance."""

    def __init__(self) -> None:
        self._requests: dict[str, Routed] = {}
        self._waiting: dict[str, Routed] = {}  # those without a worker, in order of arrival
        self._load: dict[str, int] = {}  # tokens that a worker's requests may need

    def __len__(self) -> int:
        return len(self._requests)

    def add(self, request: Request, client: bytes, now: float) -> RequestUpdate | None:
        """Takes a request; an update where its id is in use."""
        if request.request_id in self._requests:
            return _failure(request.request_id, "InvalidRequest", f"request id {request.request_id} is in use")
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
            free = {worker: capacity - self._load.get(worker, 0) for worker, capacity in capacities.items()}
            routed.worker_id = max(free, key=free.__getitem__)
            self._load[routed.worker_id] = self._load.get(routed.worker_id, 0) + routed.num_tokens
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
            update = RequestUpdate(one.request_id, one.token_ids, one.finish_reason or "", "", "", one.logprobs)
            updates.setdefault(routed.client, []).append(update)
        return updates

    def fail(self, request_ids: Iterable[str], kind: str, reason: str) -> Updates:
        """These requests end with an error."""
        updates: Updates = {}
        for request_id in request_ids:
            routed = self._requests.get(request_id)
            if routed is not None:
                self._forget(routed)
                updates.setdefault(routed.client, []).append(_failure(request_id, kind, reason))
        return updates

    def worker_lost(self, worker_id: str, reason: str) -> Updates:
        """The requests of a worker are lost with it."""
        lost = [request_id for request_id, routed in self._requests.items() if routed.worker_id == worker_id]
        updates = self.fail(lost, "RequestFailed", f"attention worker {worker_id} was lost: {reason}")
        self._load.pop(worker_id, None)
        return updates

    def expire(self, now: float, reason: str) -> Updates:
        """Requests that have waited for a worker for too long."""
        late = [
            request_id for request_id, routed in self._waiting.items() if now - routed.arrived_at > WAIT_FOR_WORKERS_S
        ]
        return self.fail(late, "Unavailable", f"no worker could take it for {WAIT_FOR_WORKERS_S:g} s: {reason}")

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

    def _forget(self, routed: Routed) -> None:
        del self._requests[routed.request.request_id]
        self._waiting.pop(routed.request.request_id, None)
        if routed.worker_id in self._load:
            self._load[routed.worker_id] -= routed.num_tokens


def _failure(request_id: str, kind: str, reason: str) -> RequestUpdate:
    return RequestUpdate(request_id, (), "", kind, reason)
