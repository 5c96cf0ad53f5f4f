"""Drift: measured stage times against the plan's, decided from values, and seen by the coordinator itself."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest

from msi.planner.choose import best_plans, costs_of
from msi.planner.drift import MIN_PASSES, Drift, DriftWatch, Observation
from msi.planner.plan_file import PlanFile
from msi.simulator.deployment import Fault
from msi.simulator.planned import deployment_of_plan
from msi.simulator.simulation import simulate
from msi.simulator.workload import fixed_lengths, poisson
from msi_launch.plan_arguments import parse


@pytest.fixture(scope="module")
def file() -> PlanFile:
    arguments = "mixtral-8x7b --gpu h200:6 --tpot-ms 50 --max-batch 64 --micro-batches 2 --runnable"
    task = parse(arguments.split()).task
    return PlanFile(best_plans(task, num_plans=1)[0], task, "")


def seen(
    file: PlanFile, passes: float, *, expert: float = 1.0, attention: float = 1.0, share: float = 1.0
) -> list[Observation]:
    """First heartbeats after so many passes of the plan's micro-batches (or a share of them), stages so much slower."""
    plan, model = file.plan, file.task.model
    size = round(plan.micro_batch * share)
    context = size * round(file.task.workload.mean_len)
    costs = costs_of(file.task, plan)
    rows = size * plan.num_attention_nodes * model.top_k * plan.experts_per_node / model.num_experts
    t_a, t_e = costs.attention_s(size, context), costs.expert_s(rows, plan.experts_per_node)
    turns = passes * plan.num_layers
    return [
        Observation("expert-0", "expert", t_e * expert * turns, batches=turns),
        Observation(
            "attention-0",
            "attention",
            t_a * attention * turns,
            passes=passes,
            batch_tokens=passes * size,
            batch_contexts=passes * context,
        ),
    ]


def later(before: list[Observation], more: list[Observation]) -> list[Observation]:
    """Heartbeats after what happened before, and more."""
    totals = ("compute_s", "batches", "passes", "batch_tokens", "batch_contexts")
    return [
        replace(old, **{name: getattr(old, name) + getattr(new, name) for name in totals})
        for old, new in zip(before, more, strict=True)
    ]


def test_what_goes_as_planned_is_no_drift_and_too_few_passes_say_nothing(file):
    watch = DriftWatch(file, 0.3)
    assert watch.look(seen(file, MIN_PASSES - 1, expert=9.0)) == []
    assert watch.ratios == {}
    assert watch.look(seen(file, MIN_PASSES)) == []
    assert watch.ratios == {"attention": pytest.approx(1.0), "expert": pytest.approx(1.0, abs=0.05)}


def test_a_slow_stage_is_said_once_and_again_when_it_comes_back(file):
    watch = DriftWatch(file, 0.3)
    now = seen(file, 100, expert=2.0)
    (drift,) = watch.look(now)
    assert (drift.worker_id, drift.stage) == ("expert-0", "expert")
    assert drift.ratio == pytest.approx(2.0, rel=0.05)
    assert "expert-0: T_e is" in str(drift)
    for slowness, said in ((2.0, 0), (1.0, 0), (2.0, 1)):
        now = later(now, seen(file, 100, expert=slowness))
        assert len(watch.look(now)) == said
    assert watch.num_alarms == 2


def test_faster_than_planned_is_drift_too_and_smaller_batches_are_none(file):
    watch = DriftWatch(file, 0.3)
    assert [drift.stage for drift in watch.look(seen(file, 100, attention=0.5))] == ["attention"]
    assert DriftWatch(file, 0.3).look(seen(file, 100, share=0.25)) == []


def test_a_worker_that_came_back_counts_from_zero(file):
    watch = DriftWatch(file, 0.3)
    watch.look(seen(file, 1000))
    assert watch.look(seen(file, 10, expert=5.0)) == []
    assert len(watch.look(seen(file, 200, expert=5.0))) == 1


def test_a_slow_network_is_drift_as_far_as_it_lengthens_a_turn(file):
    planned = file.plan.t_comm_s
    for factor, said in ((1.6, []), (1 + file.plan.stages.round_trip_s / planned, ["comm"])):
        expert, attention = seen(file, 100)
        watch = DriftWatch(file, 0.3)
        assert [drift.stage for drift in watch.look([expert, replace(attention, comm_s=planned * factor)])] == said
        assert watch.ratios["comm"] == pytest.approx(factor, rel=0.01)


def test_the_plan_to_choose_now_follows_the_measured_times(file):
    watch = DriftWatch(file, 0.3)
    now = seen(file, 100)
    watch.look(now)
    assert watch.choice_now() == "the plan that runs would be chosen again"
    watch.look(later(now, seen(file, 100, expert=20.0)))
    assert watch.choice_now().startswith("the plan to choose now: ")


def test_the_sentence_names_worker_stage_and_both_times():
    drift = Drift("expert-1", "expert", 0.001, 0.0025)
    assert str(drift) == "expert-1: T_e is 2.500 ms, 2.50 of the planned 1.000 ms"


@pytest.mark.parametrize(("faults", "stages"), [((), set()), ((Fault(0.0, "expert-0", "slow", 3.0),), {"expert"})])
@pytest.mark.slow
def test_the_coordinator_says_so_when_a_worker_is_slow(file, caplog, faults, stages):
    """The real coordinator and workers on a simulated device: an expert worker three times slower than planned."""
    deployment, costs = deployment_of_plan(file)
    watch = DriftWatch(file, 0.5)
    requests = poisson(40, 1000.0, fixed_lengths(16, 120), seed=1)
    with caplog.at_level(logging.WARNING, "msi.control.coordinator"):
        simulate(deployment, costs, requests, faults=faults, drift=watch)
    said = [record.getMessage() for record in caplog.records if record.getMessage().startswith("drift: ")]
    assert {stage for stage, ratio in watch.ratios.items() if ratio > 1.5} == stages
    assert any("expert-0: T_e is" in line for line in said) == bool(stages)
