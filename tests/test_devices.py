"""The contract of queues, gates and words, on the devices that are here; and what is the CPU's alone."""

from __future__ import annotations

import asyncio
import contextlib
import threading

import pytest
import torch

from msi.device.choice import open_device
from msi.device.compute_thread import ComputeThread, Program, as_failure
from msi.device.contract import CHECKS, Checked, nobody_is_told_within_a_call
from msi.device.cpu import CpuDevice
from msi.device.cuda import CudaDevice, why_unavailable
from msi.device.fake.device import FakeDevice
from msi.device.fake.streams import FakeStreams
from msi.device.fake.world import FakeWorld
from msi.device.host_words import HostWords
from msi.device.stream_device import StreamDevice
from msi.kernels.plain import PlainKernels
from msi.meter import StageMeter
from msi.simulator.clock import run_virtual
from msi.simulator.device import SimulatedDevice, SimulatedProgram
from tests.inline_device import InlineDevice
from tests.waiting import until

DEVICES = {
    "cpu": lambda: CpuDevice(num_threads=1),
    "cuda": CudaDevice,
    "fake": lambda: FakeDevice(FakeWorld(seed=1)),
    "cuda streams": lambda: open_device("cuda", 0, cuda_queues="streams"),
    "streams with gates": lambda: StreamDevice(FakeStreams(), PlainKernels(torch.device("cpu")), gates=True),
    "streams": lambda: StreamDevice(FakeStreams(), PlainKernels(torch.device("cpu"))),
}


def program(run, failed):
    return Program(run, failed, StageMeter(), "checked", 0)


def reading(run, failed):
    return Program(run, failed, StageMeter(), "checked", 0, reads=True)


each_check = pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)


@each_check
@pytest.mark.parametrize("name", DEVICES)
async def test_a_device_keeps_the_contract(name, check):
    if name.startswith("cuda") and why_unavailable() is not None:
        pytest.skip(str(why_unavailable()))
    device = DEVICES[name]()
    await asyncio.wait_for(check(Checked(device, reading if isinstance(device, StreamDevice) else program)), 20)
    await device.close()


@pytest.mark.parametrize("check", [check for check in CHECKS if check is not nobody_is_told_within_a_call])
@pytest.mark.parametrize("gates", [False, True])
async def test_what_is_launched_onto_streams_keeps_the_contract(check, gates):
    """But for when the host sees what: it may do so after what comes behind a signal has run."""
    driver = FakeStreams(seed=2)

    def launched(run, failed):
        def on_the_stream():
            try:
                run()
            except BaseException as error:
                failed(as_failure(error))

        return program(lambda: driver.call(on_the_stream), failed)

    device = StreamDevice(driver, PlainKernels(driver.device), gates)
    await asyncio.wait_for(check(Checked(device, launched)), 20)
    await device.close()


@each_check
async def test_a_device_that_computes_where_it_is_told_to_keeps_the_contract(check):
    await asyncio.wait_for(check(Checked(InlineDevice(), program)), 20)


@each_check
def test_a_simulated_device_keeps_the_contract(check):
    def simulated(run, failed):
        def through(duration_s):
            try:
                run()
            except BaseException as error:
                failed(as_failure(error))

        return SimulatedProgram(lambda: 1e-4, through, "checked", 0)

    async def main():
        await check(Checked(SimulatedDevice(), simulated))

    run_virtual(main(), limit_s=20)


@pytest.fixture
async def cpu():
    device = CpuDevice(num_threads=1)
    yield device
    await device.close()


@pytest.mark.parametrize("name", ["cpu", "cuda"])
async def test_threads_tell_followers_before_what_comes_behind_the_signal_starts(name):
    if name == "cuda" and why_unavailable() is not None:
        pytest.skip(str(why_unavailable()))
    device = DEVICES[name]()
    on, word, queue, seen = Checked(device, program), device.words.take(), device.queue("followed"), []
    device.follow(word, lambda value: seen.append(len(on.log)))
    for value in (1, 2, 3):
        queue.run(on.raises(ValueError(value)) if value == 1 else on.says(value))
        queue.signal(word, value)
    await on.through(queue)
    assert seen == [1, 2, 3]
    await device.close()


class Held:
    """A program that computes until it is let go."""

    def __init__(self, queue):
        self.begun, self.go = threading.Event(), threading.Event()
        queue.run(program(self.run, None))

    def run(self):
        self.begun.set()
        assert self.go.wait(10)


async def test_what_opened_first_runs_first_when_the_device_is_free_again(cpu):
    on = Checked(cpu, program)
    held = Held(cpu.queue("held"))
    gates, queues = [cpu.words.take() for _ in range(3)], [cpu.queue(str(number)) for number in range(3)]
    for number, (gate, queue) in enumerate(zip(gates, queues, strict=True)):
        queue.wait(gate, 1)
        queue.run(on.says(number))
        queue.run(on.says(number))
    for number in (1, 2, 0):
        cpu.words.open(gates[number], 1)
    held.go.set()
    for queue in queues:
        await on.through(queue)
    assert on.log == [1, 1, 2, 2, 0, 0], "and what lies between two gates is not broken up"


async def test_a_gate_that_opens_while_its_queue_still_computes_keeps_its_place(cpu):
    on = Checked(cpu, program)
    gates, queues = [cpu.words.take() for _ in range(2)], [cpu.queue(str(number)) for number in range(2)]
    held = Held(queues[0])
    for number, (gate, queue) in enumerate(zip(gates, queues, strict=True)):
        queue.wait(gate, 1)
        queue.run(on.says(number))
    assert await asyncio.to_thread(held.begun.wait, 10)
    cpu.words.open(gates[0], 1)
    cpu.words.open(gates[1], 1)
    held.go.set()
    await on.through(queues[1])
    assert on.log == [0, 1]


async def test_times_are_metered_and_those_of_what_raised_are_not(cpu):
    meter, spans, failures = StageMeter(), [], []
    cpu.tracer = type("Tracer", (), {"span": lambda self, *span: spans.append(span)})()
    queue = cpu.queue("metered")
    works = Program(lambda: None, failures.append, meter, "works", 3)
    queue.run(works)
    queue.run(works)
    queue.run(Program(lambda: 1 / 0, failures.append, meter, "raises", 3))
    await Checked(cpu, program).through(queue)
    assert meter.count == 2
    assert meter.total_s == pytest.approx(cpu.busy_s)
    assert works.spent_s == meter.recent[-1]
    assert [(name, lane) for name, lane, _, _ in spans] == [("works", 3)] * 2
    assert [type(error) for error in failures] == [ZeroDivisionError]


async def test_a_device_that_cannot_work_fails_all_work_and_drains_its_queues():
    words, failures = HostWords(), []

    @contextlib.contextmanager
    def broken():
        raise OSError("no such device")
        yield

    thread = ComputeThread("broken", words, broken, lambda *_: None)
    queue, word = thread.queue(), words.take()
    queue.run(Program(lambda: None, failures.append, StageMeter(), "work", 0))
    queue.signal(word, 1)
    await until(lambda: words.is_there(word, 1))
    assert [str(error) for error in failures] == ["no such device"]
    thread.close()
    words.close()


async def test_closing_waits_for_the_program_in_progress_and_drops_the_rest():
    device, log = CpuDevice(num_threads=1), []
    queue = device.queue("closed")
    held = Held(queue)
    queue.run(program(lambda: log.append("dropped"), log.append))
    assert await asyncio.to_thread(held.begun.wait, 10)
    closing = asyncio.ensure_future(device.close())
    await asyncio.sleep(0.01)
    assert not closing.done()
    held.go.set()
    await closing
    await device.close()
    assert log == []


async def test_words_cost_memory_only_once_they_are_taken(cpu):
    assert len({cpu.words.take() for _ in range(1000)}) == 1000
