"""Workers are killed, drained, removed and added while coordinators die: no request notices, and all ends well."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from msi.simulator.workload import Arrival
from tests.comings_and_goings import Act, lived_through
from tests.everyday import NUM_SEEDS, mostly_slow
from tests.layered import rotated
from tests.test_takeover import COSTS, STORMY


def arrivals(chance, until_s):
    return [Arrival(chance.uniform(0, until_s), chance.randrange(1, 40), chance.randrange(1, 300)) for _ in range(16)]


def acts_of(chance, kinds):
    acts, at_s = [], 0.0
    for _ in range(8):
        at_s += chance.choice([0.0, chance.uniform(0.0, 0.3), chance.uniform(0.5, 6)])
        amount = chance.uniform(0.05, 3.0)
        acts.append(
            Act(at_s, chance.choice(kinds), chance.choice(["attention", "expert"]), chance.randrange(8), amount)
        )
    return acts


@pytest.mark.parametrize("redundancy", [0, 1])
@pytest.mark.parametrize("seed", mostly_slow(range(NUM_SEEDS)))
def test_whoever_comes_and_goes_no_request_notices_and_nobody_is_waited_for_in_the_end(seed, redundancy):
    chance = random.Random(seed)
    acts = acts_of(chance, ["kill", "kill", "drain", "remove", "ask", "add", "rebalance", "dies"])
    deployment = replace(STORMY, expert_redundancy=redundancy)
    if seed % 2:
        deployment = replace(deployment, placement=rotated(deployment.plan.placement, deployment.num_layers))
    report, _ = lived_through(deployment, COSTS, arrivals(chance, acts[-1].at_s + 1), acts, seed)
    assert not report.failed, report.failed


@pytest.mark.parametrize("seed", mostly_slow(range(NUM_SEEDS)))
def test_where_nobody_tells_of_ends_workers_and_coordinators_that_die_are_missed_and_come_back(seed):
    chance = random.Random(seed)
    acts = acts_of(chance, ["kill", "kill", "dies"])
    deployment = replace(STORMY, expert_redundancy=seed % 2)
    works = arrivals(chance, acts[-1].at_s + 1)
    report, _ = lived_through(deployment, COSTS, works, acts, seed, has_launcher=False)
    assert not report.failed, report.failed
