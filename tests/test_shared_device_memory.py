"""Rows in a device's memory that processes of one host hand each other: proved on the fake device."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from msi.device.fake.device import FakeDevice
from msi.device.fake.world import FakeWorld
from msi.errors import TransportError
from msi.net import shm
from msi.net.contract import RULES, check_rule
from msi.net.contract_pair import LEFT, Pair, Subject
from msi.net.regions import HOST_MEMORY
from msi.net.shm import ShmTransport
from msi.net.transport import Admission, CompletionKind
from tests.fake_engine import FakeHost, fake_engine
from tests.reference import references, save_tiny
from tests.test_fake_transport import DeviceRows
from tests.test_tokens import NUM_TOKENS, check_equal
from tests.waiting import until

pytestmark = pytest.mark.skipif(shm.is_available() is not None, reason=str(shm.is_available()))


def subject():
    device = FakeDevice(FakeWorld(0))
    return Subject(ShmTransport, "shm://nobody", DeviceRows(device), timeout_s=20)


@pytest.mark.parametrize("rule", RULES, ids=[rule.sentence for rule in RULES])
async def test_it_is_true_that(rule):
    await check_rule(rule, subject())


WRITER = """
import asyncio, sys
from msi.device.fake.device import FakeDevice
from msi.device.fake.world import FakeWorld
from msi.net.contract_pair import RIGHT
from msi.net.shm import ShmTransport

async def main():
    device, transport = FakeDevice(FakeWorld(1)), ShmTransport()
    landing = transport.register(1, RIGHT, device)
    answered = asyncio.Event()
    transport.deliver(lambda *completion: answered.set())
    endpoint = await transport.connect(sys.argv[1], b"writer", landing, 0)
    for word, letter in ((1, 97), (2, 98)):
        with device.memory.opened():
            endpoint.out_rows.tensor()[:256] = letter
        endpoint.post(0, word, num_rows=2)
        await asyncio.wait_for(answered.wait(), 20)
        answered.clear()
    endpoint.out_rows.tensor()[0] = 1  # the host is no device: this ends the process

asyncio.run(main())
"""


@pytest.mark.slow
async def test_another_process_writes_into_the_memory_until_that_is_taken_from_it():
    rows = DeviceRows(FakeDevice(FakeWorld(0)))
    transport = ShmTransport()
    landing = transport.register(2, LEFT, rows.allocator)
    came = []
    transport.deliver(lambda *completion: came.append(completion))
    address = await transport.listen(lambda hello: Admission(landing, 1, b""))
    stride = landing.rows.num_bytes // 2
    before = rows.address(landing.rows)
    command = [sys.executable, "-c", WRITER, address]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as writer:  # noqa: ASYNC220  # it is to be awaited here
        await until(lambda: len(came) == 2, 30)
        endpoint = came[0][0]
        assert rows.read(landing.rows, stride, 257) == b"a" * 256 + b"\0"
        assert rows.read(landing.rows, 0, 256) == bytes(256)  # the other seat
        landing.revoke(1)
        endpoint.post(0, 1)
        await until(lambda: len(came) == 3, 30)
        assert rows.read(landing.rows, stride, 256) == bytes(256)  # what it wrote since is seen no more
        assert rows.address(landing.rows) == before
        endpoint.post(0, 2)
        await until(lambda: came[-1][1] is CompletionKind.CLOSED, 30)
        assert writer.wait(20) < 0
    await transport.close()


async def test_who_cannot_write_a_devices_memory_is_told_so_and_takes_no_seat():
    there, here = ShmTransport(), ShmTransport()
    landing = there.register(1, LEFT, FakeDevice(FakeWorld(0)))
    address = await there.listen(lambda hello: Admission(landing, 0, b""))
    with pytest.raises(TransportError, match="its rows land in the memory of a device, and what this process computes"):
        await here.connect(address, b"anna", here.register(1, LEFT, HOST_MEMORY), 0)
    await here.close()
    await there.close()


async def test_no_descriptor_is_left_behind():
    before = set(os.listdir("/proc/self/fd"))
    for _ in range(3):
        pair = Pair(subject())
        await pair.connect()
        await pair.right.transport.close()
        await pair.left.transport.close()
        del pair
    assert len(set(os.listdir("/proc/self/fd")) - before) == 0


class HandingHost(FakeHost):
    """Its rows are the fake device's, and its peers' devices write them."""

    def new_transport(self, assignment):
        return ShmTransport()


@pytest.mark.slow
async def test_tokens_are_transformers_over_memory_of_devices_that_write_each_others(tmp_path):
    expected = references(save_tiny(tmp_path), [1, 17, 64], NUM_TOKENS)
    async with fake_engine(
        FakeWorld(0), HandingHost, model=tmp_path, attention_workers=2, expert_workers=2, micro_batches=2, slot_rows=48
    ) as engine:
        await check_equal(engine, expected, 0)
