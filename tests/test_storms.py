"""Storms in the simulator: workers and coordinators that die, stand still and are slow, in any order and at once.

Every request ends once and with all its tokens, as long as somebody is left who can run it. Each token hangs on all
before it, by the KV blocks that hold them (`msi.simulator.histories`); that it is the right one, and that no block is
left, the simulation asserts itself. With MSI_THOROUGH=1 there are thousands, and how many there were is said every ten
seconds.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from msi.planner.stage_costs import ConstantCosts
from msi.settings import Rebalance, SlowWorkers
from msi.simulator.deployment import LIMITS, Deployment, Fault
from msi.simulator.simulation import simulate
from msi.simulator.workload import Arrival
from tests.everyday import IS_THOROUGH
from tests.layered import rotated

NUM_STORMS = 2000 if IS_THOROUGH else 25
LASTS_S = 6.0
LIMIT_S = 400.0  # of virtual time
COSTS = ConstantCosts(3e-3, 3e-3, 0.2e-3, 0.3e-3)
CALM = Deployment(
    num_layers=2, num_experts=4, top_k=2, num_attention=3, num_expert=3, num_micro_batches=2, expert_redundancy=1,
    limits=replace(LIMITS, num_gpu_blocks_override=60),
)  # fmt: skip
LAYERED = replace(CALM, placement=rotated(CALM.plan.placement, CALM.num_layers))
WATCHFUL = replace(CALM, slow=SlowWorkers(drain_slow_after_s=1), rebalance=Rebalance("auto", 1.0, 0.05))

AT = st.floats(0.05, LASTS_S, allow_nan=False)
FAULTS = st.one_of(
    st.tuples(st.just("attention"), st.just("dead"), AT, st.just(0.0)),
    st.tuples(st.just("expert"), st.just("dead"), AT, st.just(0.0)),
    st.tuples(st.just("coordinator"), st.just("dead"), AT, st.floats(0.05, 4.0)),
    st.tuples(st.sampled_from(["attention", "expert"]), st.just("slow"), AT, st.floats(1.5, 12.0)),
    st.tuples(st.sampled_from(["attention", "expert"]), st.just("stalled"), AT, st.floats(0.05, 2.5)),
)
STORMS = st.lists(st.tuples(FAULTS, st.integers(0, 2)), min_size=1, max_size=6)
ARRIVALS = st.lists(
    st.builds(
        Arrival, arrival_s=st.floats(0.0, LASTS_S - 1), input_len=st.integers(1, 60), output_len=st.integers(1, 60),
        priority=st.integers(-1, 1),
    ),
    min_size=1,
    max_size=8,
)  # fmt: skip


def survivable(storm: list[tuple[tuple[str, str, float, float], int]]) -> list[Fault]:
    """Of what is drawn, all after which somebody is left: one attention worker, and two that hold experts."""
    left = {"attention": {0, 1, 2}, "expert": {0, 1, 2}}
    least = {"attention": 1, "expert": 2}
    faults, coordinator_from = [], 0.0
    for (role, kind, at_s, amount), index in sorted(storm):
        if role == "coordinator":
            if at_s < coordinator_from:
                continue  # it is dead already
            coordinator_from = at_s + amount
            faults.append(Fault(at_s, role, kind, amount))
            continue
        if kind == "dead":
            if index not in left[role] or len(left[role]) <= least[role]:
                continue
            left[role].remove(index)
        faults.append(Fault(at_s, f"{role}-{index}", kind, amount))
    return faults


class Progress:
    """Of thousands, which take minutes."""

    def __init__(self) -> None:
        self.num_storms = 0
        self.kinds = Counter[str]()
        self._began = self._said_at = time.monotonic()

    def add(self, faults: list[Fault]) -> None:
        self.num_storms += 1
        self.kinds.update(f"{one.worker.partition('-')[0]} {one.kind}" for one in faults)
        if IS_THOROUGH and time.monotonic() - self._said_at > 10 and sys.__stderr__ is not None:
            self._said_at = time.monotonic()
            told = ", ".join(f"{kind}: {count}" for kind, count in sorted(self.kinds.items()))
            sys.__stderr__.write(f"\n{self.num_storms} storms in {self._said_at - self._began:.0f} s; {told}\n")
            sys.__stderr__.flush()


PROGRESS = Progress()


def test_a_worker_that_is_stopped_twice_at_a_time_goes_on_when_the_later_one_ends():
    faults = [Fault(2.0, "attention-0", "stalled", 2.0), Fault(2.0, "attention-0", "stalled", 2.5)]
    report = simulate(CALM, COSTS, [Arrival(2.0, 1, 1)], faults=faults, limit_s=LIMIT_S)
    assert not report.failed
    assert 4.5 < report.duration_s < 4.6


@pytest.mark.slow
@pytest.mark.timeout(3600 if IS_THOROUGH else 300)
@settings(max_examples=NUM_STORMS, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(STORMS, ARRIVALS, st.sampled_from([CALM, LAYERED, WATCHFUL]))
def test_in_any_storm_every_request_gets_all_its_tokens(storm, arrivals, deployment):
    faults = survivable(storm)
    PROGRESS.add(faults)
    report = simulate(deployment, COSTS, arrivals, faults=faults, seed=len(storm), limit_s=LIMIT_S)
    assert not report.failed, [(one.request_id, one.error_kind, one.error) for one in report.failed]
    assert report.num_tokens == sum(one.output_len for one in arrivals)
