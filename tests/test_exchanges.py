"""Very many exchanges over each transport, every row and header of them checked on arrival."""

from __future__ import annotations

import asyncio
import random
import zlib

import pytest

from msi.net.contract_pair import LEFT, RIGHT, Pair, Subject
from msi.net.inproc import InprocTransport
from msi.net.rdma.transport import RdmaTransport
from msi.net.shm import ShmTransport, is_available
from msi.net.slots import HEADER_BYTES
from msi.net.tcp import TcpTransport
from msi.net.transport import CompletionKind
from tests.everyday import IS_THOROUGH
from tests.loopback_verbs import Fabric, LoopbackDriver

NOISE = random.Random(0).randbytes(1 << 16)
WORDS = 1 << 32
COUNT = 100_000 if IS_THOROUGH else 10_000


class End:
    """One side of a pair: checks what lands in its seat, and writes the next."""

    def __init__(self, side, seat, endpoint, out_layout):
        self.endpoint, self.out_layout, self.layout = endpoint, out_layout, side.layout
        stride = side.landing.rows.num_bytes // side.landing.num_seats
        self.rows = side.landing.rows.host()[seat * stride :]
        self.headers = side.landing.headers[seat]
        self.out_rows = endpoint.out_rows.host()

    def post(self, lane, number):
        """Any number of rows, from none to a slot's; header and immediate say which, and what is in them."""
        num_rows = number * 7 % (self.out_layout.slot_rows + 1)
        num_bytes = num_rows * self.out_layout.row_bytes
        at = number * 131 % (len(NOISE) - num_bytes)
        content, start = NOISE[at : at + num_bytes], lane * self.out_layout.slot_bytes
        self.out_rows[start : start + num_bytes] = content
        said = b"%d %d %d " % (number, num_rows, zlib.crc32(content))
        self.endpoint.out_headers[lane][: len(said)] = said
        self.endpoint.post(lane, number % WORDS, num_rows, note_bytes=0 if num_rows else 1)

    def check(self, lane, number, immediate):
        said = bytes(self.headers[lane][:HEADER_BYTES]).split(b" ")
        num_rows, start = int(said[1]), lane * self.layout.slot_bytes
        found = zlib.crc32(self.rows[start : start + num_rows * self.layout.row_bytes])
        assert (immediate, int(said[0]), int(said[2])) == (number % WORDS, number, found), f"exchange {number}"


KINDS = {
    "inproc": InprocTransport,
    "shm": ShmTransport,
    "tcp": TcpTransport,
    "rdma": lambda: RdmaTransport(LoopbackDriver(FABRIC)),
}
FABRIC = Fabric()


@pytest.mark.slow
@pytest.mark.skipif(is_available() is not None, reason=str(is_available()))
@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
async def test_every_row_of_very_many_exchanges_is_right(make):
    """Immediates wrap around on the way, in both directions."""
    pair = Pair(Subject(make, ""))
    ours, theirs = await pair.connect(seat=2)
    left, right = End(pair.left, 0, theirs, RIGHT), End(pair.right, 2, ours, LEFT)
    first = WORDS - COUNT // 2
    done = asyncio.get_running_loop().create_future()
    number = first

    def landed(end, answer):
        def handle(endpoint, kind, immediate, reason):
            nonlocal number
            try:
                assert kind is CompletionKind.IMMEDIATE, reason
                end.check(number % 2, number, immediate)
                if end is right:
                    number += 1
                if number < first + COUNT:
                    answer(number % 2, number)
                else:
                    done.set_result(None)
            except BaseException as error:
                done.set_exception(error)

        return handle

    pair.left.transport.deliver(landed(left, left.post))
    pair.right.transport.deliver(landed(right, right.post))
    right.post(number % 2, number)
    await done
    pair.left.transport.deliver(lambda *completion: None)
    pair.right.transport.deliver(lambda *completion: None)
    await pair.right.transport.close()
    await pair.left.transport.close()
