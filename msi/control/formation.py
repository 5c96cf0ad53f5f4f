"""Who gets which place of an instance, who waits for one, and who is refused. Knows no sockets or clock.

A worker that wants a place which another holds is refused only once that one has been heard of since: where it is dead
and nobody has noticed yet, the new one takes its place as soon as somebody has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from msi.control.members import Applicant, Member
from msi.control.messages import PROTOCOL_VERSION, WorkerHello
from msi.control.roster import Roster
from msi.errors import shown
from msi.precision import AUTO
from msi.types import Place

MAX_APPLICANTS = 1024
MAX_TEXT_CHARS = 256  # of each that a hello brings: they stand in logs and sentences
ROLES = ("attention", "expert", "worker")


@dataclass(frozen=True, slots=True)
class Refusal:
    """Decision: this applicant gets no place."""

    route: bytes
    reason: str


@dataclass(frozen=True, slots=True)
class Joining:
    """Decision: there is to be one place more, for this applicant: the next decision gives it to it."""

    role: str
    index: int


@dataclass(frozen=True, slots=True)
class _Taken:
    """There is no place as long as these live."""

    holders: tuple[Member, ...]
    reason: str


class Formation:
    """The applicants for places.

    Args:
        roster: whoever is given a place is entered there by whoever owns this.
        why_not_yet: why an expert worker cannot come to this place now, "" where it can.
    """

    def __init__(self, roster: Roster, why_not_yet: Callable[[int], str]) -> None:
        self.has_served = False  # then a place is filled by whoever comes
        self.first_incarnation = 0  # of those who were not heard of before
        self._why_not_yet = why_not_yet
        asked = roster.plan.precision
        is_open = asked.is_open or asked.quantization == AUTO
        self.precision = None if is_open else asked.resolved(asked.compute)  # else that of the first worker
        self._roster = roster
        self._members = roster.members
        self._fingerprint = ""
        self._products = ""
        self._applicants: dict[str | bytes, Applicant] = {}  # by process, in order of arrival

    @property
    def routes(self) -> list[bytes]:
        """To those who wait."""
        return [applicant.route for applicant in self._applicants.values()]

    @property
    def num_undecided(self) -> int:
        """Workers for any role that wait for others to come."""
        return sum(self._has_choice(applicant.hello) for applicant in self._applicants.values())

    @property
    def num_free(self) -> int:
        """Places that nobody has."""
        return sum(self._num_free().values())

    def objection(self, hello: WorkerHello) -> str:
        """Why a worker can have no place at all here, "" where it can."""
        if hello.protocol_version != PROTOCOL_VERSION:
            return (
                f"worker speaks protocol version {hello.protocol_version}, the coordinator {PROTOCOL_VERSION}; "
                f"install the same version of msi on all hosts"
            )
        for name in ("worker_id", "host", "fingerprint", "process", "products"):
            text = getattr(hello, name)
            if len(text) > MAX_TEXT_CHARS or not text.isprintable():
                return f"its {name} {shown(text)} is not one; give at most {MAX_TEXT_CHARS} printable characters"
        if hello.role not in ROLES:
            return f"role {shown(hello.role)} is not one; give {', '.join(ROLES)}"
        if len(self._applicants) >= MAX_APPLICANTS:
            return f"{len(self._applicants)} workers ask for a place already"
        is_anyone_there = any(member.is_live for member in self._members.values())
        if self._fingerprint and hello.fingerprint != self._fingerprint and is_anyone_there:
            return "its model differs from that of the other workers; give all of them the same model directory"
        if hello.precision != hello.precision.resolved(hello.precision.compute) or hello.precision.is_open:
            return (
                f"it leaves open what it computes in ({hello.precision}); install the same version of msi on all hosts"
            )
        asked, held = self._roster.plan.precision, hello.precision.quantization
        if asked.quantization != AUTO:
            wanted = asked.quantization
        else:
            wanted = held if self.precision is None else self.precision.quantization
        if held != wanted:
            return f"it holds weights with `quantization` {held}, the instance with {wanted}; give all workers the same"
        in_eight_bits = hello.precision.in_eight_bits
        for name, is_wanted in asked.in_eight_bits.items():
            if in_eight_bits[name] != is_wanted:
                kinds = ("another", "fp8") if is_wanted else ("fp8", "another")
                return f"it has `{name}` {kinds[0]}, the instance {kinds[1]}; give all workers the same"
        if hello.products and self._products and hello.products != self._products and is_anyone_there:
            return (
                f"it multiplies by {hello.products}, the instance's other CPUs by {self._products}, and results would "
                "be rounded differently; install g++ on all of these hosts, or on none"
            )
        if not asked.is_open and hello.precision != (wanted_all := asked.resolved(asked.compute, wanted)):
            return f"it computes in {hello.precision}, the instance in {wanted_all}; give all workers the same `dtype`"
        return ""

    def apply(self, route: bytes, hello: WorkerHello, now: float) -> None:
        """Puts a worker in line; one that was there already keeps its place in it."""
        key = hello.process or route
        former = self._applicants.get(key)
        self._applicants[key] = Applicant(route, hello, now if former is None else former.asked_at, now)

    def waits_for(self, hello: WorkerHello, route: bytes) -> str:
        """What an applicant waits for; "" where it does not wait."""
        applicant = self._applicants.get(hello.process or route)
        if applicant is None:
            return ""
        if self._has_choice(hello):
            return "waiting for other workers: the role that they leave is this one's"
        taken = self._place(applicant, 0.0)
        if isinstance(taken, str):
            return taken
        assert isinstance(taken, _Taken), taken
        return f"waiting for a sign of life of {', '.join(holder.worker_id for holder in taken.holders)}"

    def recognise(self, hello: WorkerHello, first_incarnation: int) -> None:
        """A worker has a place already, from the coordinator before; whoever comes anew is of a later life than any."""
        self.has_served = True
        self.first_incarnation = first_incarnation
        self._fingerprint = self._fingerprint or hello.fingerprint
        self._products = self._products or hello.products
        self.precision = self.precision or hello.precision

    def settle(self, now: float) -> Iterator[Member | Refusal | Joining]:
        """Decides about those for whom it is time; each has to be carried out before the next is taken."""
        while (decision := self._next_decision(now)) is not None:
            yield decision

    def forget(self, heard_before: float, pid: int = 0) -> None:
        """Those who have not asked since are gone, and those of a process that ended."""
        for key, applicant in list(self._applicants.items()):
            if applicant.last_seen < heard_before or (pid and applicant.hello.pid == pid):
                del self._applicants[key]

    def excuse(self, late_s: float) -> None:
        """We were late ourselves by so much."""
        for applicant in self._applicants.values():
            applicant.last_seen += late_s

    # -- decisions ---------------------------------------------------------------------------------------------------

    def _next_decision(self, now: float) -> Member | Refusal | Joining | None:
        is_short = self._is_open and self.num_undecided < self.num_free
        for key, applicant in self._applicants.items():
            if is_short and self._has_choice(applicant.hello):
                continue
            decision: Member | Refusal
            if objection := self.objection(applicant.hello):
                decision = Refusal(applicant.route, objection)
            else:
                placed = self._place(applicant, now)
                if isinstance(placed, str):
                    continue
                if isinstance(placed, Member):
                    decision = placed
                    self._fingerprint = self._fingerprint or applicant.hello.fingerprint
                    self._products = self._products or applicant.hello.products
                    self.precision = self.precision or applicant.hello.precision
                elif not self._are_heard(placed.holders, since=applicant.asked_at):
                    continue
                elif (joining := self._room_for(applicant)) is not None:
                    return joining
                else:
                    decision = Refusal(applicant.route, placed.reason)
            del self._applicants[key]
            return decision
        return None

    def _are_heard(self, holders: tuple[Member, ...], since: float) -> bool:
        """What was read with the hello may have lain there as long as it: half a beat later it has not."""
        return all(holder.heard_at >= since + self._roster.plan.timeouts.heartbeat_s / 2 for holder in holders)

    def _num_free(self) -> dict[str, int]:
        return {role: count - len(self._roster.live(role)) for role, count in self._roster.plan.wanted.items()}

    @property
    def _is_open(self) -> bool:
        """Whether roles are left to choose from."""
        return not self.has_served and all(self._num_free().values())

    def _has_choice(self, hello: WorkerHello) -> bool:
        """Whether a worker may get either role: one that had a place before, here or by its id, gets that."""
        if hello.role != "worker" or not self._is_open or hello.worker_id in self._members:
            return False
        return all(_index_in(hello.worker_id, role) is None for role in self._roster.plan.wanted)

    def _room_for(self, applicant: Applicant) -> Joining | None:
        """A place that there may be for a worker besides those that are wanted; its role has to be clear."""
        role, worker_id = applicant.hello.role, applicant.hello.worker_id
        former = self._members.get(worker_id)
        if not self.has_served or role == "worker" or (former is not None and (former.is_live or former.role != role)):
            return None
        places = self._roster.plan.wanted_places[role]
        taken = {*places, *(member.place.index for member in self._roster.live(role))}
        free = [index for index in range(self._roster.plan.most[role]) if index not in taken]
        if not free or len(places) >= self._roster.plan.most[role]:
            return None
        named = _index_in(worker_id, role)
        return Joining(role, named if named in free else free[0])

    def _place(self, applicant: Applicant, now: float) -> Member | _Taken | str:
        """A place for a worker, why there is none, or (as text) what it waits for."""
        route, hello = applicant.route, applicant.hello
        former = self._members.get(hello.worker_id)
        is_same = former is not None and (former.route == route or (hello.process and hello.process == former.process))
        if former is not None and former.is_live and not is_same:
            return _Taken(
                (former,),
                f"worker id {hello.worker_id} is live already (pid {former.pid} on {former.host}); "
                f"give another `worker_id`, or end that one",
            )
        roles = [role for role in ("expert", "attention") if hello.role in (role, "worker")]
        if former is not None:
            roles = [role for role in roles if role == former.role]
        roles.sort(key=lambda role: _index_in(hello.worker_id, role) is None)
        for role in roles:
            taken = {member.place.index for member in self._roster.live(role) if member is not former}
            free = [index for index in self._roster.plan.wanted_places[role] if index not in taken]
            if former is not None and former.place.index in free:
                free = [former.place.index]
            if not free:
                continue
            named = _index_in(hello.worker_id, role)
            index = named if named in free else free[0]
            if role == "expert" and (why := self._why_not_yet(index)):
                return why
            worker_id = hello.worker_id or f"{role}-{index}"
            former = self._members.get(worker_id)
            incarnation = self.first_incarnation if former is None else former.incarnation + 1
            place = Place.at(index, self._roster.plan.ranks[role])
            return Member(
                worker_id, role, place, incarnation, route, hello.pid, hello.host, now, hello.process, heard_at=now
            )
        wanted = self._roster.plan.wanted.get(hello.role, sum(self._roster.plan.wanted.values()))
        kind = "" if hello.role == "worker" else f"{hello.role} "
        if not wanted:
            return _Taken((), f"this instance has no {kind}workers of its own: it runs colocated")
        holders = tuple(member for role in roles for member in self._roster.live(role))
        return _Taken(holders, f"all {wanted} {kind}workers of this instance are there already")


def _index_in(worker_id: str, role: str) -> int | None:
    """The index that a default id such as "expert-1" names."""
    prefix, _, number = worker_id.rpartition("-")
    return int(number) if prefix == role and number.isdecimal() and len(number) < 10 else None
