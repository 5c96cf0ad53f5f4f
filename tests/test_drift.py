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


def seen(file: PlanFile, passes: float, *, expert: float = 1.0, attention: float = 1.0) -> list[Observation]:
    """Heartbeats of workers that run the plan's micro-batches, their stages so much slower than planned."""
    plan, model = file.plan, file.task.model
    size, context = plan.micro_batch, plan.micro_batch * round(file.task.workload.mean_len)
    costs = costs_of(file.task, plan)
    rows = size * plan.num_attention_nodes * model.top_k * plan.experts_per_node / model.num_experts
    t_a, t_e = costs.attention_s(size, context), costs.expert_s(rows, plan.experts_per_node)
    return [
        Observation("expert-0", "expert", 0.0, t_e * expert, 0.0),
        Observation("attention-0", "attention", t_a * attention, t_e, 0.0, passes, passes * size, passes * context),
    ]


def test_what_goes_as_planned_is_no_drift_and_too_few_passes_say_nothing(file):
    watch = DriftWatch(file, 0.3)
    assert watch.look(seen(file, MIN_PASSES - 1, expert=9.0)) == []
    assert watch.ratios == {}
    assert watch.look(seen(file, MIN_PASSES)) == []
    assert watch.ratios == {"attention": pytest.approx(1.0), "expert": pytest.approx(1.0, abs=0.05)}


def test_a_slow_stage_is_said_once_and_again_when_it_comes_back(file):
    watch = DriftWatch(file, 0.3)
    (drift,) = watch.look(seen(file, 100, expert=2.0))
    assert (drift.worker_id, drift.stage) == ("expert-0", "expert")
    assert drift.ratio == pytest.approx(2.0, rel=0.05)
    assert "expert-0: T_e is" in str(drift)
    assert watch.look(seen(file, 200, expert=2.0)) == []
    assert watch.look(seen(file, 300)) == []
    assert len(watch.look(seen(file, 400, expert=2.0))) == 1
    assert watch.num_alarms == 2


def test_faster_than_planned_is_drift_too_and_smaller_batches_are_none(file):
    watch = DriftWatch(file, 0.3)
    assert [drift.stage for drift in watch.look(seen(file, 100, attention=0.5))] == ["attention"]
    quiet = PlanFile(replace(file.plan, batch_size=file.plan.batch_size // 4), file.task, "")
    assert DriftWatch(file, 0.3).look(seen(quiet, 100)) == []


def test_a_worker_that_came_back_counts_from_zero(file):
    watch = DriftWatch(file, 0.3)
    watch.look(seen(file, 1000))
    assert watch.look(seen(file, 10, expert=5.0)) == []
    assert len(watch.look(seen(file, 200, expert=5.0))) == 1


def test_the_plan_to_choose_now_follows_the_measured_times(file):
    watch = DriftWatch(file, 0.3)
    watch.look(seen(file, 100))
    assert watch.choice_now() == "the plan that runs would be chosen again"
    watch.look(seen(file, 200, expert=20.0))
    assert watch.choice_now().startswith("the plan to choose now: ")


def test_the_sentence_names_worker_stage_and_both_times():
    drift = Drift("expert-1", "expert", 0.001, 0.0025)
    assert str(drift) == "expert-1: T_e is 2.500 ms, 2.50 of the planned 1.000 ms"


@pytest.mark.parametrize(("faults", "stages"), [((), set()), ((Fault(0.0, "expert-0", "slow", 3.0),), {"expert"})])
def test_the_coordinator_says_so_when_a_worker_is_slow(file, caplog, faults, stages):
    """The real coordinator and workers on a simulated device: an expert worker three times slower than planned."""
    deployment, costs = deployment_of_plan(file)
    watch = DriftWatch(file, 0.5)
    requests = poisson(40, 1000.0, fixed_lengths(16, 120), seed=1)
    with caplog.at_level(logging.WARNING, "msi.coordinator"):
        simulate(deployment, costs, requests, faults=faults, drift=watch)
    said = [record.getMessage() for record in caplog.records if record.getMessage().startswith("drift: ")]
    assert {stage for stage, ratio in watch.ratios.items() if ratio > 1.5} == stages
    assert any("expert-0: T_e is" in line for line in said) == bool(stages)
