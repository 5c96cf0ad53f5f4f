"""Figure 14 a second time: the product's lanes, links, waves and expert servers under a virtual clock."""

from __future__ import annotations

from msi.planner.pipeline import Stages
from msi.simulator.clock import run_virtual
from msi.simulator.instance import Shape, SimulatedInstance

NUM_PASSES, NUM_FIRST = 5, 2  # the first passes fill the pipeline and are left out


def simulated_pass_s(stages: Stages, m: int, num_layers: int) -> float:
    """Mean pass of m lanes on 2 attention and 2 expert workers: with stage times given, numbers change nothing."""
    return run_virtual(_mean_pass_s(Shape(2, 2, m, num_layers, stages, wait_for_all=True)))


async def _mean_pass_s(shape: Shape) -> float:
    async with SimulatedInstance(shape) as instance:
        started = [await worker.start(NUM_PASSES) for worker in instance.attention]
        for passes in started:
            await passes.done.wait()
        return sum(passes.log.mean_pass_s(skip=NUM_FIRST) for passes in started) / len(started)
