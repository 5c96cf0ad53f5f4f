"""Passes that are launched ahead on real queues and a real link: whatever fails, the queue serves the next pass."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import weakref
from functools import partial

import pytest

from msi.attention.lanes import run_pass
from msi.attention.launching import AHEAD, LanePrograms, LaneQueues
from msi.device.compute_thread import Program
from msi.device.cpu import CpuDevice
from msi.errors import BatchRefused, TransportError
from msi.meter import StageMeter
from msi.net.combine_link import CombineLink
from msi.net.dispatch_link import DispatchLink
from msi.net.inproc import InprocTransport
from tests.everyday import mostly_slow
from tests.inline_device import InlineDevice
from tests.test_links import HELLO

NUM_LAYERS = 6
NUM_LANES = 2


class Boom(Exception):
    """What programs of these tests raise."""


class Compute:
    """An attention half whose micro-batches are names and whose programs note what they were run for."""

    is_whole = False

    def __init__(self, device, num_layers=NUM_LAYERS, has_shared=True):
        self.num_layers = num_layers
        self.log = [[] for _ in range(NUM_LANES)]
        self.raises_at = None  # (lane, layer or "shared" layer or "end")
        self.launched = [[] for _ in range(NUM_LANES)]
        self.current = [None] * NUM_LANES
        self.error = [None] * NUM_LANES
        self.has_shared = has_shared
        self.queues = LaneQueues(device, 2, [self.programs(lane) for lane in range(NUM_LANES)])
        self.counts, self.launch = self.queues.counts, self.queues.launch
        self.open, self.pack_again = self.queues.open, self.queues.pack_again

    def programs(self, lane):
        def program(place):
            return Program(partial(self.run, lane, place), partial(self.failed, lane), StageMeter(), str(place), lane)

        shared = [program(f"shared {layer}") if self.has_shared else None for layer in range(self.num_layers)]
        return LanePrograms(
            [(program(layer), shared[layer]) for layer in range(self.num_layers)],
            program("end"),
            program("again"),
        )

    def run(self, lane, place):
        if place == 0:
            self.current[lane], self.error[lane] = self.launched[lane].pop(0), None
        name, first, _ = self.current[lane]
        if isinstance(place, int) and self.queues.is_given_up(lane, first + place):
            return
        if (lane, place) == self.raises_at:
            self.raises_at = None
            raise Boom(f"at {place}")
        self.log[lane].append((name, place))
        if isinstance(place, int):
            self.counts[lane, 0], self.counts[lane, 1] = 1, place % 2

    def failed(self, lane, error):
        _, first, link = self.current[lane]
        self.error[lane] = error
        link.failed(lane, first, error)

    def begin(self, lane, micro_batch, first, link):
        self.launched[lane].append((micro_batch, first, link))

    async def sampled(self, lane):
        await self.queues.sampled(lane)
        if self.error[lane] is not None:
            raise self.error[lane]
        return self.current[lane][0]


class Node:
    """An expert node that answers what lands, unless it is told something else."""

    def __init__(self, index, incarnation=9):
        self.transport = InprocTransport()
        self.link = CombineLink(
            self.transport, expected=HELLO, worker_id=f"expert-{index}", incarnation=incarnation, num_seats=2,
            max_skip=2 * NUM_LAYERS,
        )  # fmt: skip
        self.index = index
        self.does = self.answer
        self.seen = []

    def answer(self, seat, lane, seq, num_rows):
        self.link.answer(lane, [(seat, seq, num_rows)], compute_s=0.0)

    def refuse(self, seat, lane, seq, num_rows):
        self.does = self.answer
        self.link.refuse(seat, lane, seq, "out of luck")

    def say_nothing(self, seat, lane, seq, num_rows):
        self.does = self.answer

    def joined(self, seat, node, out_rows):
        """Nothing to attach."""

    def left(self, seat):
        """Nothing to detach."""

    def told(self, lane):
        def landed(seat, seq, num_rows, more, now):
            self.seen.append((lane, seq, more))
            if num_rows:
                self.does(seat, lane, seq, num_rows)

        return landed

    def all_landed(self):
        """Everything was answered as it landed."""


class World:
    """An attention worker's lanes and two expert nodes."""

    async def start(self, device, timeout_s=5.0, **options):
        self.device = device
        self.transport = InprocTransport()
        self.link = DispatchLink(
            self.transport, hello=HELLO, num_nodes=2, report_loss=lambda *loss: None, timeout_s=timeout_s
        )
        self.nodes = [None, None]
        self.num_lives = 9
        self.compute = Compute(device, **options)
        await self.connect()
        return self

    async def connect(self):
        """Nodes that were lost are there again, in new lives."""
        for index in self.link.nodes.missing:
            node = self.nodes[index] = Node(index, self.num_lives)
            self.num_lives += 1
            await self.link.connect(index, await node.link.listen(node))

    async def run(self, lane, name, may_continue=lambda lane: True):
        return await asyncio.wait_for(run_pass(lane, name, self.compute, self.link, may_continue), 10)

    async def stop(self):
        for transport in (self.transport, *(node.transport for node in self.nodes)):
            await transport.close()
        if isinstance(self.device, CpuDevice):
            await self.device.close()


@pytest.fixture(params=["cpu", "inline"])
async def world(request):
    world = await World().start(CpuDevice(num_threads=1) if request.param == "cpu" else InlineDevice())
    yield world
    await world.stop()


def whole(name):
    """What a pass that goes through runs."""
    layers = [place for layer in range(NUM_LAYERS) for place in (layer, f"shared {layer}")]
    return [(name, place) for place in (*layers, "end")]


async def test_a_pass_runs_its_layers_in_order_and_each_shared_part_while_the_rows_are_away(world):
    asked = []

    def may_continue(lane):
        asked.append(len(world.compute.log[lane]))
        return False

    assert await world.run(1, "a", may_continue) == "a"
    assert world.compute.log == [[], whole("a")]
    assert [more for _, _, more in world.nodes[0].seen] == [True] * (NUM_LAYERS - 1) + [False]
    (when,) = asked
    assert when >= 2 * (NUM_LAYERS - 1) - 1, "asked late"


async def test_lanes_go_on_by_themselves(world):
    names = await asyncio.gather(*(world.run(lane, f"{lane}/{number}") for lane in (0, 1) for number in (0,)))
    assert names == ["0/0", "1/0"]
    for number in range(1, 5):
        await asyncio.gather(*(world.run(lane, f"{lane}/{number}") for lane in (0, 1)))
    for lane in (0, 1):
        assert world.compute.log[lane] == [step for number in range(5) for step in whole(f"{lane}/{number}")]


async def test_no_more_than_a_few_layers_are_launched_ahead():
    class Counted(InlineDevice):
        num_steps = 0

        def queue(self, name):
            queue, device = super().queue(name), self

            def run(program, original=queue.run):
                device.num_steps += 1
                original(program)

            queue.run = run
            return queue

    device = Counted()
    world = await World().start(device, has_shared=False)
    world.nodes[0].does = world.nodes[0].say_nothing
    passing = asyncio.create_task(world.run(0, "a"))
    await asyncio.sleep(0.05)
    assert device.num_steps == AHEAD + 1, "the first is packed, and one more was launched for it"
    passing.cancel()
    await asyncio.gather(passing, return_exceptions=True)
    await world.stop()


async def loses_a_node(world):
    def die(seat, lane, seq, num_rows):
        asyncio.get_running_loop().create_task(world.nodes[1].transport.close())

    world.nodes[1].does = die
    return TransportError


async def is_refused(world):
    world.nodes[1].does = world.nodes[1].refuse
    return BatchRefused


async def gets_no_answer(world):
    world.nodes[0].does = world.nodes[0].say_nothing
    return TransportError


async def cannot_post(world):
    def answer_and_break(seat, lane, seq, num_rows):
        world.nodes[1].answer(seat, lane, seq, num_rows)
        world.link.nodes[1].endpoint.close()

    world.nodes[1].does = answer_and_break
    return TransportError


def raises_at(place):
    async def raises(world):
        world.compute.raises_at = (0, place)
        return Boom

    raises.__name__ = f"raises_at_{place}"
    return raises


FAILURES = [
    loses_a_node, is_refused, gets_no_answer, cannot_post,
    *(raises_at(place) for place in (0, 2, NUM_LAYERS - 1, "shared 1", f"shared {NUM_LAYERS - 1}", "end")),
]  # fmt: skip


@pytest.mark.parametrize("cause", FAILURES, ids=lambda cause: cause.__name__)
@pytest.mark.parametrize("kind", ["cpu", "inline"])
async def test_a_queue_is_never_stuck_after_a_failure(kind, cause):
    device = CpuDevice(num_threads=1) if kind == "cpu" else InlineDevice()
    world = await World().start(device, timeout_s=0.2 if cause is gets_no_answer else 5.0)
    await world.run(0, "before")
    error = await cause(world)
    with pytest.raises(error):
        await world.run(0, "failed")
    await world.connect()
    world.compute.log = [[] for _ in range(NUM_LANES)]
    for name in ("after", "and after"):
        assert await world.run(0, name) == name
    steps = [step for step in world.compute.log[0] if step[0] != "failed"]
    assert steps == whole("after") + whole("and after")
    assert await world.run(1, "beside") == "beside"
    await world.stop()


@pytest.mark.parametrize("seed", mostly_slow(range(20), keep=6))
async def test_whatever_is_cancelled_or_fails_when_the_passes_that_follow_are_whole(seed):
    chance = random.Random(seed)
    world = await World().start(CpuDevice(num_threads=1), timeout_s=2.0)

    async def lane_of(lane):
        whole_passes = 0
        for number in range(40):
            name = f"{lane}/{number}"
            while world.link.nodes.missing:
                await world.connect()
            passing = asyncio.create_task(world.run(lane, name))
            if chance.random() < 0.3:
                await asyncio.sleep(chance.random() * 0.003)
                passing.cancel()
            elif chance.random() < 0.2:
                place = chance.choice([chance.randrange(NUM_LAYERS), "shared 2", "end"])
                world.compute.raises_at = (lane, place)
            elif chance.random() < 0.1:
                await world.nodes[chance.randrange(2)].transport.close()
            elif chance.random() < 0.1:
                node = chance.choice(world.nodes)
                node.does = node.refuse
            with contextlib.suppress(asyncio.CancelledError, Boom, TransportError):
                assert await passing == name
                whole_passes += 1
                steps = [step for step in world.compute.log[lane] if step[0] == name and step[1] != "again"]
                assert steps == whole(name)
        return whole_passes

    connecting = asyncio.Lock()
    connect = world.connect

    async def one_at_a_time():
        async with connecting:
            await connect()

    world.connect = one_at_a_time
    passes = await asyncio.wait_for(asyncio.gather(lane_of(0), lane_of(1)), 60)
    assert min(passes) > 5
    world.compute.raises_at = None
    for lane in (0, 1):
        await world.connect()
        for node in world.nodes:
            node.does = node.answer
        assert await world.run(lane, "last") == "last"
    await world.stop()


async def test_a_device_holds_nothing_of_a_life_that_is_over():
    """Else the KV caches of all lives would stay."""
    device = CpuDevice(num_threads=1)
    world = await World().start(device)
    await world.run(0, "a")
    world.compute.queues.close()
    compute = weakref.ref(world.compute)
    for transport in (world.transport, *(node.transport for node in world.nodes)):
        await transport.close()
    del world
    gc.collect()
    assert compute() is None
    await device.close()
