"""The fake device: memory that nobody but it may touch, writes that come late, and what it catches."""

from __future__ import annotations

import asyncio
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from msi.device.compute_thread import Program
from msi.device.fake.device import FakeDevice
from msi.device.fake.memory import DeviceMemory
from msi.device.fake.wire import BytesCopy, RowsCopy, Wire
from msi.device.fake.world import FakeWorld
from msi.meter import StageMeter
from tests import fake_pingpong
from tests.everyday import NUM_SEEDS, mostly_slow

EVERYDAY_SEEDS, SEEDS = 5, NUM_SEEDS
SEEDS_OF = mostly_slow([range(EVERYDAY_SEEDS), range(EVERYDAY_SEEDS, SEEDS)])


def program(run, failed=lambda error: None):
    return Program(run, failed, StageMeter(), "checked", 0)


# -- memory ------------------------------------------------------------------------------------------------------------

TOUCHING = """
import asyncio, faulthandler
import torch
from msi.device.fake.device import FakeDevice
from msi.device.fake.world import FakeWorld
from tests.test_fake_device import program

faulthandler.enable()

async def main():
    device = FakeDevice(FakeWorld(0))
    rows = device.zeros((4, 4), torch.float32)
    device.queue("lane").run(program(lambda: rows.fill_(7)))
    await device.world.quiet()
    print("a program may", flush=True)
    {touch}  # the line that is to blame

asyncio.run(main())
"""


TOUCHES = ["float(rows[0, 0])", "rows.numpy()[0, 0] = 1", "rows.clone()", "rows.zero_()"]


@pytest.mark.parametrize("touch", mostly_slow(TOUCHES, keep=2))
@pytest.mark.slow
def test_host_code_that_touches_device_memory_dies_at_its_line(tmp_path, touch):
    script = tmp_path / "touching.py"
    script.write_text(TOUCHING.format(touch=touch))
    line = next(number for number, text in enumerate(script.read_text().splitlines(), 1) if "to blame" in text)
    ended = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=60, cwd=Path(__file__).parent.parent,
        env={"PYTHONPATH": "."},
    )  # fmt: skip
    assert ended.stdout == "a program may\n", ended.stderr
    assert ended.returncode == -signal.SIGSEGV
    assert f'File "{script}", line {line} in main' in ended.stderr


def memory():
    return DeviceMemory(random.Random(0), capacity=1 << 20)


def test_memory_starts_as_zeros_and_is_nobody_elses():
    of = memory()
    first, second = of.allocate(100), of.allocate(100)
    with of.opened():
        first.fill_(1)
        assert first.sum() == 100
        assert second.sum() == 0
    assert of.free_bytes <= (1 << 20) - 200


def test_memory_that_is_not_there_cannot_be_allocated():
    with pytest.raises(MemoryError, match=r"1048577 bytes of 1048576 that are left on the fake device"):
        memory().allocate((1 << 20) + 1)


def test_memory_is_open_until_the_last_who_opened_it_is_through():
    of = memory()
    tensor = of.allocate(1)
    with of.opened():
        with of.opened():
            pass
        assert tensor[0] == 0


def test_what_a_card_has_written_is_seen_once_it_is_flushed():
    of = memory()
    rows = of.allocate(2)
    of.write_unseen(rows[:1], torch.ones(1, dtype=torch.uint8))
    of.write_unseen(rows, torch.full((2,), 2, dtype=torch.uint8))
    with of.opened():
        assert rows.tolist() == [0, 0]
    of.flush()
    with of.opened():
        assert rows.tolist() == [2, 2]


def test_what_a_card_has_written_may_be_seen_before():
    of = memory()
    rows = of.allocate(1)
    of.write_unseen(rows, torch.ones(1, dtype=torch.uint8))
    for _ in range(100):
        of.perhaps_show()
    with of.opened():
        assert rows[0] == 1


# -- devices and wires -------------------------------------------------------------------------------------------------


async def test_a_post_is_read_after_it_was_made_and_announced_when_all_is_written():
    world = FakeWorld(0)
    here, there = FakeDevice(world), FakeDevice(world)
    wire, seen = Wire(world), []
    rows, landed = here.upload(torch.arange(4)), there.zeros((4,), torch.int64)
    header, landed_header = bytearray(b"one"), bytearray(3)
    wire.post(
        RowsCopy(rows, here.memory, landed, there.memory),
        BytesCopy(memoryview(header), memoryview(landed_header)),
        lambda: seen.append(bytes(landed_header)),
    )
    header[:] = b"two"
    with here.memory.opened():
        rows += 1
    await world.quiet()
    assert seen == [b"two"], "so whoever posts leaves all as it is until an answer is there"
    there.flush()
    with there.memory.opened():
        assert landed.tolist() == [1, 2, 3, 4]


async def test_a_wire_that_is_cut_announces_nothing():
    world = FakeWorld(0)
    wire = Wire(world)
    wire.post(None, None, pytest.fail)
    wire.cut()
    await world.quiet()


async def test_the_host_sees_a_signal_after_other_queues_may_have():
    orders = set()
    for seed in range(20):
        world, order = FakeWorld(seed), []
        device = FakeDevice(world)
        word, first, second = device.words.take(), device.queue("first"), device.queue("second")
        device.follow(word, lambda value, order=order: order.append("host"))
        second.wait(word, 1)
        second.run(program(lambda order=order: order.append("queue")))
        first.signal(word, 1)
        await world.quiet()
        orders.add(tuple(order))
        await device.close()
    assert orders == {("host", "queue"), ("queue", "host")}


async def test_one_seed_is_one_order():
    async def order(seed):
        world, log = FakeWorld(seed), []
        device = FakeDevice(world)
        for name in range(4):
            queue = device.queue(str(name))
            for _ in range(4):
                queue.run(program(lambda name=name: log.append(name)))
        await world.quiet()
        return log

    orders = [await order(seed) for seed in (1, 2, 1)]
    assert orders[0] == orders[2] != orders[1]


async def test_what_a_step_raises_ends_the_world_and_is_raised_by_who_waits_for_it(caplog):
    world = FakeWorld(0)
    Wire(world).post(None, None, lambda: [][0])
    with pytest.raises(IndexError):
        await world.quiet()


async def test_what_is_queued_when_a_device_closes_is_dropped():
    world, log = FakeWorld(0), []
    device = FakeDevice(world)
    device.queue("closed").run(program(lambda: log.append("ran")))
    await device.close()
    await device.close()
    await world.quiet()
    assert log == []


# -- what it catches ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seeds", SEEDS_OF, ids=str)
def test_a_program_that_waits_for_all_it_must_is_right(seeds):
    runs = {seed: asyncio.run(fake_pingpong.play(seed)) for seed in seeds}
    assert set(runs.values()) == {fake_pingpong.RIGHT}, runs


@pytest.mark.parametrize("seeds", SEEDS_OF, ids=str)
def test_a_program_whose_gates_open_when_a_node_is_lost_runs_out(seeds):
    runs = {seed: asyncio.run(fake_pingpong.play(seed, dies=True)) for seed in seeds}
    assert set(runs.values()) == {fake_pingpong.DRAINED}, runs


@pytest.mark.parametrize("seeds", SEEDS_OF, ids=str)
@pytest.mark.parametrize("left_out", fake_pingpong.LEFT_OUT)
def test_each_synchronisation_that_is_left_out_is_caught_on_every_seed(left_out, seeds):
    runs = {seed: asyncio.run(fake_pingpong.play(seed, left_out)) for seed in seeds}
    assert set(runs.values()) <= {fake_pingpong.WRONG, fake_pingpong.STUCK}, runs
