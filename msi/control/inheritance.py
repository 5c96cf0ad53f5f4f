"""What one coordinator of an instance has from the one before: workers that go on as they are, and wanted places.

Decides; does not act. A worker that is none of ours is asked for its account, and goes on where that fits
(`msi.control.adoption`); until all have come that may, nobody hears who is there (`msi.control.arrivals`). Requests are
`msi.control.takeover`'s. And the other way: workers tell that they follow a coordinator that came after this one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from msi.control.adoption import adopted, why_not_adopted, with_places_of
from msi.control.arrivals import Arrivals
from msi.control.expert_places import ExpertPlaces
from msi.control.formation import Formation
from msi.control.members import Instruction, Send
from msi.control.messages import Account, AccountWanted, Adopted, Drain
from msi.control.roster import Roster
from msi.control.succession import next_term
from msi.types import Place

ASKED_AGAIN_S = 0.5
LIVES_PER_TERM = 4097  # whoever comes anew to a coordinator is of a later life than any that the one before knew
LEAVES_WITHIN_S = 60.0  # where nobody knows how long it was given


class Inheritance:
    """At one coordinator.

    Args:
        roster: adopted workers are entered there, and what they say of places.
        formation: hears of workers that have a place already.
        places: hear of the placement that workers use.
        now: when the coordinator began.

    Attributes:
        superseded_by: the term of a coordinator that took over from this one, 0 for none.
    """

    def __init__(self, roster: Roster, formation: Formation, places: ExpertPlaces, now: float) -> None:
        self.superseded_by = 0
        self._roster = roster
        self._formation = formation
        self._places = places
        self._arrivals = Arrivals(now)
        self._asked: dict[bytes, float] = {}  # who was asked for an account, and when
        self._places_known = 0  # changes of places, of which workers told that they took over
        self._launched: dict[str, int] = {}  # workers that a launcher keeps running, by role, as it said at the start
        self._forgotten: frozenset[str] = frozenset()  # by whoever starts workers here
        formation.first_incarnation = roster.plan.term * LIVES_PER_TERM

    @property
    def is_under_way(self) -> bool:
        """Workers of the coordinator before have come, and others may."""
        return self._arrivals.is_taking_over

    def awaits(self, role: str, now: float) -> bool:
        """Whether workers of the coordinator before may still come."""
        roster = self._roster
        num_missing = roster.plan.wanted[role] - len(roster.live(role))
        return self._arrivals.awaits(now, role=role, known=roster.members, num_missing=num_missing)

    # -- events ------------------------------------------------------------------------------------------------------

    def launched(self, serving: Collection[str], running: Mapping[str, int], forgotten: Collection[str] = ()) -> None:
        """Whoever starts workers here says what there is at the start of this coordinator.

        Args:
            serving: workers that served the coordinator before, and live.
            running: how many of each role there are to be: more places, that nobody has, are not wanted.
            forgotten: workers that were to leave the coordinator before: they are not started again.
        """
        self._arrivals.expects(serving)
        self._launched, self._forgotten = dict(running), frozenset(forgotten)
        self._want_no_more()

    def ended(self, worker_id: str) -> None:
        """The launcher saw its process end."""
        self._arrivals.ended(worker_id)
        if worker_id in self._forgotten and worker_id not in self._roster.members:  # nobody is to come in its place
            role = worker_id.rpartition("-")[0]
            self._launched[role] = self._launched.get(role, 1) - 1
            self._want_no_more()

    def who_are_you(self, route: bytes, worker_id: str, now: float, *, follows: int = 0) -> list[Instruction]:
        """To a worker that is none of ours (any more): one of the coordinator before may go on as it is.

        Args:
            follows: the term of its coordinator, where it said so.
        """
        if worker_id in self._roster.members:
            if follows > self._roster.plan.term:
                self.superseded_by = follows  # what is known of it here is of long ago
                return []
            return [self._roster.begin_anew(route, "the coordinator does not know this worker (any more)")]
        if now - self._asked.get(route, -ASKED_AGAIN_S) < ASKED_AGAIN_S:
            return []  # what it said while there was no coordinator comes all at once
        self._asked[route] = now
        return [Send(route, AccountWanted())]

    def adopt(self, route: bytes, account: Account, now: float) -> list[Instruction]:
        """A worker of the coordinator before goes on as it is, where that fits; else it begins a new life."""
        given, roster, formation = account.assignment, self._roster, self._formation
        if roster.member(route, given.worker_id, given.incarnation) is not None:
            return [Send(route, Adopted(roster.plan.term))]
        if roster.has_exited(account.hello.pid):
            return []
        is_first = not (self._arrivals.num_came or formation.has_served)
        members = {} if is_first else roster.members
        term = roster.plan.term
        roster.plan = replace(roster.plan, term=max(term, next_term(account.term, term)))
        if objection := formation.objection(account.hello) or why_not_adopted(account, roster.plan, members):
            return [roster.begin_anew(route, objection)]
        instructions: list[Instruction] = []
        if is_first:  # who came before it has an instance of its own, and a life that others may know of an earlier one
            early = [one for one in roster.members.values() if one.is_live]
            instructions += [roster.begin_anew(one.route, "it came before those who serve") for one in early]
            roster.members.clear()
            roster.plan = replace(roster.plan, instance=given.instance)
        self._places.placing.adopt(account.placement, is_first=is_first)
        if (standing := account.standing) is not None and standing.num_changes > self._places_known:
            self._places_known = standing.num_changes
            roster.plan = with_places_of(standing, roster.plan, roster.members.values())
        roster.plan = roster.plan.with_place(given.role, given.place.index)
        formation.recognise(account.hello, roster.plan.term * LIVES_PER_TERM)
        member = roster.members[given.worker_id] = adopted(route, account, now)
        if given.worker_id in self._forgotten and not member.is_leaving:
            member.state, member.is_leaving, member.leaves_by = "draining", True, now + LEAVES_WITHIN_S
        if member.state == "draining" and member.role == "attention":
            instructions.append(Send(route, Drain()))  # it may not have heard
        self._arrivals.came(now)
        roster.num_lanes = roster.num_lanes or account.num_lanes
        return [*instructions, Send(route, Adopted(roster.plan.term))]

    # -- time --------------------------------------------------------------------------------------------------------

    def excuse(self, late_s: float) -> None:
        """We were late ourselves by so much."""
        self._arrivals.excuse(late_s)

    def is_over(self, now: float) -> bool:
        """Whether all have come, or are late, since this was asked last: those who are there may hear who is."""
        self._asked = {route: at for route, at in self._asked.items() if now - at < ASKED_AGAIN_S}
        if not self.is_under_way or any(self.awaits(role, now) for role in self._roster.plan.wanted):
            return False
        self._arrivals.over()
        self._want_no_more()
        self._places.begin_anew(now)
        return True

    def _want_no_more(self) -> None:
        """Places that have experts are somebody's, though nobody is there."""
        roster, placing = self._roster, self._places.placing
        held = {role: {member.place.index for member in roster.live(role)} for role in roster.plan.wanted}
        ranks = roster.plan.expert_ranks
        held["expert"] |= {
            index for index in roster.plan.wanted_places["expert"] if placing.holds_any(Place.at(index, ranks).node)
        }
        roster.plan = roster.plan.at_most(self._launched, held)
