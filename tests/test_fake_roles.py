"""Real workers are right on the fake device on every seed, and each synchronisation that they lack is caught."""

from __future__ import annotations

import pytest

from tests.everyday import mostly_slow
from tests.fake_left_out import LEFT_OUT, LEFT_OUT_AT_A_LOSS
from tests.fake_roles import Model, play
from tests.reference import references, save_tiny

EVERYDAY_SEEDS, SEEDS = 3, 100
SEEDS_OF = mostly_slow([range(EVERYDAY_SEEDS), range(EVERYDAY_SEEDS, SEEDS)])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("roles")
    reference = save_tiny(path, num_local_experts=4)
    return Model(path, references(reference, [3, 7, 5], 2))


@pytest.mark.parametrize("seeds", SEEDS_OF, ids=str)
@pytest.mark.parametrize("loses_node", [False, True])
def test_workers_that_wait_for_all_they_must_are_right(model, loses_node, seeds):
    runs = {seed: play(model, seed, loses_node=loses_node) for seed in seeds}
    assert not any(runs.values()), runs


EVERYDAY = "attention does not flush what landed"
CASES = [(EVERYDAY, range(EVERYDAY_SEEDS)), *((left_out, range(SEEDS)) for left_out in LEFT_OUT)]


@pytest.mark.parametrize(("left_out", "seeds"), mostly_slow(CASES), ids=str)
def test_what_is_left_out_is_caught_on_every_seed(model, left_out, seeds):
    runs = {seed: play(model, seed, LEFT_OUT[left_out]) for seed in seeds}
    assert all(runs.values()), runs


@pytest.mark.slow
@pytest.mark.parametrize("left_out", LEFT_OUT_AT_A_LOSS)
def test_what_is_left_out_when_a_node_is_lost_is_caught_on_every_seed(model, left_out):
    runs = {seed: play(model, seed, LEFT_OUT_AT_A_LOSS[left_out], loses_node=True) for seed in range(SEEDS)}
    assert all(runs.values()), runs
