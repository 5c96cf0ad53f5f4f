"""The device with streams, over a driver without a device: the real engine's tokens, and what becomes of failures."""

from __future__ import annotations

import asyncio
import random
import time
from functools import partial

import pytest
import torch

from msi.attention.launching import LanePrograms, LaneQueues
from msi.device import streams
from msi.device.compute_thread import Program
from msi.device.cuda_driver import DeviceLost, host_address
from msi.device.fake.device import FakeDevice
from msi.device.fake.late import WouldWait
from msi.device.fake.nothing import NothingDriver
from msi.device.fake.streams import FakeStreams
from msi.device.fake.world import FakeWorld
from msi.device.stream_device import StreamDevice
from msi.device.stream_words import WORD_BYTES
from msi.kernels.plain import PlainKernels
from msi.meter import StageMeter
from msi.net.shm_seats import ShmLanding
from msi.net.slots import SlotLayout
from msi.worker.torch_host import TorchHost
from tests.engine_in_tasks import engine_in_tasks
from tests.everyday import SOME_FAMILIES, mostly_slow, thorough
from tests.reference import references, save_tiny
from tests.test_tokens import NUM_TOKENS, check_equal
from tests.waiting import until
from tools.bench_cuda_host import measure


class StreamHost(TorchHost):
    """The host of a real worker, whose device's driver is the fake one."""

    gates = False

    def open_device(self):
        return StreamDevice(FakeStreams(), PlainKernels(torch.device("cpu")), self.gates)


class GatedHost(StreamHost):
    gates = True


def stream_engine(transport="inproc", host=StreamHost, **options):
    return engine_in_tasks(host, transport=transport, **options)


async def test_a_device_that_fails_fails_all_work_and_says_why():
    driver = FakeStreams()
    device, failures, seen = StreamDevice(driver, PlainKernels(driver.device)), [], []
    queue, gate, word = device.queue("failing"), device.words.take(), device.words.take()
    device.follow(word, seen.append)

    def works(run):
        return Program(run, failures.append, StageMeter(), "works", 0)

    queue.run(works(lambda: driver.call(lambda: 1 / 0)))
    queue.signal(word, 1)
    queue.wait(gate, 1)
    queue.run(works(lambda: None))
    queue.signal(word, 2)
    await until(lambda: device.lost is not None and 2 in seen)
    queue.run(works(lambda: None))
    queue.signal(word, 3)
    await until(lambda: 3 in seen)
    assert str(device.lost) == "the fake device failed: ZeroDivisionError: division by zero"
    assert failures == [device.lost] * 3
    assert seen == [1, 2, 3]
    await device.close()


class DiesUnseen(FakeStreams):
    """Signals do not come; the second is launched only after the loop has noticed that the device is gone."""

    ours = None
    num_writes = 0

    def write(self, stream, address, value):
        self.num_writes += 1
        if self.num_writes == 2:
            until_s = time.monotonic() + 10
            while self.ours.lost is None and time.monotonic() < until_s:
                time.sleep(0.001)
            time.sleep(0.05)

    def check(self):
        if self.num_writes == 2:
            raise DeviceLost("it is gone")


async def test_what_is_launched_while_the_loop_notices_that_a_device_failed_fails_too():
    driver = DiesUnseen()
    driver.ours = device = StreamDevice(driver, PlainKernels(driver.device))
    queue, word, seen = device.queue("failing"), device.words.take(), []
    device.follow(word, seen.append)
    for value in (1, 2, 3):
        queue.signal(word, value)
    await until(lambda: 3 in seen)
    assert seen == [1, 2, 3]
    assert str(device.lost) == "it is gone"
    await device.close()


async def test_what_would_wait_for_a_value_is_refused_where_it_is_launched():
    driver = FakeStreams()
    device, failures = StreamDevice(driver, PlainKernels(driver.device)), []
    x = torch.zeros(3)
    for run in (lambda: x.sum().item(), lambda: x.nonzero(), lambda: x[x > 0]):
        device.queue("reads").run(Program(run, failures.append, StageMeter(), "reads", 0))
    await until(lambda: len(failures) == 3, timeout_s=60.0)  # torch loads what knows shapes, for seconds
    assert {type(failure) for failure in failures} == {WouldWait}
    await device.close()


async def test_nothing_is_left_on_the_device_when_it_closes_behind_closed_gates():
    driver = FakeStreams()
    device = StreamDevice(driver, PlainKernels(driver.device))
    for number in range(3):
        queue, gate = device.queue(str(number)), device.words.take()
        queue.wait(gate, 1)
        queue.signal(device.words.take(), 1)
    await asyncio.sleep(0.01)
    await device.close()
    await device.close()
    assert all(not stream.steps for stream in driver._streams)
    assert not driver._mapped


class WaitsForGates(FakeStreams):
    """Work is launched once all before it on its stream is through, as where a driver has to wait for memory."""

    def launch(self, stream, work, reads=False):
        while stream.steps and self.goes_on():
            time.sleep(0.001)
        super().launch(stream, work, reads)

    def goes_on(self):
        return True


class HangsForEver(WaitsForGates):
    is_over = False

    def wait(self, stream, address, at_least):
        stream.steps.append((True, lambda: self.is_over))

    def goes_on(self):
        return not self.is_over


@pytest.mark.parametrize("kind", [WaitsForGates, HangsForEver])
async def test_a_device_closes_though_its_driver_waits_behind_a_closed_gate(kind, monkeypatch):
    monkeypatch.setattr(streams, "DRAINED_WITHIN_S", 0.5 if kind is HangsForEver else 20.0)
    driver = kind()
    device = StreamDevice(driver, PlainKernels(driver.device), gates=True)
    queue, ran = device.queue("gated"), []
    queue.wait(device.words.take(), 1)
    queue.run(Program(lambda: ran.append(1), ran.append, StageMeter(), "behind", 0))
    await asyncio.sleep(0.02)
    async with asyncio.timeout(20):
        await device.close()
    assert bool(driver._mapped) == (kind is HangsForEver), "memory stays mapped while something may still use it"
    assert ran == ([] if kind is HangsForEver else [1])
    driver.is_over = True


@pytest.fixture(scope="module", params=SOME_FAMILIES)
def checkpoint(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    model = save_tiny(path, family=request.param)
    return path, references(model, [1, 17, 64], NUM_TOKENS)


@pytest.mark.parametrize(
    ("host", "layout", "micro_batches"),
    [
        *mostly_slow([(StreamHost, (1, 1), 1), (GatedHost, (2, 2), 2)]),
        *(thorough(StreamHost, (2, 2), 2), thorough(GatedHost, (1, 1), 1)),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
async def test_tokens_of_every_family_equal_transformers(checkpoint, layout, micro_batches, host):
    path, expected = checkpoint
    async with stream_engine(
        host=host,
        model=path,
        attention_workers=layout[0],
        expert_workers=layout[1],
        micro_batches=micro_batches,
        slot_rows=48,
    ) as engine:
        await check_equal(engine, expected, 0)


@pytest.mark.slow
async def test_tokens_equal_transformers_over_shared_memory(checkpoint):
    path, expected = checkpoint
    async with stream_engine("shm", model=path, attention_workers=2, expert_workers=2, micro_batches=2) as engine:
        await check_equal(engine, expected, 0)


async def test_tokens_equal_transformers_colocated(checkpoint):
    path, expected = checkpoint
    async with stream_engine(model=path, colocated=True) as engine:
        await check_equal(engine, expected, 0)


async def test_a_seat_that_is_mapped_anew_is_so_for_the_device_and_others_stay():
    driver = NothingDriver()
    device = StreamDevice(driver, PlainKernels(driver.device))
    landing = ShmLanding(3, SlotLayout(num_lanes=2, slot_rows=4, row_bytes=256), device)
    mapped, log = dict(driver._mapped), []
    driver.unmap_host = lambda memory: log.append(("unmapped", host_address(memory), memory.nbytes))
    driver.map_host = lambda memory: log.append(("mapped", host_address(memory), memory.nbytes))
    with landing.open(1):
        first, second, third = sorted(mapped)[-3:]
        stride = second - first
        assert log == [("unmapped", second, stride), ("mapped", second, stride)]
        assert third - second == stride
    landing.revoke(1)
    assert len(log) == 2, "what the device sees of it is nobody's until the next peer comes"


async def test_a_queue_made_anew_has_the_stream_of_the_one_before_it_for_which_kernels_keep_memory():
    driver = NothingDriver()
    device = StreamDevice(driver, PlainKernels(driver.device))
    first, other, again = device.queue("lane 0"), device.queue("lane 1"), device.queue("lane 0")
    assert again is not first
    assert again.stream is first.stream
    assert other.stream is not first.stream
    await device.close()


async def test_without_gates_no_work_lies_behind_one_that_is_closed():
    driver = Recorded()
    device = StreamDevice(driver, PlainKernels(driver.device))
    queue, gate, word = device.queue("held"), device.words.take(), device.words.take()
    for number in (1, 2):
        queue.wait(gate, number)
        queue.run(Program(partial(driver.log.append, number), pytest.fail, StageMeter(), "held", 0))
        queue.signal(word, number)
    await asyncio.sleep(0.02)
    assert driver.log == []
    device.words.open(gate, 1)
    await until(lambda: device.words.is_there(word, 1))
    await asyncio.sleep(0.02)
    assert driver.log == [1, ("write", word, 1)]
    device.words.open(gate, 2)
    await until(lambda: device.words.is_there(word, 2))
    assert driver.log[2:] == [2, ("write", word, 2)]
    await device.close()


@pytest.mark.parametrize(("sequences", "layers", "lanes"), [(4, 2, 5), thorough(128, 60, 3)])
@pytest.mark.parametrize("gates", [False, thorough(True)])
async def test_a_thousand_passes_leave_nothing_behind(sequences, layers, lanes, gates):
    figures = await measure(sequences, layers, lanes, steps=2, passes=1000, gates=gates)
    assert figures["bytes_left_at_most"] < 10_000, "ten for each pass"
    assert figures["launch_calls_per_step"] == lanes * (layers + 1), "a program for each layer and one at the end"
    assert figures["replay_calls_per_step"] == (0 if gates else lanes * layers), "a graph for each layer"


class Recorded(NothingDriver):
    """What was asked of the driver, in order; words by their number."""

    def __init__(self):
        super().__init__()
        self.log, self.at = [], 0

    def map_host(self, memory):
        self.at = super().map_host(memory) if not self.at else self.at
        return self.at

    def word(self, address):
        return (address - self.at) // WORD_BYTES

    def wait(self, stream, address, at_least):
        self.log.append(("wait", self.word(address), at_least))

    def write(self, stream, address, value):
        self.log.append(("write", self.word(address), value))
        super().write(stream, address, value)

    def unmap_host(self, memory): ...


async def test_a_pass_is_launched_as_the_lanes_say_it_and_no_further_than_they_may():
    """Programs, gates and flags in the order in which `LaneQueues` has them, each gate before what it holds."""
    driver = Recorded()
    device = StreamDevice(driver, PlainKernels(driver.device), gates=True)

    def says(what, reads=False):
        return Program(lambda: driver.log.append(what), pytest.fail, StageMeter(), what, 0, reads=reads)

    class Link:
        def packed(self, lane, turn): ...

    layers = [(says(f"layer {layer}"), says(f"shared {layer}")) for layer in range(4)]
    queues = LaneQueues(device, 1, [LanePrograms(layers, says("sample", reads=True), says("again"))])
    gate, packed, sampled, _ = range(4)
    queues.launch(0, 1, Link())
    await until(lambda: len(driver.log) >= 10)
    await asyncio.sleep(0.01)
    ahead = ["layer 0", ("write", packed, 1), "shared 0"]
    for layer in (1, 2, 3):
        ahead += [("wait", gate, layer), f"layer {layer}", ("write", packed, layer + 1), f"shared {layer}"]
    assert driver.log == ahead, "three layers, and one more since the first is packed"
    for turn in (1, 2, 3):
        queues.open(0, turn)
    await until(lambda: ("wait", gate, 4) in driver.log)
    assert "sample" not in driver.log, "it reads what is behind a closed gate"
    queues.open(0, 4)
    await queues.sampled(0)
    assert driver.log[-2:] == ["sample", ("write", sampled, 4)]
    await device.close()


class Watched(NothingDriver):
    """Tells of waits and writes, by word."""

    def __init__(self, waited, written):
        super().__init__()
        self.waited, self.written, self.at = waited, written, 0

    def map_host(self, memory):
        at = super().map_host(memory)
        self.at = self.at or at  # the words' memory is the first
        return at

    def wait(self, stream, address, at_least):
        self.waited((address - self.at) // WORD_BYTES, at_least)

    def write(self, stream, address, value):
        self.written((address - self.at) // WORD_BYTES, value)
        super().write(stream, address, value)


def on_the_fake_gpu(seed):
    def make(waited, written):
        device = FakeDevice(FakeWorld(seed))
        signalled = device.signalled
        device.signalled = lambda word, value: (written(word, value), signalled(word, value))
        return device

    return make


def over_a_driver_that_does_nothing(gates):
    return lambda *tell: StreamDevice((driver := Watched(*tell)), PlainKernels(driver.device), gates)


WAYS = [*map(on_the_fake_gpu, range(4)), *map(over_a_driver_that_does_nothing, (False, True))]


@pytest.mark.parametrize("make", WAYS, ids=["fake", "fake 1", "fake 2", "fake 3", "streams", "streams with gates"])
async def test_lanes_programs_flags_and_gates_are_in_the_order_of_the_fake_gpu(make):
    """Of every lane by itself; lanes may go on beside one another in any order."""
    num_layers, first, log, waited = 4, {0: 1, 1: 1}, ([], []), {}
    chance, loop = random.Random(1), asyncio.get_running_loop()

    def written(word, value):
        for lane, of_lane in enumerate(log):
            if word in (queues._lanes[lane].packed, queues._lanes[lane].sampled):
                of_lane.append(value)

    device = make(lambda word, value: waited.update({word: value}), written)

    def program(lane, what, turn):
        def run():
            gate, at_least = queues._lanes[lane].gate, first[lane] + turn - 1
            is_behind = device.words.is_there(gate, at_least) or waited.get(gate, 0) >= at_least
            log[lane].append((what, is_behind))

        return Program(run, pytest.fail, StageMeter(), what, lane, reads=what == "sample")

    class Link:
        def packed(self, lane, turn):
            loop.call_later(chance.random() / 500, queues.open, lane, turn)

    programs = [
        LanePrograms(
            [(program(lane, f"layer {turn}", turn), program(lane, "shared", turn)) for turn in range(num_layers)],
            program(lane, "sample", num_layers),
            program(lane, "again", 0),
        )
        for lane in first
    ]
    queues = LaneQueues(device, 1, programs)
    for _ in range(3):
        for lane in first:
            queues.launch(lane, first[lane], Link())
        for lane in first:
            await queues.sampled(lane)
            first[lane] += num_layers
    await device.close()
    wanted = []
    for since in range(1, 3 * num_layers, num_layers):
        for turn in range(num_layers):
            wanted += [(f"layer {turn}", True), since + turn, ("shared", True)]
        wanted += [("sample", True), since + num_layers - 1]
    assert log == (wanted, wanted)
