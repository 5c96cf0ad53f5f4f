"""Where requests go: to the attention worker with the least predicted time of a step, or they wait for one.

Workers are given what they can run and a few more; the others wait here, in the order of `fair_queue`. What is
predicted to come too late, by what the requests before took (`prediction`), is refused when it comes, and ended when it
has waited for too long, before it costs anything; what has had its time ends wherever it is.

Which worker would take least time is asked of `loads`, among those whose KV cache has room.

Holds every request's prompt and the tokens emitted so far: what becomes of those of a worker that is lost, or that lets
one go (`moving`), says `resuming`. Decides; does not act. Knows no sockets or clock.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from heapq import heappop, heappush
from itertools import count
from types import MappingProxyType

from msi.control.fair_queue import FairQueue
from msi.control.loads import Loads
from msi.control.move_messages import Released
from msi.control.moving import Moves
from msi.control.overload import Objectives, Service, out_of_time
from msi.control.resuming import Resuming
from msi.control.routed import Load, Order, Reconciled, Routed, Updates
from msi.control.suspects import Suspects, Trials, asked_by, guilty
from msi.errors import DeadlineExceeded, EngineError, Failure, InvalidRequest, Unavailable
from msi.settings import AttentionBalance
from msi.types import Progress, Request

WAIT_FOR_WORKERS_S = 30.0
NOTHING_IS_SENT: Mapping[str, float] = MappingProxyType({})
OUT_OF_TIME = Failure.of(DeadlineExceeded()).kind


class Router:
    """All requests of an instance.

    Args:
        max_model_len: the longest sequence, prompt included.
        max_num_seqs: sequences that run at a time, per worker.
        max_waiting: requests that may wait, here or at workers.
        max_resumptions: how often a request is given to another worker.
        hold_timeout_s: it waits so long for that one.
        objectives: what those that are taken can expect.
        backlog: requests that a worker has besides those that it can run, so that it need not wait for more, by the
            tokens of a mean answer.
        balance: when requests move between workers.

    Attributes:
        num_refused, num_shed: requests that were predicted to come too late when they came; and as they waited.
        num_out_of_time: whose own time was over.
        num_displaced: that gave up their place to one that goes before them.
    """

    def __init__(
        self,
        *,
        max_model_len: int = 1 << 62,
        max_num_seqs: int = 1 << 62,
        max_waiting: int = 1 << 62,
        max_resumptions: int = 3,
        hold_timeout_s: float = 60.0,
        objectives: Objectives = Objectives(),
        backlog: Callable[[float], int] = lambda mean_output: 1 << 62,
        balance: AttentionBalance = AttentionBalance(),
    ) -> None:
        self.num_refused = self.num_shed = self.num_out_of_time = self.num_displaced = 0
        self._service = Service(objectives, max_num_seqs)
        self._backlog = backlog
        self._capacities: Mapping[str, int] = {}
        self._deadlines: list[tuple[float, str]] = []  # a heap; also of requests that have ended
        self._ended: Updates = {}
        self._to_cancel: list[tuple[str, str]] = []
        self._max_model_len = max_model_len
        self._max_num_seqs = max_num_seqs
        self._max_waiting = max_waiting
        self._hold_timeout_s = hold_timeout_s
        self._suspects = Suspects()
        self._trials = Trials()
        self._requests: dict[str, Routed] = {}
        self._by_name: dict[tuple[bytes, str], Routed] = {}
        self._waiting = FairQueue()  # those without a worker
        self._loads = Loads(max_model_len, self._service.meters.relative)
        self._moves = Moves(balance, self._loads, self._service)
        self._resuming = Resuming(
            self._requests, self._waiting, self._suspects, self._trials, free=self._free, forget=self._forget,
            max_num_seqs=max_num_seqs, max_resumptions=max_resumptions, hold_timeout_s=hold_timeout_s,
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self._requests)

    def add(self, request: Request, client: bytes, now: float) -> Progress | None:
        """Takes a request; its end where it cannot."""
        error: EngineError | None = None
        name, flow = request.request_id, request.flow or client.hex()
        order = self._waiting.order_of(flow, request.priority)
        if (client, name) in self._by_name:
            error = InvalidRequest(f"request id {name} is in use")
        elif request.output_token_ids or request.num_scored or request.num_resumptions:
            error = InvalidRequest("a new request has no output; leave out what only the coordinator may add")
        elif (num_waiting := self.num_waiting) >= self._max_waiting and not self._displace_one_behind(order, flow):
            error = Unavailable(f"{num_waiting} requests wait here already; try again later")
        elif self._suspects and self._suspects.is_guilty(asked_by(request), now):
            error = guilty()
        elif error := self._service.refusal(
            len(request.prompt_token_ids),
            self._waiting.num_before(order),
            ((capacity, self.load(worker)) for worker, capacity in self._capacities.items()),
            request.priority,
        ):
            self.num_refused += 1
        if error is not None:
            return Progress(name, failure=Failure.of(error))
        if name in self._requests:  # another client's, which is none of this one's business
            number = next(number for number in count(2) if f"{name}~{number}" not in self._requests)
            request = replace(request, request_id=f"{name}~{number}")
        num_tokens = min(len(request.prompt_token_ids) + request.params.max_tokens, self._max_model_len)
        routed = self._by_name[client, name] = Routed(request, client, name, now + WAIT_FOR_WORKERS_S, num_tokens)
        routed.is_suspect = bool(self._suspects) and self._suspects.is_suspected(routed.asked, now)
        self._enter(routed, flow, now)
        return None

    def _enter(self, routed: Routed, flow: str, now: float) -> None:
        request = routed.request
        routed.flow, routed.came_at = flow, now
        routed.cost = self._loads.expected_tokens(request)
        if request.timeout_s:
            routed.ends_at = now + request.timeout_s
            heappush(self._deadlines, (routed.ends_at, request.request_id))
        self._requests[request.request_id] = routed
        self._waiting.add(routed, routed.cost)

    def _displace_one_behind(self, order: Order, flow: str) -> bool:
        """The last that waits gives its place to one of another flow, or of a higher priority, that goes before it."""
        last = self._waiting.last
        if last is None or last.order < order or last.num_resumptions:
            return False
        if last.flow == flow and last.request.priority == order[0]:
            return False
        self.num_displaced += 1
        self._end(last, Unavailable("requests of others that go first have taken its place; try again later"))
        return True

    def knows(self, request_id: str) -> bool:
        """Whether a request is called so at workers."""
        return request_id in self._requests

    def adopt(self, request: Request, request_id: str, worker_id: str, client: bytes, now: float) -> None:
        """A request of the coordinator before, which a worker has as `request_id`.

        Args:
            request: as its client has it, with the output that it has.
        """
        routed = self._taken_over(request, request_id, client, now)
        self._give(routed, worker_id, {}, now)
        routed.ack = 0
        self._loads.start(routed)  # it has been there for a time that is not known: it measures nothing

    def resume(self, request: Request, client: bytes, now: float) -> None:
        """A request of the coordinator before, which no worker has any more: it waits for one, before new ones."""
        name = request.request_id
        if name in self._requests:
            name = next(f"{name}~{number}" for number in count(2) if f"{name}~{number}" not in self._requests)
        routed = self._taken_over(request, name, client, now)
        routed.num_resumptions = 1
        self._resuming.num_resumptions += 1
        self._waiting.remove(routed)
        self._waiting.add_again(routed)

    def _taken_over(self, request: Request, request_id: str, client: bytes, now: float) -> Routed:
        name, num_tokens = request.request_id, len(request.prompt_token_ids) + request.params.max_tokens
        asked = replace(request, request_id=request_id, output_token_ids=(), num_scored=0, num_resumptions=0)
        routed = self._by_name[client, name] = Routed(
            asked, client, name, now + self._hold_timeout_s, min(num_tokens, self._max_model_len),
            token_ids=list(request.output_token_ids), num_scored=request.num_scored,
            lost_by="the coordinator before this one was lost",
        )  # fmt: skip
        self._enter(routed, request.flow or client.hex(), now)
        return routed

    def has(self, client: bytes, name: str) -> bool:
        """Whether this client's request is here."""
        return (client, name) in self._by_name

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a worker, or at one for others to end."""
        return len(self._waiting) + self._loads.num_excess(self._max_num_seqs)

    @property
    def num_unrouted(self) -> int:
        """Requests that no worker has yet."""
        return len(self._waiting)

    @property
    def counters(self) -> dict[str, float]:
        """Of requests, since the start."""
        return {
            "resumptions": float(self._resuming.num_resumptions),
            "moves": float(self._resuming.num_moved),
            "requests_refused_as_too_late": float(self.num_refused),
            "requests_shed": float(self.num_shed),
            "requests_out_of_time": float(self.num_out_of_time),
            "requests_displaced": float(self.num_displaced),
        }

    def route(
        self, capacities: Mapping[str, int], acks: Mapping[str, int] | None = None, now: float = 0.0
    ) -> list[tuple[str, Request]]:
        """Gives waiting requests to workers that can take more, in their order.

        Args:
            capacities: tokens of KV cache of each worker that serves, by id.
            acks: HeartbeatAcks that were sent to each so far.
        """
        self._capacities = capacities
        given: list[tuple[str, Request]] = []
        for routed in list(self._waiting) if capacities and len(self._waiting) else ():
            free = capacities
            if self._trials:
                free = {worker: capacity for worker, capacity in capacities.items() if worker not in self._trials}
            if not routed.num_resumptions:
                free = {worker: size for worker, size in free.items() if self._takes_more(worker, size, routed.cost)}
            if not free:
                break
            if routed.is_suspect and self._trials.is_tried(routed.asked):
                continue
            if self._shed(routed, now):
                continue
            worker_id = routed.moves_to if routed.moves_to in free else self._loads.soonest(routed, free)
            self._give(routed, worker_id, acks or {}, now)
            given.append((routed.worker_id, routed.handed_out(now)))
        return given

    def _takes_more(self, worker: str, capacity: int, cost: float) -> bool:
        """Whether a worker could begin with a request of about so many tokens, or has less than its backlog."""
        load = self.load(worker)
        if load.num_unstarted < self._backlog(self._loads.mean_output):
            return True
        return self._service.is_free(load, capacity, cost)

    def _give(self, routed: Routed, worker_id: str, acks: Mapping[str, int], now: float) -> None:
        self._waiting.hand_out(routed)
        routed.worker_id, routed.given_at, routed.moves_to = worker_id, now, ""
        if routed.is_suspect:
            self._trials.begin(worker_id, routed.request.request_id, routed.asked, len(routed.token_ids))
        routed.ack = 1 + acks.get(worker_id, 0)
        self._loads.give(routed)

    def progress(self, worker_id: str, progress: Iterable[Progress], now: float = 0.0) -> Updates:
        """New tokens from a worker, as updates for each client. What nobody waits for any more is dropped."""
        updates: Updates = {}
        for one in progress:
            routed = self._requests.get(one.request_id)
            if routed is None or routed.worker_id != worker_id:
                continue
            if one.token_ids and not routed.is_started:
                one = self._service.started(routed, self._loads.start(routed), one, now)
            routed.token_ids.extend(one.token_ids)
            if one.prompt_logprobs is not None:
                routed.num_scored += len(one.prompt_logprobs)
            if routed.is_suspect and self._trials.is_acquitted(worker_id, one.request_id, len(routed.token_ids)):
                self._acquit(routed)
            if one.is_last:
                self._forget(routed)
            if one.finish_reason is not None:
                if self._suspects:
                    self._suspects.clear(routed.asked)
                self._loads.answered(len(routed.token_ids))
                num_tokens = len(routed.request.prompt_token_ids) + len(routed.token_ids)
                self._waiting.took(routed.flow, num_tokens - routed.cost)
                self._service.ended(routed, worker_id, self.load(worker_id), now)
            its_name = one if routed.name == one.request_id else one._replace(request_id=routed.name)
            updates.setdefault(routed.client, []).append(its_name)
        return updates

    def reconcile(self, worker_id: str, held: Iterable[str], acked: int, now: float) -> Reconciled:
        """Compares with what a worker says that it holds; what was lost on its way is given to a worker again.

        Args:
            acked: number of the last HeartbeatAck that had come to the worker when it said so; see `Routed.ack`.
        """
        ids = set(held)
        ours = {name: routed for name, routed in self._requests.items() if routed.worker_id == worker_id}
        lost = [routed for name, routed in ours.items() if name not in ids and routed.ack <= acked]
        unknown_here = [name for name in ids if name not in ours]
        why = f"attention worker {worker_id} does not have this request any more"
        return Reconciled(unknown_here, self._resuming.resume(lost, why, now) if lost else {})

    def due_moves(
        self, leaving: Collection[str], now: float, sent_per_s: Mapping[str, float] = NOTHING_IS_SENT
    ) -> list[Routed]:
        """Requests that their workers are to let go now; see `Moves.due`."""
        return self._moves.due(self._requests, self._capacities, leaving, sent_per_s, now)

    def again_s(self, routed: Routed) -> float:
        """What computing it again is thought to take; 0 where that is not known."""
        return self._service.meters.prefill.at(len(routed.request.prompt_token_ids) + len(routed.token_ids))

    def released(self, released: Released, now: float) -> Updates:
        """A worker has let a request go, which waits for another one; its end where it may not."""
        return self._resuming.released(released, now)

    def fail(self, request_ids: Iterable[str], failure: Failure, worker_id: str | None = None) -> Updates:
        """These requests end with an error; only those of `worker_id`, where that is given."""
        updates: Updates = {}
        for request_id in request_ids:
            routed = self._requests.get(request_id)
            if routed is not None and worker_id in (None, routed.worker_id):
                self._forget(routed)
                if failure.kind == OUT_OF_TIME and routed.request.timeout_s:
                    self.num_out_of_time += 1
                    failure = Failure.of(out_of_time(routed.request.timeout_s, len(routed.token_ids)))
                updates.setdefault(routed.client, []).append(Progress(routed.name, failure=failure))
        return updates

    def fail_all(self, failure: Failure) -> tuple[Updates, list[tuple[str, str]]]:
        """Every request ends with an error; also (worker id, request id) of those that workers have."""
        given = [(routed.worker_id, name) for name, routed in self._requests.items() if routed.worker_id]
        return self.fail(list(self._requests), failure), given

    def worker_lost(self, worker_id: str, reason: str, now: float, has_crashed: bool = False) -> Updates:
        """The requests of a worker wait for another one; the ends of those that may not.

        Args:
            has_crashed: it ended by itself: each of them is suspected of having done that, or the one that is guilty.
        """
        self._loads.lost(worker_id)
        self._capacities = {name: size for name, size in self._capacities.items() if name != worker_id}
        return self._resuming.worker_lost(worker_id, reason, now, has_crashed)

    def expire(self, now: float, reason: str) -> Updates:
        """Requests that have waited for a worker for too long, or whose own time is over."""
        self._expire_deadlines(now)
        for routed in list(self._waiting):
            if self._shed(routed, now) or now <= routed.waits_until:
                continue
            if self._capacities and not routed.lost_by:
                routed.waits_until = now + WAIT_FOR_WORKERS_S  # there are workers, and its turn comes
                continue
            why = f"no worker could take it for {WAIT_FOR_WORKERS_S:g} s: {reason}"
            if routed.lost_by:
                why = f"{routed.lost_by}; no other could go on with it for {self._hold_timeout_s:g} s: {reason}"
            self._end(routed, Unavailable(why))
        return self.take_ended()

    def _expire_deadlines(self, now: float) -> None:
        while self._deadlines and self._deadlines[0][0] <= now:
            _, name = heappop(self._deadlines)
            routed = self._requests.get(name)
            if routed is not None and routed.ends_at <= now:
                self.num_out_of_time += 1
                if routed.worker_id:
                    self._to_cancel.append((routed.worker_id, name))
                self._end(routed, out_of_time(routed.request.timeout_s, len(routed.token_ids)))

    def _shed(self, routed: Routed, now: float) -> bool:
        """Ends one that cannot have its first token in time any more."""
        error = self._service.is_too_late(routed, now)
        if error is not None:
            self.num_shed += 1
            self._end(routed, error)
        return error is not None

    def _end(self, routed: Routed, error: EngineError) -> None:
        """It ends with this error, which `take_ended` tells."""
        self._forget(routed)
        self._ended.setdefault(routed.client, []).append(Progress(routed.name, failure=Failure.of(error)))

    def take_ended(self) -> Updates:
        """Ends that followed from other requests, or from time."""
        ended, self._ended = self._ended, {}
        return ended

    def take_to_cancel(self) -> list[tuple[str, str]]:
        """(worker id, request id) of those that ended while workers had them."""
        to_cancel, self._to_cancel = self._to_cancel, []
        return to_cancel

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
        return self._loads.of(worker_id)

    def _acquit(self, routed: Routed) -> None:
        """It is not what its worker crashed by."""
        self._trials.end(routed.worker_id, routed.request.request_id)
        self._suspects.clear(routed.asked)
        routed.is_suspect = False

    def _forget(self, routed: Routed) -> None:
        del self._requests[routed.request.request_id], self._by_name[routed.client, routed.name]
        if not routed.worker_id:
            self._waiting.remove(routed)
        self._free(routed)

    def _free(self, routed: Routed) -> None:
        """It counts for its worker no longer."""
        self._trials.end(routed.worker_id, routed.request.request_id)
        self._loads.free(routed)
