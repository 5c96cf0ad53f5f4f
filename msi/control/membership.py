"""Who belongs to an instance: which workers are there, in which role and incarnation, and who can serve.

Decides; does not act: events in (with the time), instructions out. Knows no sockets or clock. Membership is never
collective: workers join, leave and die one at a time, in any order. What is said of a member counts only when it comes
from its own connection and its present life, or from the launcher, which sees its processes end.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace

from msi.control.adoption import standing_of
from msi.control.client_messages import WorkerStats
from msi.control.expert_places import ExpertPlaces
from msi.control.formation import Formation, Joining, Refusal
from msi.control.inheritance import Inheritance
from msi.control.leaving import Leaving
from msi.control.members import LOADING_PATIENCE, InstancePlan, Instruction, Lost, Member, Send, assignment
from msi.control.messages import (
    Account,
    Assignment,
    Drain,
    ExpertAddress,
    Fence,
    Goodbye,
    Heartbeat,
    HeartbeatAck,
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
from msi.control.rhythm import Rhythm
from msi.control.roster import Roster
from msi.control.waiting_for import sentence
from msi.control.watched import WATCHED_FOR_S

LEAST_LOOK_S = 0.02  # after which time is looked at again
STUCK_AFTER_S = 30.0  # a process that lives, but whose loop stands still for so long, is given up


class Cluster:
    """The members of one instance."""

    def __init__(self, plan: InstancePlan, now: float) -> None:
        self.failure = ""  # a sentence, once the instance will never be ready
        self._watched_until = now
        self._started_at = now
        self._roster = Roster(plan)
        self._members = self._roster.members
        self.places = ExpertPlaces(self._roster)
        self.placing = self.places.placing
        self._formation = Formation(self._roster, self.places.why_not_yet)
        self._inheritance = Inheritance(self._roster, self._formation, self.places, now)
        self._leaving = Leaving(self._roster, self._formation, self.places)

    # -- what is -----------------------------------------------------------------------------------------------------

    @property
    def plan(self) -> InstancePlan:
        """Its places, and its term, may change."""
        return self._roster.plan

    @property
    def num_lanes(self) -> int:
        """How many run; 0 until that is known."""
        return self._roster.num_lanes

    def live(self, role: str) -> list[Member]:
        """Live members of a role, by place."""
        return self._roster.live(role)

    def member(self, route: bytes, worker_id: str, incarnation: int) -> Member | None:
        """The live member whose connection and present life this is."""
        return self._roster.member(route, worker_id, incarnation)

    def attention_at(self, route: bytes) -> str:
        """The id of the attention worker behind a route, "" for none."""
        return next((one.worker_id for one in self.live("attention") if one.route == route), "")

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
        if not self.num_lanes or any(self._leaving.is_stuck(member) for member in self.live("expert")):
            return {}
        serving = (member for member in self.live("attention") if member.is_linked and member.state == "ready")
        return {member.worker_id: member for member in self._roster.whole_nodes(serving) if not member.place.rank}

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
        return sentence(
            self._roster,
            self._formation,
            now - self._started_at,
            is_linked=self.is_linked,
            is_serving=bool(self.serving),
        )

    # -- events ------------------------------------------------------------------------------------------------------

    def hello(self, route: bytes, hello: WorkerHello, now: float) -> list[Instruction]:
        if self._roster.has_exited(hello.pid):
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
                self._roster.plan = self.plan.with_place(decision.role, decision.index)
                continue
            former = self._members.get(decision.worker_id)
            if former is not None and former.is_live:
                instructions += self._lose(former, "it began a new life")
                self._roster.plan = self.plan.with_place(decision.role, decision.place.index)  # also if it was leaving
            self._members[decision.worker_id] = decision
            if decision.role == "expert" and not self.placing.holds_any(decision.place.node):
                instructions += self.places.share_with(decision)
            instructions.append(Send(decision.route, self._assignment(decision)))
        return instructions

    # -- a coordinator before this one, or after it ------------------------------------------------------------------

    @property
    def superseded_by(self) -> int:
        """The term of a coordinator that took over from this one, 0 for none."""
        return self._inheritance.superseded_by

    def launched(self, serving: Collection[str], running: Mapping[str, int], forgotten: Collection[str] = ()) -> None:
        """See `Inheritance.launched`."""
        self._inheritance.launched(serving, running, forgotten)

    def adopt(self, route: bytes, account: Account, now: float) -> list[Instruction]:
        """A worker of the coordinator before goes on as it is, where that fits; else it begins a new life."""
        return self._inheritance.adopt(route, account, now)

    def awaits_accounts(self, now: float) -> bool:
        """Whether workers of the coordinator before, with requests, may still come."""
        return self._inheritance.awaits("attention", now)

    # -- what workers say --------------------------------------------------------------------------------------------

    def ready(self, route: bytes, ready: WorkerReady) -> list[Instruction]:
        member = self.member(route, ready.worker_id, ready.incarnation)
        if member is None:
            return self._inheritance.who_are_you(route, ready.worker_id, self._started_at)
        member.rhythm = member.rhythm if member.state != "loading" else Rhythm()  # it was busy with that
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
            follows = heartbeat.belief.term
            return self._inheritance.who_are_you(route, heartbeat.worker_id, now, follows=follows)
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
        member.follows_version, member.follows_former = belief.follows_version, belief.follows_former
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
            return [self._roster.begin_anew(route, "the coordinator does not know this worker (any more)")]
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
        self._roster.exited(pid, now)
        self._inheritance.ended(worker_id)
        self._formation.forget(heard_before=-1.0, pid=pid)
        member = self._members.get(worker_id)
        if member is None or member.pid != pid:
            return []
        if not member.is_live:
            member.reason = member.with_why(how)  # whoever told before saw only a consequence
            return []
        return [*self._lose(member, how, has_crashed), *self._settle(now)]

    def draining(self, route: bytes, worker_id: str, incarnation: int) -> list[Instruction]:
        """A worker wants to end: an attention worker as soon as its requests have, an expert worker when all have."""
        member = self.member(route, worker_id, incarnation)
        if member is None:
            return [Send(route, Drain())]
        self._formation.has_served |= bool(self.serving)  # until now
        return self._leaving.begin(member)

    def ask_to_leave(
        self, worker_id: str, by: float, carry_out: Callable[[list[Instruction]], None], why: str = ""
    ) -> Member:
        """A worker is to leave: what runs on it finishes, or goes on elsewhere from `by` on; see `Leaving.ask`.

        Raises:
            ConfigError: there is no such worker, or nothing would run without it.
        """
        member = self._leaving.ask(worker_id, by, why)
        carry_out(self.draining(member.route, worker_id, member.incarnation))
        return member

    def is_of_use(self, member: Member) -> bool:
        """Whether rows or requests go to it."""
        if member.role == "attention":
            return member.state == "ready" and member.is_linked
        return self.places.is_of_use(member)

    def take_staying(self) -> list[str]:
        """Workers that were to leave, and stay since they cannot."""
        return self._leaving.take_staying()

    def no_requests_left(self) -> list[Instruction]:
        """Nothing runs: whoever only waited for that may end."""
        return self._leaving.nothing_runs()

    def goodbye(self, route: bytes, goodbye: Goodbye) -> list[Instruction]:
        member = self.member(route, goodbye.worker_id, goodbye.incarnation)
        if member is None:
            return []
        return self._lose(member, member.with_why("it was drained"))

    def use_lanes(self, num_lanes: int) -> list[Instruction]:
        """From now on this many micro-batches are in flight, on all attention workers."""
        self._roster.num_lanes = num_lanes
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
        if self._inheritance.is_under_way or not self._formation.has_served:
            return []
        return self.places.begin_what_is_due(now)

    # -- time --------------------------------------------------------------------------------------------------------

    def tick(self, now: float, late_s: float = 0.0) -> list[Instruction]:
        """Time has passed.

        Args:
            late_s: this tick comes so much later than it should: nobody else is to blame for that silence.
        """
        instructions: list[Instruction] = []
        self._started_at += late_s
        self._inheritance.excuse(late_s)
        self._formation.excuse(late_s)
        for member in list(self._members.values()):
            member.last_seen += late_s
            self._leaving.gone(member)  # its experts may be elsewhere by now
            silent_s = now - member.last_seen
            member.rhythm.settle(late_s)
            if member.is_live and silent_s > member.patience_s(self.plan):
                instructions += self._lose(member, f"no sign of life for {silent_s:.1f} s")
        if self._inheritance.is_over(now):
            instructions += self._topology_to(*self.live("attention"))
        self._formation.forget(heard_before=now - self.plan.timeouts.lost_after_s * LOADING_PATIENCE)
        instructions += self._settle(now)
        was_changing = self.placing.is_changing
        for member in self._leaving.late(now):
            reason = "it was drained, and its time was over"
            instructions += [Send(member.route, Shutdown(reason)), *self._lose(member, reason)]
        instructions += [*self.places.advance(), *self.places.let_end()]
        if not was_changing:  # whoever asked for a change hears of its end first
            instructions += self._begin_what_is_due(now)
        self._leaving.let_stay()
        self._roster.forget_exited(now)
        self._formation.has_served |= bool(self.serving)
        has_served = self._formation.has_served
        if not has_served and not self.failure and now - self._started_at > self.plan.timeouts.start_timeout_s:
            self.failure = f"gave up after {self.plan.timeouts.start_timeout_s:g} s: {self.sentence(now)}"
        return instructions

    def looks_again_in_s(self, now: float, most_s: float) -> float:
        """When time is to be looked at again: where somebody is silent, as soon as that has been for too long."""
        left_s = (one.patience_s(self.plan) - (now - one.last_seen) for one in self._members.values() if one.is_live)
        return min(most_s, max(LEAST_LOOK_S, min(left_s, default=most_s)))

    # -- helpers -----------------------------------------------------------------------------------------------------

    def knows(self, route: bytes, worker_id: str, incarnation: int) -> bool:
        """Whether this is a live member's connection and its present life."""
        return self.member(route, worker_id, incarnation) is not None

    def _assignment(self, member: Member) -> Assignment:
        assert self._formation.precision is not None, "nobody is a member before it is known"
        return assignment(self.plan, member, self._formation.precision, *self.placing.used_by(member.role))

    def _topology_to(self, *attention: Member) -> Iterator[Instruction]:
        if self._inheritance.is_under_way:
            return
        members = [*self.live("expert"), *(attention if self.plan.is_colocated else ())]
        experts = tuple(
            ExpertAddress(m.place, m.worker_id, m.incarnation, m.address)
            for m in self._roster.whole_nodes(member for member in members if member.state != "loading")
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
        self._leaving.gone(member)  # however its end is noticed: its goodbye, or what a peer says, may come later
        out = self._roster.begin_anew(member.route, f"the coordinator gave it up: {reason}")
        if member.role == "expert":
            return [out, *self._topology_to(*self.live("attention"))]
        fences = [Send(expert.route, Fence(member.worker_id)) for expert in self.live("expert")]
        return [out, Lost(member.worker_id, reason, has_crashed), *fences]
