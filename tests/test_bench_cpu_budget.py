"""What the bench of the loop threads takes the time of is there."""

from __future__ import annotations

from tools import bench_cpu_budget


def test_every_method_that_it_takes_the_time_of_is_there():
    timed, counted = bench_cpu_budget.stages()
    assert timed
    assert counted
    for owner, name, _ in [*timed, *counted]:
        assert callable(vars(owner).get(name)), f"{owner.__name__}.{name} has another name now"
