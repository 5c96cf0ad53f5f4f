"""Regions: what the host may touch, what a device sees, and the rows of slots as one tensor."""

from __future__ import annotations

import os
from random import Random

import pytest
import torch

from msi.device.fake.memory import DeviceMemory
from msi.device.regions import DeviceRegion, HostTensors, slot_rows
from msi.errors import ConfigError, ProtocolError
from msi.net.landing import PlainLanding, seat_slots
from msi.net.regions import HOST_MEMORY
from msi.net.shared_memory import SharedRegion
from msi.net.slots import SlotLayout, aligned_row_bytes

LAYOUT = SlotLayout(num_lanes=2, slot_rows=3, row_bytes=256)


def test_a_region_of_the_host_and_its_tensor_are_the_same_memory():
    region = HostTensors().region(256)
    assert (region.num_bytes, region.is_host, bytes(region.host())) == (256, True, bytes(256))
    region.tensor()[7] = 3
    region.host()[8] = 4
    assert region.host()[7] == 3
    assert region.tensor()[8] == 4


def test_memory_of_a_device_refuses_the_host_in_a_sentence():
    region = DeviceRegion(torch.zeros(256, dtype=torch.uint8), "cuda:0")
    with pytest.raises(ConfigError, match="256 bytes are memory of cuda:0, which the host neither reads nor writes"):
        region.host()
    with pytest.raises(ConfigError, match="allocated to be nobody else's"):
        region.export()
    assert region.tensor().shape == (256,)


def test_a_transport_that_writes_host_memory_refuses_a_devices():
    class Device(HostTensors):
        def region(self, num_bytes):
            return DeviceRegion(torch.zeros(num_bytes, dtype=torch.uint8), "cuda:0")

    with pytest.raises(ConfigError, match="use a transport that registers a device's memory"):
        PlainLanding(2, LAYOUT, Device())


def test_plain_memory_belongs_to_no_device_and_has_no_descriptor():
    region = HOST_MEMORY.region(128)
    with pytest.raises(ConfigError, match="128 bytes belong to no device"):
        region.tensor()
    with pytest.raises(ConfigError, match="have no descriptor"):
        region.export()


def test_memory_that_is_not_there_is_said():
    with pytest.raises(ConfigError, match=r"cannot map .* bytes: .*; use fewer or smaller slots"):
        HOST_MEMORY.region(1 << 62)


def test_shared_memory_is_exported_as_a_descriptor_of_it():
    with SharedRegion.create(4096) as region:
        fd = region.export()
    with SharedRegion.of_peer(fd, 4096, "peer") as same:
        region.host()[5] = 9
        assert same.host()[5] == 9
    os.close(fd)


def test_a_devices_descriptor_is_handed_out_as_a_copy():
    with SharedRegion.create(4096) as shared:
        fd = DeviceRegion(torch.zeros(4096, dtype=torch.uint8), "cuda:0", shared.fd).export()
        assert fd != shared.fd
        assert os.fstat(fd).st_ino == os.fstat(shared.fd).st_ino
        os.close(fd)


def test_rows_of_slots_are_seen_where_they_land():
    landing = PlainLanding(2, LAYOUT, HostTensors())
    rows = slot_rows(landing.rows, 2, LAYOUT)
    assert rows.shape == (2, 2, 3, 256)
    seat_slots(landing, 1)[0][2 * 256 + 5] = 7
    assert rows[1, 0, 2, 5] == 7
    assert int(rows.sum()) == 7


def test_a_layout_travels_as_12_bytes_and_no_unsound_one_is_taken():
    assert SlotLayout.decode(LAYOUT.encode()) == LAYOUT
    for payload in (b"", bytes(12), LAYOUT.encode() + b"x", b"\x01\0\0\0" * 3, b"\x09\0\0\0\x01\0\0\0\x80\0\0\0"):
        with pytest.raises(ProtocolError, match="offers"):
            SlotLayout.decode(payload)


def test_rows_are_whole_lines():
    assert [aligned_row_bytes(num_bytes) for num_bytes in (1, 128, 129)] == [128, 128, 256]


def test_a_transport_that_cannot_write_a_fake_devices_own_memory_says_so():
    class OwnMemory(HostTensors):
        def region(self, num_bytes):
            return DeviceRegion(DeviceMemory(Random(0)).allocate(num_bytes), "the fake device")

    with pytest.raises(ConfigError, match="bytes are memory of the fake device, which the host neither"):
        PlainLanding(1, LAYOUT, OwnMemory())
