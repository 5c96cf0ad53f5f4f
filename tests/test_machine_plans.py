"""Plans for a profiled machine: its layouts, their limits, and the best of them, on a profile made by hand."""

from __future__ import annotations

import pytest

from msi.errors import ConfigError
from msi.planner.choose import best_plans, costs_of, is_it_worth_it, one_more, pareto_front
from msi.planner.hardware import read_catalogue
from msi.planner.machine import layouts, machine_of, machine_plans
from msi.planner.model_shape import ModelShape
from msi.planner.pipeline import Stages, steady_pass_s
from msi.planner.plan import Workload
from msi.planner.plan_file import PlanFile, task_from_json, task_to_json
from msi.planner.profile import Profile, read_profile
from msi.planner.task import Limits, Pool, Task
from msi.precision import Precision
from msi.simulator.planned import deployment_of_plan
from msi.simulator.simulation import simulate
from msi.simulator.workload import Arrival

MODEL = ModelShape(
    name="small", num_layers=4, hidden_size=64, intermediate_size=128, num_experts=4, top_k=2, num_heads=4,
    num_kv_heads=2, head_dim=16, vocab_size=100, precision=Precision.of("float32"), config_digest="0" * 64,
)  # fmt: skip
SIZES = (1, 2, 4, 8, 16, 32)


def profile(*, overlap: float = 1.0, experts_s: float = 0.004, comm_s: float = 0.0001, gain: float = 2.0) -> Profile:
    """Two cores. T_a = 1 ms + 0.1 ms b and T_e = `experts_s` + 0.05 ms per pair on one core.

    `overlap`: how much longer work takes while the other side computes. `gain`: how much faster both cores are.
    """

    def points(per_row: float, fixed: float, **sizes):
        for threads in (1, 2):
            for contention, factor in (("alone", 1.0), ("overlapped", overlap * threads)):
                yield from sizes["make"](threads, contention, factor / (gain if threads == 2 else 1), per_row, fixed)

    def attention(threads, contention, factor, per_row, fixed):
        for b in SIZES:
            for s in (64, 256):
                yield {"threads": threads, "contention": contention, "num_tokens": b, "context_len": s,
                       "seconds": (fixed + per_row * b) * factor}  # fmt: skip

    def expert(threads, contention, factor, per_row, fixed):
        for active in (1, 2, 4):
            for b in SIZES:
                if 2 * b >= active:
                    seconds = (fixed * active / 4 + per_row * 2 * b) * factor
                    yield {"threads": threads, "contention": contention, "num_experts": 4, "num_active_experts": active,
                           "num_expert_rows": 2 * b, "seconds": seconds}  # fmt: skip

    def once(threads, contention, factor, per_row, fixed):
        for b in SIZES:
            yield {"threads": threads, "contention": contention, "num_seqs": b, "seconds": 0.0004 * factor}

    return read_profile(
        {
            "schema_version": 1, "kind": "msi-profile", "device": "cpu", "host": "by hand", "num_cores": 2,
            "date": "2026-11-22", "model": "small", "config_digest": MODEL.config_digest, "dtype": "float32",
            "attention": list(points(0.0001, 0.001, make=attention)),
            "expert": list(points(0.00005, experts_s, make=expert)),
            "pass": list(points(0.0, 0.0, make=once)),
            "comm": [{"transport": name, "num_bytes": size, "seconds": comm_s}
                     for name in ("inproc", "shm") for size in (100, 100_000)],
        }
    )  # fmt: skip


def task(measured: Profile, **limits) -> Task:
    cores = (Pool(read_catalogue().gpu("cpu"), 2),)
    workload = Workload(input_len=100, output_len=50, tpot_s=limits.pop("tpot_s", 1.0))
    return Task(
        model=MODEL, workload=workload, attention=cores, expert=cores, limits=Limits(**limits), profile=measured
    )


def test_layouts_have_a_core_for_each_thread_of_a_side_and_for_all_that_overlap():
    found = list(layouts(profile(), (1, 2), 4))
    assert all(one.threads * max(one.num_attention, one.num_expert) <= 2 for one in found)
    overlapping = [one for one in found if one.num_micro_batches > 1]
    assert {(one.num_attention, one.num_expert, one.threads) for one in overlapping} == {(1, 1, 1)}
    assert {one.threads for one in found if one.is_colocated} == {1, 2}


def test_stage_times_are_the_profiles_and_the_pass_follows_from_them():
    plan = next(
        one for one in machine_plans(task(profile(), max_batch=16), num_plans=100)
        if (one.kind, one.num_micro_batches, one.threads_per_worker) == ("disaggregated", 2, 1) and one.batch_size == 16
    )  # fmt: skip
    assert plan.micro_batch == 8
    assert plan.t_attention_s == pytest.approx(0.001 + 0.0001 * 8 + 0.0004 / 4)
    assert plan.t_expert_s == pytest.approx(0.004 + 0.00005 * 16, rel=0.05)  # of about four active experts
    assert plan.tpot_s == pytest.approx(steady_pass_s(plan.stages, 2, 4))
    assert plan.tokens_per_s == pytest.approx(16 / plan.tpot_s)


def test_where_sides_do_not_slow_each_other_splitting_them_wins_and_where_they_do_it_loses():
    best = best_plans(task(profile(experts_s=0.0015, gain=1.2), max_batch=32), num_plans=1)[0]
    assert best.kind == "disaggregated"
    crowded = task(profile(experts_s=0.0015, overlap=3.0, comm_s=0.001), max_batch=32)
    assert best_plans(crowded, num_plans=1)[0].kind == "colocated"
    verdict = is_it_worth_it(crowded, best_plans(crowded))
    assert not verdict.is_worth_it
    assert set(verdict.colocated) == {"one process"}


def test_the_batch_keeps_the_tpot_limit_and_the_best_is_measured_or_the_largest():
    for tpot_s in (0.03, 0.05, 0.2):
        for plan in machine_plans(task(profile(), tpot_s=tpot_s), num_plans=100):
            assert plan.tpot_s <= tpot_s
            assert plan.micro_batch <= max(SIZES)
            if plan.limited_by == "tpot":
                machine = machine_of(task(profile(), tpot_s=tpot_s), plan)
                assert machine.broken(plan.micro_batch + 1) == "tpot"
    with pytest.raises(ConfigError, match=r"no layout of this machine keeps a TPOT of 1 ms .*fastest pass takes"):
        machine_plans(task(profile(), tpot_s=0.001))


def test_the_front_rises_and_one_more_core_is_not_there():
    front = pareto_front(task(profile()), num_points=8)
    assert [one.tokens_per_s for one in front] == sorted(one.tokens_per_s for one in front)
    plan = front[-1]
    assert [one.change for one in one_more(task(profile()), plan)] == [None, None]


def test_measured_stage_times_change_the_choice():
    asked = task(profile(experts_s=0.0015), max_batch=32)
    machine = machine_of(asked, best_plans(asked, num_plans=1)[0])
    assert machine.stages(8) == machine_of(task_from_json(task_to_json(asked)), machine.plan(8)).stages(8)
    assert isinstance(machine.stages(8), Stages)


@pytest.mark.slow
def test_a_plan_for_a_machine_simulates_as_predicted():
    asked = task(profile(), max_batch=16)
    for plan in machine_plans(asked, num_plans=4):
        deployment, costs = deployment_of_plan(PlanFile(plan, asked, MODEL.config_digest))
        assert costs_of(asked, plan).comm_s(1000) == costs.comm_s(1000)
        requests = [Arrival(0.0, 1, 149)] * plan.batch_size
        report = simulate(deployment, costs, requests)
        assert report.num_failed == 0
        assert report.tpot_s is not None
        assert report.tpot_s.p50_s == pytest.approx(plan.tpot_s, rel=0.05)
