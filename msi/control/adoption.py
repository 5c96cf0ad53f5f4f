"""Whether a worker that served under the coordinator before may go on, and as whom; what it keeps for that. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

from msi.control.members import InstancePlan, Member, assignment
from msi.control.messages import Account, Standing


def why_not_adopted(account: Account, plan: InstancePlan, members: Mapping[str, Member]) -> str:
    """Why it has to begin anew; "" where it goes on.

    Args:
        plan: of the new coordinator; as long as it has no members, its token and placement are open.
        members: that it has so far.
    """
    given = account.assignment
    if members and given.instance != plan.instance:
        return "it served another instance"
    if given.place.index >= max(plan.most[given.role], plan.wanted[given.role]):
        return f"there is room for {plan.most[given.role]} {given.role} workers in the instance as it is now"
    former = members.get(given.worker_id)
    if former is not None:
        return "the coordinator knew it already, and gave it up"
    held_by = next(
        (one for one in members.values() if one.is_live and (one.role, one.place) == (given.role, given.place)), None
    )
    if held_by is not None:
        return f"{held_by.worker_id} has its place"
    shape = (account.placement.num_nodes, account.placement.num_experts)
    if shape != (plan.placement.num_nodes, plan.placement.num_experts):
        return "experts are placed on another number of workers now"
    if len({1, len(account.placement.layers), len(plan.placement.layers)}) > 2:
        return "experts are placed in another number of layers now"
    wanted = replace(plan, instance=given.instance, timeouts=given.timeouts)
    would_be = assignment(wanted, adopted(b"", account, 0.0), account.hello.precision, given.placement, given.former)
    if replace(would_be, memory_share=given.memory_share, term=given.term) != given:  # a share of as many as were there
        return "the coordinator was started with other options"
    return ""


def adopted(route: bytes, account: Account, now: float) -> Member:
    """The member that it goes on as."""
    given, hello, ready, standing = account.assignment, account.hello, account.ready, account.standing
    is_asked = standing is not None and standing.is_leaving
    return Member(
        given.worker_id, given.role, given.place, given.incarnation,
        route, hello.pid, hello.host, now, hello.process,
        state="draining" if account.is_draining or is_asked else "ready",
        heard_at=now,
        address=ready.address,
        num_blocks=ready.num_blocks,
        is_linked=account.is_linked,
        has_lanes=bool(account.num_lanes),
        has_beaten=True,
        num_acks=max(0, account.acked),
        num_passes=account.num_passes,
        placement_version=account.placement.version,
        is_leaving=account.is_draining or is_asked,
        leaves_by=math.inf if standing is None or not is_asked else now + standing.leaves_in_s,
    )  # fmt: skip


def standing_of(member: Member, plan: InstancePlan, now: float) -> Standing | None:
    """What a member keeps for the coordinator after this one; None where it is as at the start."""
    if not (plan.num_changes or member.is_leaving):
        return None
    places, leaves_in_s = plan.wanted_places, max(0.0, member.leaves_by - now)
    return Standing(plan.num_changes, places["attention"], places["expert"], member.is_leaving, leaves_in_s)


def with_places_of(standing: Standing, plan: InstancePlan, members: Iterable[Member]) -> InstancePlan:
    """What the coordinator before wanted; who is here is wanted, too."""
    places = {"attention": standing.attention, "expert": standing.expert}
    for one in members:
        if one.is_live:
            places[one.role] = tuple(sorted({*places[one.role], one.place.index}))
    return replace(plan, places=places, num_changes=max(plan.num_changes, standing.num_changes))
