"""Changes of placement by values: who is told when, what goes back, and which change is due."""

from __future__ import annotations

from dataclasses import replace

import pytest

from msi.control import due_changes
from msi.control.due_changes import REPLICAS_AFTER, DueChanges
from msi.control.members import NO_STATUS, Member, Send, assignment
from msi.control.messages import Placed, UsePlacement
from msi.control.placing import Placing
from msi.control.size_watch import SizeWatch
from msi.placement import HOLE, Placement, place_evenly
from msi.placement_change import ByLayer, changed, padded, with_node
from msi.planner.pipeline import Stages
from msi.precision import Precision
from msi.types import Place, StageTimes
from tests.test_membership import PLAN

FIRST = padded(place_evenly(4, 2), 3)  # (0, 1), (2, 3), ()
FIRST_HELD = [{0, 1}, {2, 3}, set()]
GROWN = changed(FIRST, [{0}, {2, 3}, {1}])


def member(role, index, state="ready", **given):
    worker_id = f"{role}-{index}"
    return Member(worker_id, role, Place(index), 0, worker_id.encode(), 1, "here", 0.0, state=state, **given)


@pytest.fixture
def experts():
    return [member("expert", 0), member("expert", 1), member("expert", 2, "loading")]


@pytest.fixture
def attention():
    return [member("attention", 0), member("attention", 1)]


def sends(instructions):
    assert all(isinstance(one, Send) for one in instructions)
    return {one.route.decode(): one.message for one in instructions}


def say(placing, one, failure=""):
    placing.hear(one, Placed(one.worker_id, 0, placing.placement.version, placing.former is not None, failure))


def test_experts_are_told_first_then_attention_workers_and_experts_again_when_nothing_old_is_on_its_way(
    experts, attention
):
    placing = Placing(FIRST)
    placing.begin(GROWN, "a test")
    assert placing.used_by("attention") == (FIRST, None)
    assert placing.to(experts[0]) == [Send(b"expert-0", UsePlacement(GROWN, FIRST))]
    assert placing.to(experts[2]) == placing.to(attention[0]) == [], "it loads; it is not its turn"
    experts[0].follows_version, experts[0].follows_former = GROWN.version, True
    assert placing.to(experts[0]) == [], "it works on it"
    experts[0].follows_former = False
    assert placing.to(experts[0]), "that was another"
    experts[0].follows_version = 0
    for one in experts[:2]:
        assert placing.advance(experts, attention) == []
        say(placing, one)
    assert placing.stage == "loading", "the one that comes has not loaded its part"
    experts[2].state, experts[2].placement_version, experts[2].has_former = "ready", 1, True
    assert sends(placing.advance(experts, attention)) == {
        f"attention-{index}": UsePlacement(GROWN, None) for index in (0, 1)
    }
    assert placing.used_by("attention") == (GROWN, None)
    attention[0].placement_version = 1
    assert placing.advance(experts, attention) == []
    assert placing.to(attention[1]) == [Send(b"attention-1", UsePlacement(GROWN, None))], "told again"
    attention[1].placement_version = 1
    assert set(sends(placing.advance(experts, attention)).values()) == {UsePlacement(GROWN, None)}
    assert not placing.is_changing
    assert placing.to(experts[0]) == [Send(b"expert-0", UsePlacement(GROWN, None))], "until it says so"
    say(placing, experts[0])
    assert placing.to(experts[0]) == []
    assert GROWN.experts == ((0,), (2, 3), (1,))
    assert changed(GROWN, [{0, 2}, {3}, {1}]).experts == ((0, 2), (HOLE, 3), (1,))


def test_a_change_goes_back_when_a_worker_cannot_load_its_part(experts, attention):
    placing = Placing(FIRST)
    placing.begin(GROWN, "a test")
    say(placing, experts[0])
    say(placing, experts[1], "the memory that is free is too little")
    assert placing.failure == "expert-1: the memory that is free is too little"
    assert placing.placement == replace(FIRST, version=2)
    assert placing.former == FIRST
    for one in experts:
        one.state, one.placement_version, one.has_former = "ready", 2, True
    placing.advance(experts, attention)
    assert placing.stage == "swapping"
    for one in attention:
        one.placement_version = 2
    placing.advance(experts, attention)
    assert (placing.stage, placing.failure[:8]) == ("settled", "expert-1")


def test_a_change_goes_back_when_a_worker_is_lost_whose_experts_would_be_nowhere(experts, attention):
    placing = Placing(FIRST)
    placing.begin(GROWN, "a test")
    assert placing.advance(experts[1:], attention) == [], "expert 0 is nowhere either way"
    assert not placing.failure
    placing.advance(experts[:2], attention)
    assert placing.failure == "an expert worker was lost that was to hold experts [1]"


def test_an_expert_worker_holds_layer_by_layer_what_either_placement_has_for_it():
    crossed = changed(FIRST, ByLayer((FIRST_HELD, [*FIRST_HELD[1::-1], set()])))
    plan = replace(PLAN, placement=FIRST)

    def held(role, index, placement, former):
        return assignment(plan, member(role, index), Precision.of("float32"), placement, former).experts

    assert held("expert", 0, FIRST, None) == ((0, 1),)
    assert held("expert", 0, crossed, FIRST) == ((0, 1), (0, 1, 2, 3))
    assert held("expert", 0, crossed, None) == ((0, 1), (HOLE, HOLE, 2, 3))
    assert held("expert", 0, replace(FIRST, version=2), crossed) == ((0, 1), (0, 1, 2, 3)), "on the way back"
    assert held("expert", 2, crossed, FIRST) == held("attention", 0, crossed, FIRST) == ()


def test_attention_workers_that_load_do_not_hold_a_change_up(experts, attention):
    placing = Placing(FIRST)
    placing.begin(GROWN, "a test")
    for one in experts:
        one.state, one.placement_version, one.has_former = "ready", 1, True
    attention[1].state = "loading"
    placing.advance(experts, attention)
    attention[0].placement_version = 1
    placing.advance(experts, attention)
    assert not placing.is_changing


# -- which change is due -----------------------------------------------------------------------------------------------


def due(members, placement=FIRST, now=100.0, changes=None):
    found = (changes or DueChanges(5.0)).next(placement, members, now)
    return None if found is None else (found.remark, [set(one) for one in found.wanted])


def test_nothing_is_due_while_all_are_there():
    assert due([member("expert", 0), member("expert", 1)]) is None


def test_experts_of_a_worker_that_leaves_go_to_the_others():
    leaving = member("expert", 1, "draining")
    assert due([member("expert", 0), leaving]) == ("expert-1 leaves", [{0, 1, 2, 3}, set(), set()])


def test_a_worker_that_came_empty_gets_its_share():
    assert due([member("expert", 0), member("expert", 1), member("expert", 2)]) == (
        "expert-2 came", [{0}, {2, 3}, {1}],
    )  # fmt: skip


def test_experts_that_are_nowhere_are_loaded_elsewhere_but_their_worker_is_waited_for_first():
    lost = replace(member("expert", 1, "lost"), last_seen=98.0)
    assert due([member("expert", 0), lost]) is None
    assert due([member("expert", 0), lost], now=104.0) == (
        "experts 2, 3 are on no worker that lives", [{0, 1, 2, 3}, set(), set()],
    )  # fmt: skip
    assert due([member("expert", 0), member("expert", 1, "loading")], now=104.0) is None, "it is coming back"
    twice = Placement(((0, 1, 2, 3), (2, 3), ()), 4)
    assert due([member("expert", 0), lost], twice, now=104.0) is None, "another has them"
    lost.is_leaving = True
    assert due([member("expert", 0), lost], now=98.5) is not None, "it is not coming back"


def test_replicas_that_were_lost_with_their_worker_are_loaded_elsewhere_and_it_gets_its_share_when_it_comes():
    """Until the next plan of who rebalances, or for ever, their experts were on one worker alone."""
    three = Placement(((0, 1, 2), (2, 3, 0), (1, 3)), 4)
    changes = DueChanges(5.0, [2] * 4)
    lost = replace(member("expert", 1, "lost"), last_seen=98.0)
    there = [member("expert", 0), lost, member("expert", 2)]
    assert due(there, three, 98.0 + 5 * REPLICAS_AFTER - 1, changes) is None, "it may be started again"
    remark, wanted = due(there, three, 98.0 + 5 * REPLICAS_AFTER + 1, changes)
    assert (remark, wanted) == ("experts 0, 2, 3 have lost replicas", [{0, 1, 2, 3}, set(), {0, 1, 2, 3}])
    assert due(there, three, 200.0, changes) is None, "it came to nothing"
    after = changed(three, wanted)
    assert due(there, after, 200.0, DueChanges(5.0, [2] * 4)) is None
    lost.state = "ready"
    remark, wanted = due(there, after, 200.0, changes)
    assert remark == "expert-1 came"
    assert [len([held for held in wanted if expert in held]) for expert in range(4)] == [2] * 4
    assert due([member("expert", 0), lost], Placement(((0, 1), (0, 1)), 2), 200.0, DueChanges(5.0, [2, 2])) is None
    lost.state = "lost"
    assert due([member("expert", 0), lost], Placement(((0, 1), (0, 1)), 2), 200.0, DueChanges(5.0, [2, 2])) is None


def test_what_changes_nothing_is_found_out_once(monkeypatch):
    calls = []
    monkeypatch.setattr(due_changes, "with_node", lambda *given: calls.append(given) or with_node(*given))
    changes, single = DueChanges(5.0), Placement(((0,), (1,), ()), 2)
    members = [member("expert", 0), member("expert", 1), member("expert", 2)]
    for _ in range(3):
        assert due(members, single, changes=changes) is None
    assert len(calls) == 1
    assert due(members, replace(single, version=1), changes=changes) is None
    assert len(calls) == 2, "of another placement it is not known"


def test_what_came_to_nothing_is_tried_again_once_somebody_has_come_or_gone():
    changes = DueChanges(5.0)
    leaving = member("expert", 1, "draining")
    members = [member("expert", 0), leaving]
    assert not changes.is_stuck(FIRST, leaving, members)
    assert due(members, changes=changes) is not None
    assert due(members, changes=changes) is None
    assert changes.is_stuck(FIRST, leaving, members)
    members.append(member("expert", 2, "loading"))
    assert due(members, changes=changes) is not None
    assert DueChanges(5.0).is_stuck(FIRST, leaving, [leaving]), "nobody is there to take its experts"


# -- another number of workers -----------------------------------------------------------------------------------------


def timed(role, index, **times):
    return replace(member(role, index), status=replace(NO_STATUS, times=StageTimes(**times)))


def test_what_another_number_of_workers_means_is_said_once_and_not_at_once():
    watch = SizeWatch()
    attention = [timed("attention", 0, attention_s=2e-3, comm_s=1e-4)]
    experts = [timed("expert", index, expert_s=1e-3) for index in (0, 1)]
    assert watch.look(attention, experts[:1], 0, 0.0) is watch.look(attention, experts[:1], 2, 1.0) is None
    assert watch.look(attention, experts, 2, 2.0) is watch.look(attention, experts, 2, 11.0) is None
    sentence, stages = watch.look(attention, experts, 2, 12.1)
    assert stages == Stages(2e-3, 1e-3, 1e-4)
    assert sentence == (
        "1 attention and 2 expert workers serve, not 1 and 1: T_a 2.00 ms, T_e 1.00 ms, T_c 0.10 ms; expert workers "
        "wait: one more attention worker, or one expert worker less, would balance them; m=2 hides the round trip, "
        "m=2 runs"
    )
    assert watch.look(attention, experts, 2, 30.0) is None
