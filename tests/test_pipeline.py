"""The pipeline's formulas on hand-worked values."""

import pytest

from msi.planner.pipeline import (
    Stages,
    choose_micro_batches,
    eq5_s,
    is_full,
    isolated_pass_s,
    steady_pass_s,
    together_or_apart,
)


def test_a_fast_network_needs_three_micro_batches_and_a_slow_one_four():
    fast, slow = Stages(1.0, 1.0, 0.4), Stages(1.0, 1.0, 0.9)
    assert [is_full(fast, m) for m in (1, 2, 3, 4)] == [False, False, True, True]
    assert [is_full(slow, m) for m in (1, 2, 3, 4)] == [False, False, False, True]


def test_two_micro_batches_are_full_only_when_communication_is_free():
    assert is_full(Stages(1.0, 1.0, 0.0), 2)
    assert not is_full(Stages(1.0, 1.0, 0.1), 2)


def test_hand_worked_passes():
    full = Stages(attention_s=1.0, expert_s=1.0, comm_s=0.2)
    assert eq5_s(full, 3, 10) == pytest.approx(2.4 + 29)
    assert isolated_pass_s(full, 3, 10) == pytest.approx(31.4)
    assert steady_pass_s(full, 3, 10) == pytest.approx(30.0)
    hungry = Stages(attention_s=1.0, expert_s=0.5, comm_s=1.0)
    assert isolated_pass_s(hungry, 2, 10) == pytest.approx(10 * 3.5 + 1.0)
    assert steady_pass_s(hungry, 2, 10) == pytest.approx(35.0)


def test_one_micro_batch_pays_every_round_trip():
    stages = Stages(1.0, 2.0, 0.5)
    assert isolated_pass_s(stages, 1, 7) == steady_pass_s(stages, 1, 7) == pytest.approx(7 * 4.0)


def test_times_that_a_coarse_clock_saw_as_nothing_still_choose():
    nothing = Stages(0.0, 0.0, 0.0)
    assert choose_micro_batches({1: nothing, 2: nothing}, 32, 2)[0] == 1


def test_one_process_is_better_where_halves_cannot_overlap_and_two_where_they_do():
    bound_by_memory = {1: Stages(0.010, 0.020, 0.001), 2: Stages(0.010, 0.019, 0.001)}
    assert choose_micro_batches(bound_by_memory, 32, 10)[0] == 1
    assert together_or_apart(bound_by_memory, 1, 32, 10) == (
        "both workers are on one host: where they share its cores, one process (`colocated`) is faster, as no rows "
        "travel (together 107 tokens/s, apart 100)"
    )
    bound_by_arithmetic = {1: Stages(0.016, 0.016, 0.001), 2: Stages(0.009, 0.009, 0.001)}
    assert choose_micro_batches(bound_by_arithmetic, 32, 10)[0] == 2
    assert together_or_apart(bound_by_arithmetic, 2, 32, 10) == (
        "both workers are on one host: they are faster than one process (`colocated`), as their halves overlap "
        "(together 100 tokens/s, apart 160)"
    )
