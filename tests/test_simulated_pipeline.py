"""The real lanes, links, waves and expert servers under a virtual clock: what a pass takes, and what disturbs it.

4 attention and 2 expert workers, m = 3, as measured for the design: T_c = T_f / 5.
"""

from __future__ import annotations

import asyncio
import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msi.planner.pipeline import Stages, isolated_pass_s, steady_pass_s
from msi.simulator.clock import SimulationStalled, run_virtual
from msi.simulator.instance import Passes, Shape, SimulatedInstance
from tests.everyday import mostly_slow, thorough

T_F = 1e-3
STAGES = Stages(attention_s=T_F, expert_s=T_F, comm_s=0.2 * T_F)
NUM_PASSES = {16: 60, 56: 30}
BOUND = 1.10


def four_plus_two(num_layers: int, **options) -> Shape:
    return Shape(num_attention=4, num_experts=2, num_lanes=3, num_layers=num_layers, stages=STAGES, **options)


async def mean_passes(shape: Shape, disturb) -> tuple[list[float], SimulatedInstance]:
    """Mean pass times of the workers that `disturb` names as undisturbed; it starts all workers itself."""
    async with SimulatedInstance(shape) as instance:
        undisturbed: list[Passes] = await disturb(instance)
        for passes in undisturbed:
            await passes.done.wait()
        assert not any(passes.failures for passes in undisturbed)
        return [passes.log.mean_pass_s() for passes in undisturbed], instance


def some_passes(instance: SimulatedInstance, share: float) -> float:
    """A time in the middle of a run, off any boundary."""
    shape = instance.shape
    return NUM_PASSES[shape.num_layers] * share * steady_pass_s(STAGES, shape.num_lanes, shape.num_layers) * 1.013


async def start(instance: SimulatedInstance, *indices: int, **options) -> list[Passes]:
    num_passes = NUM_PASSES[instance.shape.num_layers]
    return [await instance.attention[index].start(num_passes, **options) for index in indices]


async def nothing_wrong(instance):
    return await start(instance, 0, 1, 2, 3)


async def staggered_start(instance):
    started = []
    for index in range(4):
        started += await start(instance, index)
        await asyncio.sleep(2.7 * T_F)
    return started


async def one_stall(instance):
    started = await start(instance, 0, 1, 2, 3)
    await asyncio.sleep(some_passes(instance, 0.3))
    instance.attention[3].compute.device.stall(8 * T_F)
    return started[:3]


async def one_ten_times_slow(instance):
    instance.attention[3].compute.device.slowness = 10
    return (await start(instance, 0, 1, 2, 3))[:3]


async def one_idle(instance):
    await instance.attention[3].start(num_passes=1)
    return await start(instance, 0, 1, 2)


async def one_joins(instance):
    started = await start(instance, 0, 1, 2)
    await asyncio.sleep(some_passes(instance, 0.4))
    await start(instance, 3)
    return started


async def one_dies(instance):
    started = await start(instance, 0, 1, 2, 3)
    await asyncio.sleep(some_passes(instance, 0.3))
    await instance.attention[3].stop()
    return started[:3]


async def one_freezes(instance):
    started = await start(instance, 0, 1, 2, 3)
    await asyncio.sleep(some_passes(instance, 0.3))
    instance.attention[3].compute.device.stall(1e4)
    return started[:3]


async def one_has_gaps(instance):
    started = await start(instance, 0, 1, 2)
    await start(instance, 3, gap_s=lambda: 5 * T_F)
    return started


DISTURBANCES = [
    nothing_wrong, staggered_start, one_stall, one_ten_times_slow, one_idle, one_joins, one_dies, one_freezes,
    one_has_gaps,
]  # fmt: skip


@pytest.mark.parametrize("num_layers", [16, pytest.param(56, marks=pytest.mark.slow)])
@pytest.mark.parametrize("disturb", mostly_slow(DISTURBANCES, keep=3))
def test_a_disturbance_costs_the_undisturbed_at_most_a_tenth(disturb, num_layers):
    shape = four_plus_two(num_layers)
    times, _ = run_virtual(mean_passes(shape, disturb))
    assert max(times) / steady_pass_s(STAGES, 3, num_layers) <= BOUND


@pytest.mark.parametrize("num_layers", [16, pytest.param(56, marks=pytest.mark.slow)])
@pytest.mark.parametrize("seed", [*mostly_slow([0, 1]), thorough(2)])
def test_a_slow_worker_and_empty_dispatches_cost_the_undisturbed_at_most_a_tenth(seed, num_layers):
    shape = four_plus_two(num_layers, empty=0.3, seed=seed)
    times, _ = run_virtual(mean_passes(shape, one_ten_times_slow))
    assert max(times) / steady_pass_s(STAGES, 3, num_layers) <= BOUND


@pytest.mark.parametrize("num_layers", [16, pytest.param(56, marks=pytest.mark.slow)])
def test_a_gap_between_all_passes_costs_the_gap(num_layers):
    gap_s = 2.5 * T_F

    async def all_have_gaps(instance):
        return await start(instance, 0, 1, 2, 3, gap_s=lambda: gap_s)

    times, _ = run_virtual(mean_passes(four_plus_two(num_layers), all_have_gaps))
    assert max(times) / (steady_pass_s(STAGES, 3, num_layers) + gap_s) <= 1.01


@pytest.mark.parametrize("jitter", mostly_slow([0.1, 0.3]))
@pytest.mark.parametrize("num_layers", [16, pytest.param(56, marks=pytest.mark.slow)])
def test_with_jitter_waves_are_as_fast_as_waiting_for_all(num_layers, jitter):
    ours, _ = run_virtual(mean_passes(four_plus_two(num_layers, jitter=jitter), nothing_wrong))
    patient, _ = run_virtual(mean_passes(four_plus_two(num_layers, jitter=jitter, wait_for_all=True), nothing_wrong))
    assert max(ours) / max(patient) <= 1.05


SHAPES = [
    Shape(4, 2, 3, 16, STAGES),
    Shape(4, 2, 2, 56, STAGES),
    Shape(1, 1, 1, 8, Stages(0.5e-3, 1.2e-3, 0.9e-3)),
    Shape(1, 1, 4, 8, Stages(0.5e-3, 1.2e-3, 0.9e-3)),
    Shape(3, 5, 2, 8, Stages(1e-3, 0.7e-3, 0.2e-3)),
    Shape(2, 3, 3, 8, Stages(0.9e-3, 1.1e-3, 0.1e-3)),
    Shape(1, 4, 4, 5, Stages(2e-3, 0.3e-3, 1.5e-3)),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_undisturbed_passes_equal_the_formulas(shape):
    async def run(num_passes):
        async with SimulatedInstance(shape) as instance:
            started = [await worker.start(num_passes) for worker in instance.attention]
            for passes in started:
                await passes.done.wait()
            return started

    (isolated, *_) = run_virtual(run(1))
    expected_s = isolated_pass_s(shape.stages, shape.num_lanes, shape.num_layers)
    assert isolated.log.last_end == pytest.approx(expected_s, rel=1e-3)
    for passes in run_virtual(run(20)):
        expected_s = steady_pass_s(shape.stages, shape.num_lanes, shape.num_layers)
        assert passes.log.mean_pass_s(skip=1) == pytest.approx(expected_s, rel=1e-3)


@st.composite
def storms(draw):
    """A shape, and per attention worker: when it starts, how it is disturbed, and when it dies (or not)."""
    shape = Shape(
        num_attention=draw(st.integers(1, 4)),
        num_experts=draw(st.integers(1, 3)),
        num_lanes=draw(st.integers(1, 4)),
        num_layers=draw(st.integers(1, 5)),
        stages=Stages(T_F, draw(st.sampled_from([0.3, 1.0, 1.7])) * T_F, draw(st.sampled_from([0.0, 0.2, 1.1])) * T_F),
        jitter=draw(st.sampled_from([0.0, 0.1, 0.5])),
        empty=draw(st.sampled_from([0.0, 0.3, 0.8])),
        seed=draw(st.integers(0, 1000)),
    )
    times = st.floats(0, 60 * T_F)
    fates = [
        {
            "starts_at": draw(times),
            "num_passes": draw(st.integers(1, 6)),
            "gap_s": draw(st.sampled_from([0.0, 0.0, 3 * T_F, 40 * T_F])),
            "slowness": draw(st.sampled_from([1.0, 1.0, 10.0])),
            "stalls_at": draw(st.none() | times),
            "dies_at": draw(st.none() | st.none() | times),
        }
        for _ in range(shape.num_attention)
    ]
    return shape, fates


async def weather(shape: Shape, fates) -> None:
    async with SimulatedInstance(shape) as instance:

        async def live(worker, fate):
            await asyncio.sleep(fate["starts_at"])
            worker.compute.device.slowness = fate["slowness"]
            passes = await worker.start(fate["num_passes"], gap_s=lambda: fate["gap_s"])
            if fate["stalls_at"] is not None:
                await asyncio.sleep(fate["stalls_at"])
                worker.compute.device.stall(30 * T_F)
            if fate["dies_at"] is None:
                await passes.done.wait()
                assert passes.failures == []
                assert worker.link.counters.answers == sum(worker.sent)
                assert not worker.link.counters.dropped
            else:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(passes.done.wait(), fate["dies_at"])
                await worker.stop()

        for worker in instance.attention:
            worker.sent = []
            worker.compute._routing = Recording(instance, worker.sent)
        await asyncio.gather(*(live(*pair) for pair in zip(instance.attention, fates, strict=True)))
        live_ones = all(fate["dies_at"] is None for fate in fates)
        for expert in instance.experts:
            dropped = {reason: count for reason, count in expert.link.counters.dropped.items() if "gone" not in reason}
            assert not dropped or not live_ones
        if live_ones:
            answered = sum(expert.link.counters.answers for expert in instance.experts)
            assert answered == sum(sum(worker.sent) for worker in instance.attention)


class Recording:
    """A routing that notes how many nodes each draw has rows for."""

    def __init__(self, routing, sent):
        self.routing, self.sent = routing, sent

    def draw(self, num_tokens, chance, view=0, layer=0):
        mark, rows = self.routing.draw(num_tokens, chance, view, layer)
        self.sent.append(sum(map(bool, rows)))
        return mark, rows


@settings(max_examples=150, deadline=None)
@given(storms())
@pytest.mark.slow
def test_storms_always_end_with_every_row_answered_exactly_once(storm):
    run_virtual(weather(*storm))


def test_the_virtual_clock_reports_a_deadlock_instead_of_hanging():
    async def wait_for_nobody():
        await asyncio.get_running_loop().create_future()

    with pytest.raises(SimulationStalled):
        run_virtual(wait_for_nobody())
