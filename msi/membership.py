"""Who belongs to an instance: which workers are there, in which role and incarnation, and who can serve.

Decides; does not act: events in (with the time), instructions out. Knows no sockets or clock. Membership is never
collective: workers join, leave and die one at a time, in any order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from msi.messages import (
    PROTOCOL_VERSION,
    Assignment,
    Drain,
    ExpertAddress,
    Fence,
    Goodbye,
    Heartbeat,
    HeartbeatAck,
    HelloAgain,
    Linked,
    PeerLost,
    Refused,
    Topology,
    Undecided,
    UseLanes,
    WorkerHello,
    WorkerReady,
    WorkerStats,
    WorkerStatus,
)
from msi.types import Placement, StageTimes

NO_STATUS = WorkerStatus(0, 0, 0, 0, 0, StageTimes(), {})
LOADING_PATIENCE = 5  # a worker that loads may be silent for so many times longer
ROLES = ("attention", "expert", "worker")


@dataclass(frozen=True, slots=True)
class InstancePlan:
    """The shape of an instance; see `msi.messages.Assignment` for what is not said here.

    Attributes:
        num_lanes: lanes that slots are made for.
        start_timeout_s: how long workers may take to come.
    """

    instance: str
    num_attention: int
    num_expert: int
    is_colocated: bool
    placement: Placement
    num_lanes: int
    slot_rows: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    dtype: str = "auto"
    peer_timeout_s: float = 4.0
    heartbeat_s: float = 1.0
    lost_after_s: float = 3.0
    start_timeout_s: float = 120.0
    max_num_waiting: int = 1024
    has_prefix_cache: bool = True
    num_kv_blocks: int = 0

    @property
    def wanted(self) -> dict[str, int]:
        """Workers per role."""
        return {"attention": self.num_attention, "expert": 0 if self.is_colocated else self.num_expert}


@dataclass(frozen=True, slots=True)
class Send:
    """Instruction: give this message to the worker behind `route`."""

    route: bytes
    message: Any


@dataclass(frozen=True, slots=True)
class Lost:
    """Instruction: the requests of this attention worker are lost with it."""

    worker_id: str
    reason: str


Instruction = Send | Lost


@dataclass(slots=True)
class Member:
    """A worker that is or was there. `state`: loading, ready, draining or lost."""

    worker_id: str
    role: str
    index: int
    incarnation: int
    route: bytes
    pid: int
    host: str
    last_seen: float
    process: str = ""
    state: str = "loading"
    reason: str = ""  # why it is lost
    address: str = ""
    num_blocks: int = 0
    is_linked: bool = False
    has_lanes: bool = False  # was told how many to run
    has_beaten: bool = False
    status: WorkerStatus = field(default=NO_STATUS)

    @property
    def is_live(self) -> bool:
        return self.state != "lost"


@dataclass(frozen=True, slots=True)
class Applicant:
    """A worker for any role that is told one once it is clear which: others may come that want a certain one."""

    route: bytes
    hello: WorkerHello
    last_seen: float


class Cluster:
    """The members of one instance."""

    def __init__(self, plan: InstancePlan, now: float) -> None:
        self.plan = plan
        self.failure = ""  # a sentence, once the instance will never be ready
        self.num_lanes = 0  # how many run; 0 until that is known
        self._started_at = now
        self._was_ready = False
        self._members: dict[str, Member] = {}
        self._undecided: dict[str | bytes, Applicant] = {}  # by process, in order of arrival
        self._fingerprint = ""
        self._dtype = "" if plan.dtype == "auto" else plan.dtype

    # -- what is -----------------------------------------------------------------------------------------------------

    def live(self, role: str) -> list[Member]:
        """Live members of a role, by index."""
        members = [member for member in self._members.values() if member.role == role and member.is_live]
        return sorted(members, key=lambda member: member.index)

    @property
    def routes(self) -> list[bytes]:
        """To everyone who is here: attention workers first, then expert workers, then those without a role yet."""
        members = [member.route for role in ("attention", "expert") for member in self.live(role)]
        return [*members, *(applicant.route for applicant in self._undecided.values())]

    def has_route(self, route: bytes) -> bool:
        """Whether a worker is, or was last, behind it."""
        return any(member.route == route for member in self._members.values()) or any(
            applicant.route == route for applicant in self._undecided.values()
        )

    @property
    def is_linked(self) -> bool:
        """Whether every wanted worker is there and connected."""
        if any(len(self.live(role)) < count for role, count in self.plan.wanted.items()):
            return False
        return all(member.is_linked for member in self.live("attention"))

    @property
    def serving(self) -> dict[str, Member]:
        """Attention workers that requests may go to, by id."""
        if not self.num_lanes or any(member.state == "draining" for member in self.live("expert")):
            return {}
        members = self.live("attention")
        return {member.worker_id: member for member in members if member.is_linked and member.state == "ready"}

    def stats(self) -> tuple[WorkerStats, ...]:
        return tuple(
            WorkerStats(m.worker_id, m.role, m.pid, m.host, m.incarnation, m.state, m.status)
            for m in self._members.values()
        )

    def sentence(self, now: float) -> str:
        """What is waited for, by name."""
        waited = f"{now - self._started_at:.0f} s"
        for role, count in self.plan.wanted.items():
            there = {member.index for member in self.live(role)}
            missing = next((index for index in range(count) if index not in there), None)
            if missing is not None:
                lost = self._members.get(f"{role}-{missing}")
                why = f" ({lost.reason})" if lost is not None and lost.reason else ""
                if self._undecided:
                    num_missing = sum(self._num_free().values())
                    why += f" ({num_missing} missing, {len(self._undecided)} for any role here)"
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
        for known in self._members.values():
            if known.is_live and known.route == route and not known.has_beaten:
                return [Send(route, self._assignment(known))]  # it asked again before our answer came
        key = hello.process or route
        if self._has_choice(hello):
            if refusal := self._refusal(route, hello):
                return [Send(route, Refused(refusal))]
            self._undecided[key] = Applicant(route, hello, now)
            decided = self._decide(now)
            return decided if key not in self._undecided else [*decided, Send(route, Undecided())]
        self._undecided.pop(key, None)
        return [*self._take(route, hello, now), *self._decide(now)]

    def _take(self, route: bytes, hello: WorkerHello, now: float) -> list[Instruction]:
        """Makes a worker a member, or refuses it."""
        if refusal := self._refusal(route, hello):
            return [Send(route, Refused(refusal))]
        member = self._place(route, hello, now)
        if isinstance(member, str):
            return [Send(route, Refused(member))]
        instructions: list[Instruction] = []
        former = self._members.get(member.worker_id)
        if former is not None and former.is_live:  # its own earlier life
            instructions += self._lose(former, "it began a new life")
        self._members[member.worker_id] = member
        self._fingerprint = self._fingerprint or hello.fingerprint
        self._dtype = self._dtype or hello.dtype
        return [*instructions, Send(route, self._assignment(member))]

    def _decide(self, now: float) -> list[Instruction]:
        """Gives roles to the undecided as soon as nobody who may still come could want another."""
        instructions: list[Instruction] = []
        while self._undecided and not (self._is_open and len(self._undecided) < sum(self._num_free().values())):
            first = self._undecided.pop(next(iter(self._undecided)))
            instructions += self._take(first.route, first.hello, now)
        return instructions

    def ready(self, route: bytes, ready: WorkerReady) -> list[Instruction]:
        member = self._known(route, ready.worker_id, ready.incarnation)
        if member is None:
            return [Send(route, HelloAgain("the coordinator does not know this worker"))]
        member.state, member.address, member.num_blocks = "ready", ready.address, ready.num_blocks
        if member.role == "expert":
            return list(self._topology_to(*self.live("attention")))
        return list(self._topology_to(member))

    def linked(self, route: bytes, linked: Linked) -> list[Instruction]:
        member = self._known(route, linked.worker_id, linked.incarnation)
        if member is None:
            return []
        member.is_linked = linked.is_complete
        return self._lanes_to(member) if linked.is_complete else []

    def heartbeat(self, route: bytes, heartbeat: Heartbeat, now: float) -> list[Instruction]:
        member = self._known(route, heartbeat.worker_id, heartbeat.incarnation)
        if member is None:
            return [Send(route, HelloAgain("the coordinator does not know this worker (any more)"))]
        member.last_seen, member.status, member.has_beaten = now, heartbeat.status, True
        return [Send(route, HeartbeatAck())]

    def peer_lost(self, route: bytes, report: PeerLost) -> list[Instruction]:
        """An attention worker lost its link to an expert worker: that one is out until it says hello again."""
        if self._known(route, report.worker_id, report.incarnation) is None:
            return []
        peer = self._members.get(report.peer)
        if peer is None or not peer.is_live or peer.incarnation != report.peer_incarnation:
            return []
        return self._lose(peer, f"{report.worker_id} lost it: {report.reason}")

    def worker_failed(self, worker_id: str, reason: str) -> list[Instruction]:
        """A worker cannot do its work, and says so before it ends."""
        if not self._was_ready:
            self.failure = reason
        member = self._members.get(worker_id)
        return [] if member is None or not member.is_live else self._lose(member, reason)

    def draining(self, route: bytes, worker_id: str, incarnation: int) -> list[Instruction]:
        """A worker wants to end: an attention worker as soon as its requests have, an expert worker when all have."""
        member = self._known(route, worker_id, incarnation)
        if member is None:
            return [Send(route, Drain())]
        member.state = "draining"
        return [Send(route, Drain())] if member.role == "attention" else []

    def no_requests_left(self) -> list[Instruction]:
        """Nothing runs: expert workers that want to end may."""
        return [Send(member.route, Drain()) for member in self.live("expert") if member.state == "draining"]

    def goodbye(self, route: bytes, goodbye: Goodbye) -> list[Instruction]:
        member = self._known(route, goodbye.worker_id, goodbye.incarnation)
        return [] if member is None else self._lose(member, "it was drained")

    def use_lanes(self, num_lanes: int) -> list[Instruction]:
        """From now on this many micro-batches are in flight, on all attention workers."""
        self.num_lanes = num_lanes
        return [one for member in self.live("attention") if member.is_linked for one in self._lanes_to(member)]

    def tick(self, now: float) -> list[Instruction]:
        """Time has passed."""
        instructions: list[Instruction] = []
        for member in list(self._members.values()):
            silent_s = now - member.last_seen
            patience_s = self.plan.lost_after_s * (LOADING_PATIENCE if member.state == "loading" else 1)
            if member.is_live and silent_s > patience_s:
                instructions += self._lose(member, f"no sign of life for {silent_s:.1f} s")
        for key, applicant in list(self._undecided.items()):
            if now - applicant.last_seen > self.plan.lost_after_s * LOADING_PATIENCE:
                del self._undecided[key]
        self._was_ready |= bool(self.serving)
        if not self._was_ready and not self.failure and now - self._started_at > self.plan.start_timeout_s:
            self.failure = f"gave up after {self.plan.start_timeout_s:g} s: {self.sentence(now)}"
        return instructions

    # -- helpers -----------------------------------------------------------------------------------------------------

    def knows(self, route: bytes, worker_id: str, incarnation: int) -> bool:
        """Whether this is a live member's connection and its present life."""
        return self._known(route, worker_id, incarnation) is not None

    def _known(self, route: bytes, worker_id: str, incarnation: int) -> Member | None:
        member = self._members.get(worker_id)
        if member is None or not member.is_live or member.route != route or member.incarnation != incarnation:
            return None
        return member

    def _refusal(self, route: bytes, hello: WorkerHello) -> str:
        if hello.protocol_version != PROTOCOL_VERSION:
            return (
                f"worker speaks protocol version {hello.protocol_version}, the coordinator {PROTOCOL_VERSION}; "
                f"install the same version of msi on all hosts"
            )
        if hello.role not in ROLES:
            return f"role {hello.role!r} is not one; give {', '.join(ROLES)}"
        if self._fingerprint and hello.fingerprint != self._fingerprint and any(self._live_members()):
            return "its model differs from that of the other workers; give all of them the same model directory"
        if self._dtype and hello.dtype != self._dtype and self.plan.dtype != "auto":
            return f"it computes in {hello.dtype}, the instance in {self._dtype}; give all workers the same --dtype"
        known = self._members.get(hello.worker_id)
        is_same = known is not None and hello.process and hello.process == known.process
        if known is not None and known.is_live and known.route != route and not is_same:
            return (
                f"worker id {hello.worker_id} is live already (pid {known.pid} on {known.host}); "
                f"give another --worker-id, or end that one"
            )
        return ""

    def _num_free(self) -> dict[str, int]:
        """Places that nobody has, per role."""
        return {role: count - len(self.live(role)) for role, count in self.plan.wanted.items()}

    @property
    def _is_open(self) -> bool:
        """Whether roles are left to choose from. Once the instance has served, a place is filled by whoever comes."""
        return not self._was_ready and all(self._num_free().values())

    def _has_choice(self, hello: WorkerHello) -> bool:
        """Whether a worker may get either role: one that had a place before, here or by its id, gets that."""
        if hello.role != "worker" or not self._is_open or hello.worker_id in self._members:
            return False
        return all(_index_in(hello.worker_id, role) is None for role in self.plan.wanted)

    def _live_members(self) -> Iterator[Member]:
        return (member for member in self._members.values() if member.is_live)

    def _place(self, route: bytes, hello: WorkerHello, now: float) -> Member | str:
        """A place for a worker, or why there is none."""
        former = self._members.get(hello.worker_id)
        roles = [role for role in ("expert", "attention") if hello.role in (role, "worker")]
        if former is not None:
            roles = [role for role in roles if role == former.role]
        roles.sort(key=lambda role: _index_in(hello.worker_id, role) is None)
        for role in roles:
            taken = {member.index for member in self.live(role) if member is not former}
            free = [index for index in range(self.plan.wanted[role]) if index not in taken]
            if former is not None and former.index in free:
                free = [former.index]
            if not free:
                continue
            named = _index_in(hello.worker_id, role)
            index = named if named in free else free[0]
            worker_id = hello.worker_id or f"{role}-{index}"
            former = self._members.get(worker_id)
            incarnation = 0 if former is None else former.incarnation + 1
            return Member(worker_id, role, index, incarnation, route, hello.pid, hello.host, now, hello.process)
        wanted = self.plan.wanted.get(hello.role, sum(self.plan.wanted.values()))
        kind = "" if hello.role == "worker" else f"{hello.role} "
        if not wanted:
            return f"this instance has no {kind}workers of its own: it runs colocated"
        return f"all {wanted} {kind}workers of this instance are there already"

    def _assignment(self, member: Member) -> Assignment:
        plan = self.plan
        return Assignment(
            instance=plan.instance,
            worker_id=member.worker_id,
            role=member.role,
            index=member.index,
            incarnation=member.incarnation,
            placement=plan.placement,
            num_lanes=plan.num_lanes,
            slot_rows=plan.slot_rows,
            num_seats=2 * plan.num_attention + 2,
            dtype=self._dtype,
            max_model_len=plan.max_model_len,
            max_num_seqs=plan.max_num_seqs,
            max_num_batched_tokens=plan.max_num_batched_tokens,
            is_colocated=plan.is_colocated,
            memory_share=1 / plan.num_attention,
            peer_timeout_s=plan.peer_timeout_s,
            heartbeat_s=plan.heartbeat_s,
            lost_after_s=plan.lost_after_s,
            max_num_waiting=plan.max_num_waiting,
            has_prefix_cache=plan.has_prefix_cache,
            num_kv_blocks=plan.num_kv_blocks,
        )

    def _topology_to(self, *attention: Member) -> Iterator[Instruction]:
        experts = tuple(
            ExpertAddress(m.index, m.worker_id, m.incarnation, m.address)
            for m in [*self.live("expert"), *(attention if self.plan.is_colocated else ())]
            if m.state != "loading"
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

    def _lose(self, member: Member, reason: str) -> list[Instruction]:
        member.state, member.reason, member.is_linked = "lost", reason, False
        out = Send(member.route, HelloAgain(f"the coordinator gave it up: {reason}"))
        if member.role == "expert":
            return [out, *self._topology_to(*self.live("attention"))]
        fences = [Send(expert.route, Fence(member.worker_id)) for expert in self.live("expert")]
        return [out, Lost(member.worker_id, reason), *fences]


def _index_in(worker_id: str, role: str) -> int | None:
    """The index that a default id such as "expert-1" names."""
    prefix, _, number = worker_id.rpartition("-")
    return int(number) if prefix == role and number.isdecimal() else None


def _percent(status: WorkerStatus) -> str:
    return f"{100 * status.loaded_bytes / status.total_bytes:.0f} %" if status.total_bytes else "0 %"
