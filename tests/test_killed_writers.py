"""A process that is killed while it writes rows, and comes back under the same name into the same seat."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest

from msi.net.regions import HOST_MEMORY
from msi.net.shm import ShmTransport, is_available
from msi.net.slots import SlotLayout
from msi.net.tcp import TcpTransport
from msi.net.transport import Admission, CompletionKind
from tests.waiting import until

LAYOUT = SlotLayout(1, 16, 1 << 16)  # a post is 1 MiB, which takes many writes of a socket
NUM_BYTES = LAYOUT.slot_bytes
WRITER = """
import asyncio, itertools, sys
from msi.net.auto import AutoTransport
from msi.net.regions import HOST_MEMORY
from msi.net.slots import SlotLayout

async def main():
    transport, answered = AutoTransport("127.0.0.1"), asyncio.Event()
    landing = transport.register(1, SlotLayout(1, 16, 1 << 16), HOST_MEMORY)
    transport.deliver(lambda *what: answered.set())
    endpoint = await transport.connect(sys.argv[1], b"anna", landing, 0)
    rows = endpoint.out_rows.host()
    for number in itertools.count():
        rows[:] = bytes([number % 256]) * len(rows)
        answered.clear()
        endpoint.post(0, number, 16)
        await answered.wait()

asyncio.run(main())
"""


@pytest.mark.slow
@pytest.mark.skipif(is_available() is not None, reason=str(is_available()))
@pytest.mark.parametrize("kind", [ShmTransport, TcpTransport])
async def test_what_a_writer_had_written_is_whole_its_end_is_told_once_and_its_next_life_is_served(kind):
    transport = kind()
    landing = transport.register(1, LAYOUT, HOST_MEMORY)
    rows = landing.rows.host()
    came, ends = [], []

    def completed(endpoint, what, immediate, reason):
        if what is CompletionKind.IMMEDIATE:
            assert immediate == len(came)
            assert bytes(rows[:NUM_BYTES]) == bytes([immediate % 256]) * NUM_BYTES
            came.append(immediate)
            endpoint.post(0, immediate)
        elif what is CompletionKind.CLOSED:
            ends.append(reason)

    transport.deliver(completed)
    try:
        address = await transport.listen(lambda hello: Admission(landing, 0, b""))
        for life in range(5):
            came.clear()
            command = [sys.executable, "-c", WRITER, address]
            with subprocess.Popen(command) as writer:  # noqa: ASYNC220  # it is awaited below
                await until(lambda: len(came) >= 10, 60)
                await asyncio.sleep(life * 0.0004)  # somewhere in a post
                writer.kill()
                await until(lambda life=life: len(ends) == life + 1, 30)
            landing.revoke(0)
            assert not any(rows[:NUM_BYTES])
        assert all(ends), ends
    finally:
        await transport.close()
