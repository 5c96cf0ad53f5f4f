"""Who belongs to an instance: which workers are there, in which role and incarnation, and who can serve.

Decides; does not act: events in (with the time), instructions out. Knows no sockets or clock. Membership is never
collective: workers join, leave and die one at a time, in any order. What is said of a member counts only when it comes
from its own connection and its present life, or from the launcher, which sees its processes end.
"""

from __future__ import annotations

import hmac
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace

from msi.control.adoption import adopted, standing_of, why_not_adopted, with_places_of
from msi.control.arrivals import Arrivals
from msi.control.client_messages import WorkerStats
from msi.control.expert_places import ExpertPlaces
from msi.control.formation import Formation, Joining, Refusal
from msi.control.members import InstancePlan, Instruction, Lost, Member, Send, assignment
from msi.control.messages import (
    Account,
    AccountWanted,
    Adopted,
    Assignment,
    Drain,
    ExpertAddress,
    Fence,
    Goodbye,
    Heartbeat,
    HeartbeatAck,
    HelloAgain,
    Linked,
    PassDone,
    PeerLost,
    Placed,
    Pulse,
    Refused,
    Shutdown,
    Topology,
    Undecided,
    UseLanes,
    WorkerFailed,
    WorkerHello,
    WorkerReady,
)
from msi.control.succession import next_term
from msi.control.watched import WATCHED_FOR_S
from msi.control.worker_status import WorkerStatus
from msi.errors import ConfigError, shown
from msi.types import Place

LOADING_PATIENCE = 5  # a worker that loads may be silent for so many times longer
STUCK_AFTER_S = 30.0  # a process that lives, but whose loop stands still for so long, is given up
ASKED_AGAIN_S = 0.5
LIVES_PER_TERM = 4097  # whoever comes anew to a coordinator is of a later life than any that the one before knew
LEAVES_WITHIN_S = 60.0  # where nobody knows how long it was given
EXITS_REMEMBERED_S = 10.0  # what a process said before it ended may be read after that


class Cluster:
    """The members of one instance."""

    def __init__(self, plan: InstancePlan, now: float) -> None:
        self.plan = plan
        self.failure = ""  # a sentence, once the instance will never be ready
        self.num_lanes = 0  # how many run; 0 until that is known
        self._watched_until = now
        self._started_at = now
        self._members: dict[str, Member] = {}
        self.places = ExpertPlaces(plan, self._members)
        self.placing = self.places.placing
        self._formation = Formation(plan, self._members, self.places.why_not_yet)
        self._formation.first_incarnation = plan.term * LIVES_PER_TERM
        self._exited: dict[int, float] = {}  # processes that ended, and when
        self.superseded_by = 0  # the term of a coordinator that took over from this one
        self.arrivals = Arrivals(now)  # of workers of the coordinator before
        self._staying: list[str] = []
        self._forgotten: frozenset[str] = frozenset()  # by whoever starts workers here
        self._launched: dict[str, int] = {}  # workers that a launcher keeps running, by role, as it said at the start
        self._places_known = 0  # changes of places, of which workers told that they took over
        self._asked: dict[bytes, float] = {}  # who was asked for an account, and when

    # -- what is -----------------------------------------------------------------------------------------------------

    def live(self, role: str) -> list[Member]:
        """Live members of a role, by place."""
        members = [member for member in self._members.values() if member.role == role and member.is_live]
        return sorted(members, key=lambda member: member.place.index)

    @property
    def routes(self) -> list[bytes]:
        """To everyone who is here: attention workers first, then expert workers, then those without a role yet."""
        members = [member.route for role in ("attention", "expert") for member in self.live(role)]
        return [*members, *self._formation.routes]

    @property
    def term(self) -> int:
        """Which coordinator of the instance this is."""
        return self.plan.term

    def has_route(self, route: bytes) -> bool:
        """Whether a worker is, or was last, behind it."""
        return route in self._formation.routes or any(member.route == route for member in self._members.values())

    @property
    def is_linked(self) -> bool:
        """Whether every wanted worker is there and connected."""
        if any(len(self.live(role)) < count for role, count in self.plan.wanted.items()):
            return False
        return all(member.is_linked for member in self.live("attention"))

    @property
    def serving(self) -> dict[str, Member]:
        """Attention workers that requests may go to, by id: the first rank of each node whose every rank can serve."""
        if not self.num_lanes or any(self._is_stuck(member) for member in self.live("expert")):
            return {}
        serving = (member for member in self.live("attention") if member.is_linked and member.state == "ready")
        return {member.worker_id: member for member in self._whole_nodes(serving) if not member.place.rank}

    @staticmethod
    def _whole_nodes(members: Iterable[Member]) -> list[Member]:
        """Those whose node's other ranks are among them, too."""
        given = list(members)
        num_ranks = Counter(member.place.node for member in given)
        return [member for member in given if num_ranks[member.place.node] == member.place.size]

    def stats(self, *, is_watching: bool = False) -> tuple[WorkerStats, ...]:
        return tuple(
            WorkerStats(
                m.worker_id, m.role, m.pid, m.host, m.incarnation, m.state,
                m.status if is_watching or m.status.watched is None else replace(m.status, watched=None), m.reason,
            )
            for m in self._members.values()
        )  # fmt: skip

    def sentence(self, now: float) -> str:
        """What is waited for, by name."""
        waited = f"{now - self._started_at:.0f} s"
        for role, places in self.plan.wanted_places.items():
            there, count = {member.place.index for member in self.live(role)}, len(places)
            missing = next((number for number, index in enumerate(places) if index not in there), None)
            if missing is not None:
                lost = self._members.get(f"{role}-{places[missing]}")
                why = f" ({lost.reason})" if lost is not None and lost.reason else ""
                if num_undecided := self._formation.num_undecided:
                    why += f" ({self._formation.num_free} missing, {num_undecided} for any role here)"
                return f"waiting for {role} worker {missing + 1} of {count}{why}, {waited}"
        loading = [m for role in self.plan.wanted for m in self.live(role) if m.state == "loading"]
        if loading:
            shares = ", ".join(f"{m.worker_id} {_percent(m.status)}" for m in loading)
            return f"loading weights: {shares}, {waited}"
        if not self.is_linked:
            apart = next(member.worker_id for member in self.live("attention") if not member.is_linked)
            return f"waiting for {apart} to connect to the expert workers, {waited}"
        if not self.num_lanes:
            return f"measuring stages to choose the number of micro-batches, {waited}"
        if not self.serving:
            return "draining"
        return "ready"

    # -- events ------------------------------------------------------------------------------------------------------

    def hello(self, route: bytes, hello: WorkerHello, now: float) -> list[Instruction]:
        if hello.pid in self._exited:
            return []
        for known in self._members.values():
            if known.is_live and known.route == route and not known.has_beaten:
                return [Send(route, self._assignment(known))]  # it asked again before our answer came
        if objection := self._formation.objection(hello):
            return [Send(route, Refused(objection))]
        self._formation.apply(route, hello, now)
        instructions = self._settle(now)
        if waits_for := self._formation.waits_for(hello, route):
            instructions.append(Send(route, Undecided(waits_for)))
        return instructions

    def _settle(self, now: float) -> list[Instruction]:
        """Places for those who can have one by now."""
        instructions: list[Instruction] = []
        for decision in self._formation.settle(now):
            if isinstance(decision, Refusal):
                instructions.append(Send(decision.route, Refused(decision.reason)))
                continue
            if isinstance(decision, Joining):
                self._use_places(self.plan.with_place(decision.role, decision.index))
                continue
            former = self._members.get(decision.worker_id)
            if former is not None and former.is_live:
                instructions += self._lose(former, "it began a new life")
                self._use_places(self.plan.with_place(decision.role, decision.place.index))  # also if it was leaving
            self._members[decision.worker_id] = decision
            if decision.role == "expert" and not self.placing.holds_any(decision.place.node):
                instructions += self.places.share_with(decision)
            instructions.append(Send(decision.route, self._assignment(decision)))
        return instructions

    # -- workers of the coordinator before ---------------------------------------------------------------------------

    def _who_are_you(self, route: bytes, worker_id: str, now: float) -> list[Instruction]:
        """To a worker that is none of ours (any more): one of the coordinator before may go on as it is."""
        if worker_id in self._members:
            return [Send(route, self._hello_again("the coordinator does not know this worker (any more)"))]
        if now - self._asked.get(route, -ASKED_AGAIN_S) < ASKED_AGAIN_S:
            return []  # what it said while there was no coordinator comes all at once
        self._asked[route] = now
        return [Send(route, AccountWanted())]

    def awaits_accounts(self, now: float) -> bool:
        """Whether workers of the coordinator before, with requests, may still come."""
        return self._awaits("attention", now)

    def _awaits(self, role: str, now: float) -> bool:
        num_missing = self.plan.wanted[role] - len(self.live(role))
        return self.arrivals.awaits(now, role=role, known=self._members, num_missing=num_missing)

    def adopt(self, route: bytes, account: Account, now: float) -> list[Instruction]:
        """A worker of the coordinator before goes on as it is, where that fits; else it begins a new life."""
        given = account.assignment
        if self.member(route, given.worker_id, given.incarnation) is not None:
            return [Send(route, Adopted(self.term))]
        if account.hello.pid in self._exited:
            return []  # what it said before it ended
        is_first = not (self.arrivals.num_came or self._formation.has_served)
        members = {} if is_first else self._members
        self._use_places(replace(self.plan, term=max(self.term, next_term(account.term, self.term))))
        if objection := self._formation.objection(account.hello) or why_not_adopted(account, self.plan, members):
            return [Send(route, self._hello_again(objection))]
        instructions: list[Instruction] = []
        if is_first:  # who came before it has an instance of its own, and a life that others may know of an earlier one
            early = [one for one in self._members.values() if one.is_live]
            instructions += [Send(one.route, self._hello_again("it came before those who serve")) for one in early]
            self._members.clear()
            self.plan = replace(self.plan, instance=given.instance)
        self.placing.adopt(account.placement, is_first=is_first)
        if (standing := account.standing) is not None and standing.num_changes > self._places_known:
            self._places_known = standing.num_changes
            self._use_places(with_places_of(standing, self.plan, self._members.values()))
        self._use_places(self.plan.with_place(given.role, given.place.index))
        self._formation.recognise(account.hello, self.term * LIVES_PER_TERM)
        member = self._members[given.worker_id] = adopted(route, account, now)
        if given.worker_id in self._forgotten and not member.is_leaving:
            member.state, member.is_leaving, member.leaves_by = "draining", True, now + LEAVES_WITHIN_S
        if member.state == "draining" and member.role == "attention":
            instructions.append(Send(route, Drain()))  # it may not have heard
        self.arrivals.came(now)
        self.num_lanes = self.num_lanes or account.num_lanes
        return [*instructions, Send(route, Adopted(self.term))]

    def launched(self, serving: Collection[str], running: Mapping[str, int], forgotten: Collection[str] = ()) -> None:
        """Whoever starts workers here says what there is at the start of this coordinator.

        Args:
            serving: workers that served the coordinator before, and live.
            running: how many of each role there are to be: more places, that nobody has, are not wanted.
            forgotten: workers that were to leave the coordinator before: they are not started again.
        """
        self.arrivals.expects(serving)
        self._launched, self._forgotten = dict(running), frozenset(forgotten)
        self._want_no_more()

    def _want_no_more(self) -> None:
        """Places that have experts are somebody's, though nobody is there."""
        held = {role: {member.place.index for member in self.live(role)} for role in self.plan.wanted}
        ranks = self.plan.expert_ranks
        held["expert"] |= {
            index for index in self.plan.wanted_places["expert"] if self.placing.holds_any(Place.at(index, ranks).node)
        }
        self._use_places(self.plan.at_most(self._launched, held))

    def attention_at(self, route: bytes) -> str:
        """The id of the attention worker behind a route, "" for none."""
        return next((one.worker_id for one in self.live("attention") if one.route == route), "")

    def _has_taken_over(self, now: float) -> list[Instruction]:
        """Once all are there, or late, those who are there hear who is."""
        if not self.arrivals.is_taking_over or any(self._awaits(role, now) for role in self.plan.wanted):
            return []
        self.arrivals.over()
        self._want_no_more()
        self.places.begin_anew(now)
        return list(self._topology_to(*self.live("attention")))

    # ----------------------------------------------------------------------------------------------------------------

    def ready(self, route: bytes, ready: WorkerReady) -> list[Instruction]:
        member = self.member(route, ready.worker_id, ready.incarnation)
        if member is None:
            return self._who_are_you(route, ready.worker_id, self._started_at)
        member.state, member.address, member.num_blocks = "ready", ready.address, ready.num_blocks
        if member.role == "expert":
            return list(self._topology_to(*self.live("attention")))
        return list(self._topology_to(member))

    def linked(self, route: bytes, linked: Linked) -> list[Instruction]:
        member = self.member(route, linked.worker_id, linked.incarnation)
        if member is None:
            return []
        member.is_linked = linked.is_complete
        return self._lanes_to(member) if linked.is_complete else []

    def heartbeat(self, route: bytes, heartbeat: Heartbeat, now: float) -> list[Instruction]:
        """A sign of life, and what the worker believes; what it turns out not to know is said again."""
        member = self.member(route, heartbeat.worker_id, heartbeat.incarnation)
        if member is None:
            if heartbeat.worker_id in self._members and heartbeat.belief.term > self.term:
                self.superseded_by = heartbeat.belief.term  # what is known of it here is of long ago
                return []
            return self._who_are_you(route, heartbeat.worker_id, now)
        member.last_seen = member.heard_at = now
        member.status, member.has_beaten = heartbeat.status, True
        belief = heartbeat.belief
        instructions: list[Instruction] = []
        if belief.ready is not None and member.state == "loading":
            instructions += self.ready(route, belief.ready)
        if member.role == "attention" and member.state != "loading":
            if belief.is_linked != member.is_linked:
                instructions += self.linked(route, Linked(member.worker_id, member.incarnation, belief.is_linked))
            if not belief.is_linked:
                instructions += self._topology_to(member)
            elif member.has_lanes and belief.num_lanes != self.num_lanes:
                instructions.append(Send(route, UseLanes(self.num_lanes)))
        member.placement_version, member.has_former = belief.placement_version, belief.has_former
        instructions += self.placing.to(member)
        member.num_acks += 1
        is_watched = now < self._watched_until
        standing = standing_of(member, self.plan, now)
        ack = HeartbeatAck(member.num_acks, is_watched=is_watched, term=self.term, standing=standing)
        return [*instructions, Send(route, ack)]

    def watch(self, now: float) -> None:
        """Somebody watches: workers hear of it with the answers to their heartbeats."""
        self._watched_until = now + WATCHED_FOR_S

    def pulse(self, pulse: Pulse, now: float) -> list[Instruction]:
        """A sign of life of a process, by whatever way it comes: it names what only the member itself knows."""
        member = self._members.get(pulse.worker_id)
        if member is None or not member.is_live or member.incarnation != pulse.incarnation or not member.process:
            return []
        if not hmac.compare_digest(member.process.encode(), pulse.process.encode()):
            return []
        member.loop_lag_s = pulse.loop_lag_s
        if pulse.loop_lag_s > STUCK_AFTER_S:
            reason = f"its loop has been standing still for {pulse.loop_lag_s:.0f} s"
            return self._lose(member, reason, has_crashed=True)
        member.last_seen = member.heard_at = now
        member.rhythm.beat(now)
        return []

    def passed(self, route: bytes, done: PassDone) -> list[Instruction] | None:
        """What follows from new tokens but the tokens themselves; None where they do not count."""
        member = self.member(route, done.worker_id, done.incarnation)
        if member is None:  # earlier ones may have been lost with its connection: its requests go on in another life
            is_new = done.worker_id not in self._members  # what it is, its heartbeat will say
            if is_new or any(one.is_live and one.route == route for one in self._members.values()):
                return None  # of its former life
            return [Send(route, self._hello_again("the coordinator does not know this worker (any more)"))]
        if done.number != member.num_passes:
            return self._lose(member, "tokens of its were lost on the way")
        member.num_passes += 1
        return []

    def peer_lost(self, route: bytes, report: PeerLost) -> list[Instruction]:
        """An attention worker lost its link to an expert worker: that one is out until it says hello again."""
        reporter, peer = self.member(route, report.worker_id, report.incarnation), self._members.get(report.peer)
        if reporter is None or peer is None or not peer.is_live or peer.incarnation != report.peer_incarnation:
            return []
        if reporter.role != "attention" or (peer.role != "expert" and peer is not reporter):
            return []  # no link leads there
        return self._lose(peer, f"{report.worker_id} lost it: {report.reason}")

    def worker_failed(self, route: bytes, failed: WorkerFailed) -> list[Instruction]:
        """A worker cannot do its work, and says so before it ends."""
        member = self.member(route, failed.worker_id, failed.incarnation)
        if member is None:
            return []
        if not self._formation.has_served:
            self.failure = failed.reason
        return self._lose(member, failed.reason)

    def worker_exited(
        self, worker_id: str, pid: int, how: str, now: float, *, has_crashed: bool = False
    ) -> list[Instruction]:
        """The launcher saw a process of its own end; `has_crashed`: by itself, not by anybody's signal."""
        self._exited[pid] = now
        self.arrivals.ended(worker_id)
        self._formation.forget(heard_before=-1.0, pid=pid)
        member = self._members.get(worker_id)
        if member is None and worker_id in self._forgotten:  # nobody is to come in its place
            role = worker_id.rpartition("-")[0]
            self._launched[role] = self._launched.get(role, 1) - 1
            self._want_no_more()
        if member is None or member.pid != pid:
            return []
        if not member.is_live:
            member.reason = how  # whoever told before saw only a consequence
            return []
        return [*self._lose(member, how, has_crashed), *self._settle(now)]

    def draining(self, route: bytes, worker_id: str, incarnation: int) -> list[Instruction]:
        """A worker wants to end: an attention worker as soon as its requests have, an expert worker when all have."""
        member = self.member(route, worker_id, incarnation)
        if member is None:
            return [Send(route, Drain())]
        self._formation.has_served |= bool(self.serving)  # until now
        member.state, member.is_leaving = "draining", True
        return [Send(route, Drain())] if member.role == "attention" else []

    def ask_to_leave(self, worker_id: str, by: float, carry_out: Callable[[list[Instruction]], None]) -> Member:
        """A worker is to leave: what runs on it finishes, or goes on elsewhere from `by` on.

        Raises:
            ConfigError: there is no such worker, or nothing would run without it.
        """
        member = self._members.get(worker_id)
        if member is None or not member.is_live or self.plan.is_colocated:
            there = ", ".join(one.worker_id for role in self.plan.wanted for one in self.live(role))
            raise ConfigError(f"there is no worker {shown(worker_id)} that could leave; there are {there}")
        staying = [one for one in self.live(member.role) if one is not member and one.state == "ready"]
        if not staying:
            raise ConfigError(f"{worker_id} is the only {member.role} worker that serves; add another one first")
        if member.state == "loading":
            raise ConfigError(f"{worker_id} is still loading; it can leave once it is ready")
        member.leaves_by = by
        carry_out(self.draining(member.route, worker_id, member.incarnation))
        return member

    def is_stuck(self, member: Member) -> bool:
        """Whether an expert worker that wants to leave cannot: its experts have no other place."""
        return member.role == "expert" and self._is_stuck(member)

    def _let_stay(self) -> None:
        """Those that an operator asked to leave, and that cannot, serve on."""
        for member in self.live("expert"):
            if member.leaves_by < math.inf and self.is_stuck(member):
                member.state, member.is_leaving, member.leaves_by = "ready", False, math.inf
                self._staying.append(member.worker_id)

    def take_staying(self) -> list[str]:
        """Workers that were to leave, and stay since they cannot."""
        staying, self._staying = self._staying, []
        return staying

    def is_of_use(self, member: Member) -> bool:
        """Whether rows or requests go to it."""
        if member.role == "attention":
            return member.state == "ready" and member.is_linked
        return self.places.is_of_use(member)

    def _end_late(self, now: float) -> list[Instruction]:
        """Attention workers whose time to finish what they run is over: that goes on elsewhere."""
        instructions: list[Instruction] = []
        for member in self.live("attention"):
            if member.state == "draining" and now > member.leaves_by:
                instructions.append(Send(member.route, Shutdown("it was drained, and its time was over")))
                instructions += self._lose(member, "it was drained, and its time was over")
        return instructions

    def no_requests_left(self) -> list[Instruction]:
        """Nothing runs: expert workers that want to end, and whose experts have no other place, may."""
        return [Send(member.route, Drain()) for member in self.live("expert") if self._is_stuck(member)]

    def _is_stuck(self, member: Member) -> bool:
        if not self._formation.has_served:
            return member.state == "draining" and not self.placing.is_changing
        return self.places.is_stuck(member)

    def goodbye(self, route: bytes, goodbye: Goodbye) -> list[Instruction]:
        member = self.member(route, goodbye.worker_id, goodbye.incarnation)
        if member is None:
            return []
        return self._lose(member, "it was drained")

    def _leaves(self, member: Member) -> None:
        """One that was to leave is gone, and not wanted any more, unless it has experts that are nowhere else."""
        if member.is_live or not member.is_leaving:
            return
        if any(one.place == member.place for one in self.live(member.role)):
            member.is_leaving = False  # another has its place
        elif member.role == "attention" or not self.placing.holds_any(member.place.node):
            member.is_leaving = False
            self._use_places(self.plan.without_place(member.role, member.place.index))

    def use_lanes(self, num_lanes: int) -> list[Instruction]:
        """From now on this many micro-batches are in flight, on all attention workers."""
        self.num_lanes = num_lanes
        for member in self.live("attention"):
            member.has_lanes = False
        return [one for member in self.live("attention") if member.is_linked for one in self._lanes_to(member)]

    # -- placement ---------------------------------------------------------------------------------------------------

    def placed(self, route: bytes, placed: Placed) -> list[Instruction]:
        """An expert worker has done as it was told, or cannot."""
        if (member := self.member(route, placed.worker_id, placed.incarnation)) is not None:
            self.placing.hear(member, placed)
        return self.places.advance()

    def _begin_what_is_due(self, now: float) -> list[Instruction]:
        if self.arrivals.is_taking_over or not self._formation.has_served:
            return []
        return self.places.begin_what_is_due(now)

    def _use_places(self, plan: InstancePlan) -> None:
        self.plan = self._formation.plan = plan

    # -- time --------------------------------------------------------------------------------------------------------

    def tick(self, now: float, late_s: float = 0.0) -> list[Instruction]:
        """Time has passed.

        Args:
            late_s: this tick comes so much later than it should: nobody else is to blame for that silence.
        """
        instructions: list[Instruction] = []
        self._started_at += late_s
        self.arrivals.excuse(late_s)
        self._formation.excuse(late_s)
        for member in list(self._members.values()):
            member.last_seen += late_s
            self._leaves(member)  # its experts may be elsewhere by now
            silent_s = now - member.last_seen
            member.rhythm.settle(late_s)
            patience_s = self._patience_s(member)
            if member.is_live and silent_s > patience_s:
                instructions += self._lose(member, f"no sign of life for {silent_s:.1f} s")
        instructions += self._has_taken_over(now)
        self._asked = {route: at for route, at in self._asked.items() if now - at < ASKED_AGAIN_S}
        self._formation.forget(heard_before=now - self.plan.timeouts.lost_after_s * LOADING_PATIENCE)
        instructions += self._settle(now)
        was_changing = self.placing.is_changing
        instructions += [*self._end_late(now), *self.places.advance(), *self.places.let_end()]
        if not was_changing:  # whoever asked for a change hears of its end first
            instructions += self._begin_what_is_due(now)
        self._let_stay()
        self._exited = {pid: at for pid, at in self._exited.items() if now - at < EXITS_REMEMBERED_S}
        self._formation.has_served |= bool(self.serving)
        has_served = self._formation.has_served
        if not has_served and not self.failure and now - self._started_at > self.plan.timeouts.start_timeout_s:
            self.failure = f"gave up after {self.plan.timeouts.start_timeout_s:g} s: {self.sentence(now)}"
        return instructions

    def _patience_s(self, member: Member) -> float:
        """With a member's silence."""
        most_s = self.plan.timeouts.lost_after_s
        if member.state == "loading":
            return most_s * LOADING_PATIENCE
        return member.rhythm.patience_s(most_s) if self.plan.is_on_network else most_s

    # -- helpers -----------------------------------------------------------------------------------------------------

    def knows(self, route: bytes, worker_id: str, incarnation: int) -> bool:
        """Whether this is a live member's connection and its present life."""
        return self.member(route, worker_id, incarnation) is not None

    def member(self, route: bytes, worker_id: str, incarnation: int) -> Member | None:
        """The live member whose connection and present life this is."""
        member = self._members.get(worker_id)
        if member is None or not member.is_live or member.route != route or member.incarnation != incarnation:
            return None
        return member

    def _hello_again(self, reason: str) -> HelloAgain:
        return HelloAgain(reason, self.term)

    def _assignment(self, member: Member) -> Assignment:
        assert self._formation.precision is not None, "nobody is a member before it is known"
        return assignment(self.plan, member, self._formation.precision, *self.placing.used_by(member.role))

    def _topology_to(self, *attention: Member) -> Iterator[Instruction]:
        if self.arrivals.is_taking_over:
            return
        members = [*self.live("expert"), *(attention if self.plan.is_colocated else ())]
        experts = tuple(
            ExpertAddress(m.place, m.worker_id, m.incarnation, m.address)
            for m in self._whole_nodes(member for member in members if member.state != "loading")
        )
        lost = {m.worker_id: m.reason for m in self._members.values() if not m.is_live}
        for member in attention:
            if member.state != "loading":
                yield Send(member.route, Topology(experts, lost))

    def _lanes_to(self, member: Member) -> list[Instruction]:
        if not self.num_lanes or member.has_lanes:
            return []
        member.has_lanes = True
        return [Send(member.route, UseLanes(self.num_lanes))]

    def _lose(self, member: Member, reason: str, has_crashed: bool = False) -> list[Instruction]:
        member.state, member.reason, member.is_linked = "lost", reason, False
        self._leaves(member)  # however its end is noticed: its goodbye, or what a peer says, may come later
        out = Send(member.route, self._hello_again(f"the coordinator gave it up: {reason}"))
        if member.role == "expert":
            return [out, *self._topology_to(*self.live("attention"))]
        fences = [Send(expert.route, Fence(member.worker_id)) for expert in self.live("expert")]
        return [out, Lost(member.worker_id, reason, has_crashed), *fences]


def _percent(status: WorkerStatus) -> str:
    return f"{100 * status.loaded_bytes / status.total_bytes:.0f} %" if status.total_bytes else "0 %"
