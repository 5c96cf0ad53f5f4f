"""Requests on their way through the coordinator: from clients to attention workers, and tokens back.

Which request goes where is decided by `Router`, what a client has and what was lost on its way by `Clients`, and whose
the requests of a coordinator before are by `Takeover`. Who is there is the `Cluster`'s to say. What is to be sent is
returned, in order, for whoever owns this to send.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

from msi.attention.journal import RequestAccount
from msi.control.client_messages import (
    ClientHeartbeat,
    ClientHello,
    ClientPulse,
    InstanceStatus,
    Resubmit,
    Welcome,
)
from msi.control.clients import Clients
from msi.control.members import InstancePlan, Lost, Member, Send
from msi.control.membership import Cluster
from msi.control.messages import Account, Cancel, Heartbeat, HelloAgain, PassDone, RequestsFailed, Submit
from msi.control.move_messages import Release, Released
from msi.control.overload import Objectives, backlog_of
from msi.control.request_routing import Router
from msi.control.routed import Updates
from msi.control.takeover import Takeover
from msi.errors import Failure, InvalidRequest, Unavailable
from msi.kernels import BLOCK_TOKENS
from msi.request_spans import OpenSpans
from msi.types import Progress, Request

log = logging.getLogger(__name__)


class Traffic:
    """Of one coordinator.

    Args:
        cluster: decides who serves; what it decides is carried out by whoever owns both.
        plan: of the start.
        welcome: what each client is told of the model.
        sentence: what the instance waits for at a time, in words.
        spans: of requests; None where they are not traced.
    """

    def __init__(
        self,
        cluster: Cluster,
        plan: InstancePlan,
        welcome: Welcome,
        sentence: Callable[[float], str],
        spans: OpenSpans | None,
    ) -> None:
        self._cluster = cluster
        self._sentence = sentence
        self._spans = spans
        self._router = Router(
            max_model_len=plan.limits.max_model_len,
            max_num_seqs=plan.limits.max_num_seqs,
            max_waiting=plan.num_attention * plan.limits.max_num_waiting,
            max_resumptions=plan.max_resumptions,
            hold_timeout_s=plan.timeouts.hold_timeout_s,
            objectives=Objectives.of(plan.service),
            backlog=partial(backlog_of, plan.limits.max_num_seqs),
            balance=plan.balance,
        )
        self._clients = Clients(welcome)
        self._takeover = Takeover()
        self._is_ending = False
        self._all_ended = asyncio.Event()

    def __len__(self) -> int:
        """Requests that are here."""
        return len(self._router)

    @property
    def num_waiting(self) -> int:
        """Requests that are at no worker."""
        return self._router.num_unrouted

    @property
    def num_moved(self) -> int:
        """Requests that have moved between attention workers."""
        return int(self._router.counters["moves"])

    @property
    def counters(self) -> dict[str, float]:
        return self._router.counters

    @property
    def clients(self) -> list[bytes]:
        """Routes to all of them."""
        return self._clients.routes

    def is_client(self, route: bytes) -> bool:
        return route in self._clients

    # -- clients' messages -------------------------------------------------------------------------------------------

    def hello(self, route: bytes, hello: ClientHello, now: float) -> list[Send]:
        answer, gone = self._clients.hello(route, hello, now)
        return [*self._forget_clients(gone), answer]

    def pulse(self, pulse: ClientPulse, now: float) -> None:
        self._clients.pulse(pulse, now)

    def submit(self, route: bytes, message: Submit, now: float) -> list[Send]:
        request = self._traced(route, message.request)
        self._clients.submits(route)
        sends: list[Send] = []
        if self._takeover and (given := self._takeover.displaced(request.request_id)) is not None:
            sends += self._cancel(*given)
        if request.params.seed is None:
            failure = Failure.of(InvalidRequest("give every request a seed"))
            refusal: Progress | None = Progress(request.request_id, failure=failure)
        elif self._is_ending:
            failure = Failure.of(Unavailable("the server is ending; it takes no new requests"))
            refusal = Progress(request.request_id, failure=failure)
        else:
            refusal = self._router.add(request, route, now)
        if refusal is not None:
            sends += self._tell({route: [refusal]})
        return sends

    def resubmit(self, route: bytes, message: Resubmit) -> None:
        """A request that the coordinator before knew."""
        self._clients.submits(route)
        if not self._router.has(route, message.request.request_id):
            self._takeover.claim(route, self._traced(route, message.request))

    def cancel(self, route: bytes, request_id: str) -> list[Send]:
        self._takeover.unclaim(route, request_id)
        if self._spans is not None:
            self._spans.end((route, request_id), "cancelled")
        given = self._router.cancel(route, request_id)
        return [] if given is None else self._cancel(*given)

    def beats(self, route: bytes, heartbeat: ClientHeartbeat, now: float) -> list[Send]:
        term = self._cluster.term
        if not self._clients.beats(route, heartbeat.num_submits, now):
            again = HelloAgain("requests were lost on the way to the coordinator", term)
            return [*self._forget_clients([route]), Send(route, again)]
        return [*self._say_status(now), self._clients.acknowledged(route, term)]

    def _forget_clients(self, routes: Iterable[bytes]) -> list[Send]:
        """They are gone: nobody waits for their requests."""
        sends: list[Send] = []
        for route in routes:
            if self._spans is not None:
                self._spans.end_where(lambda key, route=route: key[0] == route, "its client is gone")  # type: ignore
            self._takeover.client_lost(route)
            for worker_id, request_id in self._router.client_lost(route):
                sends += self._cancel(worker_id, request_id)
        return sends

    def _traced(self, route: bytes, request: Request) -> Request:
        if self._spans is None or not request.trace:
            return request
        key = (route, request.request_id)
        return replace(request, trace=self._spans.begin(key, "coordinator", request.trace))

    # -- attention workers' messages, once the cluster knows whose they are ------------------------------------------

    def passed(self, done: PassDone, now: float) -> list[Send]:
        """New tokens."""
        sends = self._tell(self._router.progress(done.worker_id, done.progress, now))
        if self._takeover:
            self._takeover.progress(done.worker_id, done.progress)
        return sends

    def failed(self, failed: RequestsFailed) -> list[Send]:
        sends = self._tell(self._router.fail(failed.request_ids, failed.failure, failed.worker_id))
        self._takeover.failed(failed.worker_id, failed.request_ids)
        return sends

    def released(self, released: Released, now: float) -> list[Send]:
        """A worker has let a request go, which goes on elsewhere."""
        sends = self._tell(self._router.released(released, now))
        self._takeover.failed(released.worker_id, [released.request_id])
        return sends

    def believed(self, route: bytes, heartbeat: Heartbeat, now: float) -> list[Send]:
        """A worker says which requests it has: others are as lost as those that nobody here knows."""
        belief, holds = heartbeat.belief, self._takeover.holds
        found = self._router.reconcile(heartbeat.worker_id, belief.request_ids, belief.acked, now)
        unknown = [one for one in found.unknown_here if not holds(heartbeat.worker_id, one)]
        return [*(Send(route, Cancel(request_id)) for request_id in unknown), *self._tell(found.updates)]

    def taken_over(self, worker_id: str, account: Account, now: float) -> None:
        """A worker of the coordinator before is about to say what it has."""
        self._takeover.begins(worker_id, account.num_requests, now)

    def account(self, worker_id: str, account: RequestAccount, now: float) -> None:
        self._takeover.account(worker_id, account, now, is_known=self._router.knows(account.request_id))

    def worker_lost(self, lost: Lost, now: float) -> list[Send]:
        log.warning("attention worker %s was lost: %s", lost.worker_id, lost.reason)
        self._takeover.worker_lost(lost.worker_id)
        return self._tell(self._router.worker_lost(lost.worker_id, lost.reason, now, lost.has_crashed))

    # -- what follows ------------------------------------------------------------------------------------------------

    def route(self, now: float) -> list[Send]:
        """After whatever happened: requests go to those who serve now."""
        sends = self._settle(now) if self._takeover else []
        serving = self._cluster.serving
        capacities = {worker_id: (member.num_blocks - 1) * BLOCK_TOKENS for worker_id, member in serving.items()}
        acks = {worker_id: member.num_acks for worker_id, member in serving.items()}
        for worker_id, request in self._router.route(capacities, acks, now):
            sends.append(Send(serving[worker_id].route, Submit(request)))
        sends += self._tell(self._router.take_ended())
        return sends

    def look(self, now: float) -> list[Send]:
        """After whatever happened: clients hear whether requests are taken now, and the end goes on."""
        if self._is_ending and not len(self):
            self._all_ended.set()
        return [] if self._clients.are_told(self._is_ready) else self._say_status(now)

    def tick(self, now: float, late_s: float) -> list[Send]:
        """Time has passed; see `Cluster.tick`."""
        sends = self._tell(self._router.expire(now, self._cluster.sentence(now)))
        for given in self._router.take_to_cancel():
            sends += self._cancel(*given)
        routes = {one.worker_id: one.route for one in self._cluster.live("attention")}
        leaving = [one.worker_id for one in self._cluster.live("attention") if one.state == "draining"]
        sent_per_s = {one.worker_id: _sent_per_s(one) for one in self._cluster.serving.values() if one.address}
        for one in self._router.due_moves(leaving, now, sent_per_s):
            target = self._cluster.serving.get(one.moves_to)
            address, again_s = "" if target is None else target.address, self._router.again_s(one)
            release = Release(one.request.request_id, one.release, address, again_s)
            sends.append(Send(routes[one.worker_id], release))
        return [*sends, *self._forget_clients(self._clients.tick(now, late_s)), *self._say_status(now)]

    def _settle(self, now: float) -> list[Send]:
        """Requests of the coordinator before go on where they are, or are computed again."""
        settled = self._takeover.settle(now, is_complete=not self._cluster.awaits_accounts(now))
        sends: list[Send] = []
        for given in settled.cancelled:
            sends += self._cancel(*given)
        for one in settled.taken:
            self._router.adopt(one.request, one.request_id, one.worker_id, one.client, now)
            sends += self._tell(self._router.progress(one.worker_id, one.behind, now))
        for client, request in settled.resumed:
            self._router.resume(request, client, now)
        return sends

    @property
    def _is_ready(self) -> bool:
        return bool(self._cluster.serving) and not self._is_ending

    def _say_status(self, now: float) -> list[Send]:
        """To the clients that do not know it."""
        sentence = f"ending, {len(self)} requests run" if self._is_ending else self._sentence(now)
        status = InstanceStatus(self._is_ready, sentence, self._cluster.failure)
        return self._clients.statuses(status)

    # -- the end -----------------------------------------------------------------------------------------------------

    def end(self) -> None:
        """No new requests are taken from now on."""
        self._is_ending = True

    async def ended(self, timeout_s: float) -> list[Send]:
        """Until those that are here have ended, after `timeout_s` with an error. Cancelling it leaves them alone."""
        sends: list[Send] = []
        try:
            async with asyncio.timeout(timeout_s):
                await self._all_ended.wait()
        except TimeoutError:
            error = Unavailable(
                f"the server was shut down before this request was done; it had {timeout_s:g} s from then"
                if timeout_s
                else "the server was shut down before this request was done"
            )
            updates, given = self._router.fail_all(Failure.of(error))
            for worker_id, request_id in given:
                sends += self._cancel(worker_id, request_id)
            sends += self._tell(updates)
        return sends

    # -- what is to be sent ------------------------------------------------------------------------------------------

    def _tell(self, updates: Updates) -> list[Send]:
        if self._spans is not None:
            self._end_spans(self._spans, updates)
        return self._clients.outputs(updates)

    @staticmethod
    def _end_spans(spans: OpenSpans, updates: Updates) -> None:
        for route, items in updates.items():
            for one in items:
                if one.is_last:
                    spans.end((route, one.request_id), "" if one.failure is None else str(one.failure.error()))

    def _cancel(self, worker_id: str, request_id: str) -> list[Send]:
        member = next((m for m in self._cluster.live("attention") if m.worker_id == worker_id), None)
        return [] if member is None else [Send(member.route, Cancel(request_id))]


def _sent_per_s(member: Member) -> float:
    """Tokens whose KV blocks an attention worker sends in a second, as it measured; 0 before it has sent any."""
    counted = member.status.attention
    if counted is None or not counted.kv_blocks_sending_s:
        return 0.0
    return counted.kv_blocks_sent * BLOCK_TOKENS / counted.kv_blocks_sending_s
