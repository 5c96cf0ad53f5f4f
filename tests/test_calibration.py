"""Measuring stages on all attention workers: what is cut short is asked again, and decides nothing."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from msi.control.calibration import AGAIN_AFTER_S, ANSWER_TIMEOUT_S, Calibration
from msi.control.lane_choice import LaneChoice
from msi.control.messages import Calibrated, CalibrationCutShort
from msi.planner.pipeline import Stages
from msi.types import StageTimes

LIVES = {"attention-0": 0, "attention-1": 0}
HALVES = {1: StageTimes(2e-3, 2e-3, 1e-3), 2: StageTimes(1e-3, 1e-3, 1e-3), 3: StageTimes(0.8e-3, 0.8e-3, 1e-3),
          4: StageTimes(0.7e-3, 0.7e-3, 1e-3)}  # fmt: skip


def calibration():
    return Calibration(64, 8)


def answer(calibration, asked, incarnation=0):
    for worker_id, order in asked:
        calibration.answered(Calibrated(worker_id, incarnation, order.order, HALVES[order.num_lanes]))


def finish(calibration, lives, now):
    while not calibration.is_done:
        answer(calibration, calibration.ask(lives, now))
        now += 1.0
    return calibration.choice()


def test_each_step_is_asked_of_all_and_the_best_is_chosen():
    one = calibration()
    asked = one.ask(LIVES, 0.0)
    assert [(worker_id, order.num_lanes, order.num_seqs) for worker_id, order in asked] == [
        ("attention-0", 1, 32), ("attention-1", 1, 32),
    ]  # fmt: skip
    assert one.ask(LIVES, 1.0) == [], "it is out already"
    answer(one, asked[:1])
    assert one.ask(LIVES, 1.0) == []
    answer(one, asked[1:])
    assert [order.num_lanes for _, order in one.ask(LIVES, 1.0)] == [2, 2]
    chosen, why = finish(calibration(), LIVES, 0.0)
    assert chosen > 1, why


def test_a_step_that_is_cut_short_is_said_and_asked_again_and_leaves_the_choice_as_it_was():
    """It used to cost a minute, and then to pin one micro-batch."""
    undisturbed, _ = finish(calibration(), LIVES, 0.0)
    one = calibration()
    (first, second) = one.ask(LIVES, 0.0)
    one.cut_short(CalibrationCutShort(first[0], 0, first[1].order, "expert-0: connection lost"), 0.5)
    assert "expert-0: connection lost" in one.note
    answer(one, [second])  # late: that order came to nothing
    assert one.ask(LIVES, 0.5) == []
    again = one.ask(LIVES, 0.5 + AGAIN_AFTER_S)
    assert [order.num_lanes for _, order in again] == [1, 1]
    assert not {order.order for _, order in again} & {first[1].order, second[1].order}
    answer(one, again)
    assert one.note == ""
    assert finish(one, LIVES, 2.0)[0] == undisturbed


def test_a_worker_in_another_life_and_an_answer_that_never_comes_are_asked_again():
    one = calibration()
    asked = one.ask(LIVES, 0.0)
    reborn = LIVES | {"attention-1": 1}
    assert one.ask(reborn, 1.0) == []
    again = one.ask(reborn, 1.0 + AGAIN_AFTER_S)
    answer(one, asked)
    assert one.ask(reborn, 2.0) == [], "answers of another life, or to another question, count for nothing"
    assert one.ask(reborn, 2.0 + ANSWER_TIMEOUT_S) == []
    assert "no answer" in one.note
    assert len(one.ask(reborn, 3.0 + ANSWER_TIMEOUT_S)) == len(again) == 2


@given(st.lists(st.sampled_from(["answer", "cut short", "other life", "silence"]), max_size=40))
def test_whatever_happens_on_the_way_the_choice_is_that_of_an_undisturbed_one(events):
    undisturbed, _ = finish(calibration(), LIVES, 0.0)
    one, now, lives, asked = calibration(), 0.0, dict(LIVES), []
    for event in events:
        now += 1.0
        asked = one.ask(lives, now) or asked
        if not asked or one.is_done:
            continue
        worker_id, order = asked[0]
        if event == "answer":
            for name, each in asked:
                one.answered(Calibrated(name, lives[name], each.order, HALVES[each.num_lanes]))
        elif event == "cut short":
            one.cut_short(CalibrationCutShort(worker_id, lives[worker_id], order.order, "x"), now)
        elif event == "other life":
            lives[worker_id] += 1
        else:
            now += ANSWER_TIMEOUT_S + 1
    while not one.is_done:
        now += 1.0
        for worker_id, order in one.ask(lives, now):
            one.answered(Calibrated(worker_id, lives[worker_id], order.order, HALVES[order.num_lanes]))
    assert one.choice()[0] == undisturbed


def test_the_choice_is_made_again_from_stages_as_they_are_with_another_number_of_workers():
    one = calibration()
    chosen, _ = finish(one, LIVES, 0.0)
    then = Stages(*(getattr(HALVES[chosen], name) for name in ("attention_s", "expert_s", "comm_s")))
    assert one.choice_now(chosen, then) == (
        chosen,
        f"{chosen} micro-batches stay: another number would gain less than 5 %",
    )
    slower_experts = Stages(then.attention_s, 8 * then.expert_s, then.comm_s)
    now, why = one.choice_now(chosen, slower_experts)
    assert now < chosen, why
    assert one.choice_now(chosen, Stages(0.0, 0.0, 0.0)) is None
    assert calibration().choice_now(2, then) is None, "nothing was measured"


@pytest.mark.parametrize(
    ("hosts", "is_said"), [(("a", "a"), True), (("a", "b"), False), (("a", "a", "a"), False)], ids=str
)
def test_the_log_says_whether_one_process_would_be_better_where_it_could_be_that(hosts, is_said, caplog):
    names = ["attention-0", "expert-0", "expert-1"]
    workers = [
        SimpleNamespace(worker_id=name, incarnation=0, route=b"x", host=host)
        for name, host in zip(names, hosts, strict=False)
    ]
    by_role = {"attention": workers[:1], "expert": workers[1:]}
    cluster = SimpleNamespace(num_lanes=0, is_linked=True, live=by_role.get, use_lanes=lambda chosen: [chosen])
    limits = SimpleNamespace(max_num_seqs=64, max_num_batched_tokens=64)
    choice = LaneChoice(SimpleNamespace(is_colocated=False, limits=limits), 0, 8)
    with caplog.at_level(logging.INFO):
        now = 0.0
        while (follows := choice.next(cluster, now)) and not isinstance(follows[0], int):
            (order,) = (one.message for one in follows)
            choice.hear(Calibrated("attention-0", 0, order.order, HALVES[order.num_lanes]), now)
            now += 1.0
    assert follows == [finish(calibration(), LIVES, 0.0)[0]]
    assert ("both workers are on one host" in caplog.text) is is_said
