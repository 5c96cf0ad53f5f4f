"""The fake cards keep the contract of all transports, over memory that the host cannot touch."""

from __future__ import annotations

import pytest

from msi.device.fake.device import FakeDevice
from msi.device.fake.transport import FakeTransport
from msi.device.fake.world import FakeWorld
from msi.errors import ConfigError
from msi.net.contract import RULES, ContractBroken, check_rule
from msi.net.contract_pair import Subject
from msi.net.slots import SlotLayout
from tests.everyday import mostly_slow


class DeviceRows:
    """Regions in the memory of a fake device; implements `msi.net.contract_pair.Memory`."""

    def __init__(self, device):
        self.allocator = device

    def write(self, region, at, content):
        with self.allocator.memory.opened():
            for index, byte in enumerate(content):
                region.tensor()[at + index] = byte

    def read(self, region, at, num_bytes):
        with self.allocator.memory.opened():
            return bytes(region.tensor()[at : at + num_bytes].tolist())

    def address(self, region):
        return region.tensor().data_ptr()


def subject(seed, flush=None):
    device = FakeDevice(FakeWorld(seed))
    return Subject(lambda: FakeTransport(device, flush), "fake://nobody", DeviceRows(device), timeout_s=20)


@pytest.mark.parametrize("seed", mostly_slow(range(20), keep=2))
@pytest.mark.parametrize("rule", RULES, ids=[rule.sentence for rule in RULES])
async def test_it_is_true_that(rule, seed):
    await check_rule(rule, subject(seed))


@pytest.mark.parametrize("seed", range(5))
async def test_cards_that_do_not_flush_break_the_contract(seed):
    rule = next(rule for rule in RULES if "are there when their immediate is" in rule.sentence)
    with pytest.raises(ContractBroken, match="rows of post"):
        await check_rule(rule, subject(seed, flush=lambda: None))


async def test_memory_says_whether_it_is_to_be_flushed():
    device = FakeDevice(FakeWorld(0))
    region = device.region(128)
    assert region.flush is not None
    region.flush()
    assert device.num_flushes == 1
    assert device.adopt(memoryview(bytearray(128))).flush is None


async def test_rows_on_a_device_are_not_the_hosts():
    device = FakeDevice(FakeWorld(0))
    landing = FakeTransport(device).register(1, SlotLayout(1, 1, 128), device)
    with pytest.raises(ConfigError, match="which the host neither reads nor writes"):
        landing.rows.host()
