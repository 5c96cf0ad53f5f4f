"""What an instance waits for, in words: who is missing, loads, or is not connected, by name."""

from __future__ import annotations

from msi.control.formation import Formation
from msi.control.roster import Roster
from msi.control.worker_status import WorkerStatus


def sentence(roster: Roster, formation: Formation, waited_s: float, *, is_linked: bool, is_serving: bool) -> str:
    """The first thing that it waits for; "ready" where it waits for nothing."""
    waited = f"{waited_s:.0f} s"
    for role, places in roster.plan.wanted_places.items():
        there, count = {member.place.index for member in roster.live(role)}, len(places)
        missing = next((number for number, index in enumerate(places) if index not in there), None)
        if missing is not None:
            lost = roster.members.get(f"{role}-{places[missing]}")
            why = f" ({lost.reason})" if lost is not None and lost.reason else ""
            if num_undecided := formation.num_undecided:
                why += f" ({formation.num_free} missing, {num_undecided} for any role here)"
            return f"waiting for {role} worker {missing + 1} of {count}{why}, {waited}"
    loading = [member for role in roster.plan.wanted for member in roster.live(role) if member.state == "loading"]
    if loading:
        shares = ", ".join(f"{member.worker_id} {_percent(member.status)}" for member in loading)
        return f"loading weights: {shares}, {waited}"
    if not is_linked:
        apart = next(member.worker_id for member in roster.live("attention") if not member.is_linked)
        return f"waiting for {apart} to connect to the expert workers, {waited}"
    if not roster.num_lanes:
        return f"measuring stages to choose the number of micro-batches, {waited}"
    return "ready" if is_serving else "draining"


def _percent(status: WorkerStatus) -> str:
    return f"{100 * status.loaded_bytes / status.total_bytes:.0f} %" if status.total_bytes else "0 %"
