"""Real workers are right on the fake device on every seed, and each synchronisation that they lack is caught."""

from __future__ import annotations

import pytest

from msi.experts.half import ExpertHalf
from tests.everyday import NUM_SEEDS, mostly_slow
from tests.fake_left_out import LEFT_OUT, LEFT_OUT_AT_A_LOSS, made
from tests.fake_roles import Model, play
from tests.reference import references, save_tiny

EVERYDAY_SEEDS, SEEDS = 3, NUM_SEEDS
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


@pytest.mark.parametrize("seeds", SEEDS_OF, ids=str)
@pytest.mark.parametrize("redundancy", [0, 1])
def test_whatever_was_under_way_when_a_node_is_lost_goes_on_and_is_right(model, redundancy, seeds):
    held = Model(model.files.model_dir, model.expected, redundancy, holds=True)
    runs = {seed: play(held, seed, loses_node=True) for seed in seeds}
    assert not any(runs.values()), runs


class FailsOnce:
    """A bank of experts that raises for one of its batches."""

    def __init__(self, bank, number):
        self.num_rows, self.weight_bytes_read = bank.num_rows, 0
        self._bank, self._left = bank, number

    def run(self, *batch):
        self._left -= 1
        if not self._left:
            raise ValueError("once")
        return self._bank.run(*batch)


@pytest.mark.parametrize("seeds", SEEDS_OF, ids=str)
def test_a_batch_that_failed_is_not_taken_for_another_that_is_out(model, seeds):
    def fail_once(half):
        half._bank = FailsOnce(half._bank, 1 + seed % 16)

    for seed in seeds:
        assert not play(model, seed, lambda: made(ExpertHalf, fail_once)), seed


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
