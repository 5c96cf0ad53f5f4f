"""Shared memory: rings whose counts begin again, readers that do not read, and what a killed process leaves."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from msi.device.ready import Ready
from msi.errors import TransportError
from msi.net import shm
from msi.net.regions import HOST_MEMORY
from msi.net.shm import ShmTransport
from msi.net.shm_seats import RING_BYTES, RING_ENTRIES, Ring
from msi.net.transport import Admission, CompletionKind
from tests.test_transport_contract import LAYOUT, PEER
from tests.waiting import until

pytestmark = pytest.mark.skipif(shm.is_available() is not None, reason=str(shm.is_available()))


def test_a_ring_goes_on_where_the_32_bits_of_its_turns_begin_again():
    memory = memoryview(bytearray(RING_BYTES))
    writer, reader = Ring(memory), Ring(memory)
    writer._count = reader._count = first = 2**32 - 5
    memory.cast("Q")[2 * RING_ENTRIES] = first
    assert reader.drain() == []
    for lap in range(3):
        for number in range(RING_ENTRIES):
            assert writer.push(number)
        assert not writer.push(7), "it is full"
        assert [immediate for immediate, _ in reader.drain()] == list(range(RING_ENTRIES)), lap


async def test_a_peer_that_does_not_read_never_blocks_a_post_and_is_given_up_at_a_limit():
    ready = Ready()  # nobody takes what comes
    there, here = ShmTransport(poller=ready), ShmTransport()
    landing = there.register(1, LAYOUT, HOST_MEMORY)
    address = await there.listen(lambda hello: Admission(landing, 0, b""))
    there.deliver(lambda *completion: None)
    endpoint = await here.connect(address, b"anna", here.register(1, LAYOUT, HOST_MEMORY), 0)
    for number in range(RING_ENTRIES):
        endpoint.post(0, number)
    with pytest.raises(TransportError, match="is 8191 messages behind"):
        endpoint.post(0, 1)
    came = []
    there.deliver(lambda endpoint, kind, immediate, reason: came.append(immediate))
    there.take()
    assert [word for word in came if word] == list(range(1, RING_ENTRIES))
    endpoint.post(0, 2)
    await here.close()
    await there.close()
    ready.close()


@pytest.mark.slow
async def test_a_killed_process_leaves_no_descriptor_and_no_memory_of_its_own():
    transport, came = ShmTransport(), []
    landing = transport.register(1, LAYOUT, HOST_MEMORY)
    transport.deliver(lambda endpoint, *what: came.append(what))
    address = await transport.listen(lambda hello: Admission(landing, 0, b""))
    before, mapped = set(os.listdir("/proc/self/fd")), shared_maps()
    for life in range(2):
        with subprocess.Popen([sys.executable, "-c", PEER, address]) as peer:  # noqa: ASYNC220  # awaited below
            await until(lambda life=life: len(came) == 3 * life + 2, 60)
            peer.kill()
            await until(lambda life=life: len(came) == 3 * life + 3, 10)
        assert came[-1][0] is CompletionKind.CLOSED
        landing.revoke(0)
    came.clear()
    await until(lambda: set(os.listdir("/proc/self/fd")) <= before, 10)  # others' may go meanwhile
    assert shared_maps() == mapped
    await transport.close()


def shared_maps():
    """Of seats, in this process."""
    with open("/proc/self/maps") as maps:
        return sum("memfd:msi-seat" in line for line in maps)
