#!/usr/bin/env python3
"""What decode passes cost the host of a GPU whose lanes are streams, over a driver that does nothing.

Each lane's queue is kept a few layers ahead by the real `LaneQueues` on the real `StreamDevice`: per layer a wait, a
program between two events (the replay of a captured graph by the real `LaneGraphs`: one call that launches nothing
here; with `--gates` an empty program), a signal, the loop's sight of
it, and the gate. The pass is laid out by the real `PassInputs`. Left out: what operators of torch cost where no graph
was captured, the links' posts (tools/bench_links.py), the coordinator's messages, what the driver itself takes.

One JSON line: milliseconds of processor time of a step of all lanes, its share of 50 ms, and bytes of Python's memory
that 1,000 passes left behind: at their end, and at the most at the end of any tenth of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import tracemalloc
from functools import partial

import torch
import uvloop

from msi.attention.forward import PassState
from msi.attention.graphs import AlikePasses, LaneGraphs
from msi.attention.launching import LanePrograms, LaneQueues
from msi.attention.pass_inputs import PassInputs
from msi.device.compute_thread import Program
from msi.device.fake.nothing import NothingDriver
from msi.device.stream_device import StreamDevice
from msi.kernels import BLOCK_TOKENS
from msi.kernels.plain import PlainKernels
from msi.kernels.replicas import PlacementTables
from msi.meter import StageMeter
from msi.types import MicroBatch, TokenSampling

STEP_S = 0.05
CONTEXT = 743
WARM_STEPS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=128, help="of each lane's micro-batch")
    parser.add_argument("--layers", type=int, default=60)
    parser.add_argument("--lanes", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30, help="that are timed")
    parser.add_argument("--passes", type=int, default=1000, help="over which memory is watched; 0: not")
    parser.add_argument("--gates", action="store_true", help="streams wait at gates themselves")
    print(json.dumps(uvloop.run(measure(**vars(parser.parse_args())))))


async def measure(
    sequences: int, layers: int, lanes: int, steps: int, passes: int, gates: bool = False
) -> dict[str, float]:
    driver = NothingDriver()
    device = StreamDevice(driver, PlainKernels(driver.device), gates, uses_graphs=True)
    bench = _Bench(device, layers, lanes, sequences)
    for _ in range(5):
        await bench.step()
    before = dict(driver.calls)
    times = []
    for _ in range(steps):
        started = time.process_time()
        await bench.step()
        times.append(time.process_time() - started)
    figures = {
        "ms_per_step": round(statistics.median(times) * 1e3, 2),
        "share_of_50_ms": round(statistics.median(times) / STEP_S, 3),
        "us_per_layer_and_lane": round(statistics.median(times) / layers / lanes * 1e6, 2),
        **{f"{name}_calls_per_step": (count - before[name]) / steps for name, count in driver.calls.items()},
    }
    if passes:
        left = await bench.left_behind(passes)
        figures |= {"bytes_left_by_passes": left[-1], "bytes_left_at_most": max(left)}
    bench.queues.close()
    await device.close()
    return figures


class _Bench:
    """Implements `msi.attention.launching.Link`: the experts' answers are there as soon as anything is posted."""

    def __init__(self, device: StreamDevice, layers: int, lanes: int, sequences: int) -> None:
        meter = StageMeter()
        self.layers, self.lanes = layers, range(lanes)
        self._inputs = [PassInputs(device.upload) for _ in self.lanes]
        self._batch = _micro_batch(sequences)
        graphs = device.graphs
        self._graphs = [None if graphs is None else LaneGraphs(graphs, sequences) for _ in self.lanes]
        self._alike = [_alike(self._batch, self._inputs[lane]) for lane in self.lanes]
        programs = [
            LanePrograms(
                [
                    (Program(partial(self._layer, lane, layer), self._failed, meter, "attention", lane), None)
                    for layer in range(layers)
                ],
                Program(lambda: None, self._failed, meter, "sample", lane, reads=True),
                Program(lambda: None, self._failed, meter, "pack again", lane),
            )
            for lane in self.lanes
        ]
        counts = device.host_region(4 * lanes)
        self.queues = LaneQueues(device, 1, programs, counts.host())
        self._first = 1

    async def step(self) -> None:
        """A pass of every lane, side by side."""
        first, self._first = self._first, self._first + self.layers
        for lane in self.lanes:
            self.queues.launch(lane, first, self)
        for lane in self.lanes:
            await self.queues.sampled(lane)

    async def left_behind(self, passes: int) -> list[int]:
        """Bytes after each tenth of so many; passes before them, whose leavings are not counted, come on top."""
        tracemalloc.start()
        for _ in range(WARM_STEPS):
            await self.step()
        before, left = tracemalloc.get_traced_memory()[0], [0]
        steps = -(-passes // len(self.lanes))
        for number in range(1, steps + 1):
            await self.step()
            if number % -(-steps // 10) == 0 or number == steps:
                left.append(tracemalloc.get_traced_memory()[0] - before)
        tracemalloc.stop()
        return left

    def packed(self, lane: int, turn: int) -> None:
        self.queues.open(lane, turn)

    def packed_again(self, lane: int, turn: int) -> None: ...

    def _layer(self, lane: int, layer: int) -> None:
        if layer == 0:
            self._inputs[lane].lay_out(self._batch)
        if (graphs := self._graphs[lane]) is not None:
            graphs.run(self._alike[lane], layer, (), lambda: None)

    def _failed(self, error: Exception) -> None:
        raise error


def _alike(batch: MicroBatch, inputs: PassInputs) -> AlikePasses:
    """What graphs are captured of, without a model."""
    nothing = torch.empty(0)
    state = PassState(batch, *inputs.lay_out(batch), PlacementTables(nothing, nothing, 1), nothing, [])
    return AlikePasses(state, set(), {})


def _micro_batch(sequences: int) -> MicroBatch:
    used = -(-CONTEXT // BLOCK_TOKENS)
    return MicroBatch(
        token_ids=tuple(range(sequences)),
        positions=(CONTEXT - 1,) * sequences,
        query_lens=(1,) * sequences,
        context_lens=(CONTEXT,) * sequences,
        block_tables=tuple(tuple(range(1 + used * one, 1 + used * (one + 1))) for one in range(sequences)),
        logit_rows=tuple(range(sequences)),
        sampling=(TokenSampling(0.0, 1.0, 0, 0, 0),) * sequences,
    )


if __name__ == "__main__":
    main()
