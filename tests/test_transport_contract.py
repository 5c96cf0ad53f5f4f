"""One contract for every transport: the same test bodies, whatever moves the bytes."""

from __future__ import annotations

import asyncio
import ctypes
import os
import socket
import threading
import time
from typing import NamedTuple

import pytest

from msi.errors import ProtocolError, TransportError
from msi.net import shm
from msi.net.auto import AutoTransport
from msi.net.inproc import InprocTransport
from msi.net.landing import seat_rows, seat_slots
from msi.net.regions import HOST_MEMORY
from msi.net.shm import ShmTransport
from msi.net.slots import HEADER_BYTES, NOTE_BYTES, ROW_ALIGNMENT, SlotLayout
from msi.net.tcp import TcpTransport
from msi.net.transport import Admission, CompletionKind, Endpoint
from msi.simulator.clock import VirtualClockLoop
from msi.simulator.transport import SimulatedNetwork, SimulatedTransport
from tests.waiting import until

LAYOUT = SlotLayout(2, 16, 128)


class Near(AutoTransport):
    """On this host."""

    def __init__(self):
        super().__init__("127.0.0.1")


class Far(Near):
    """On a host of its own."""

    def __init__(self):
        super().__init__()
        self._identity = str(id(self))


TRANSPORTS = {"inproc": InprocTransport, "shm": ShmTransport, "tcp": TcpTransport, "near": Near, "far": Far}

pytestmark = pytest.mark.skipif(shm.is_available() is not None, reason=str(shm.is_available()))


class Completion(NamedTuple):
    endpoint: Endpoint
    kind: CompletionKind
    immediate: int
    reason: str


class Recorded:
    """A transport, and what it has delivered and nobody has taken yet."""

    def __init__(self, transport):
        self.transport = transport
        self.delivered = []
        transport.deliver(lambda *completion: self.delivered.append(Completion(*completion)))

    def __getattr__(self, name):
        return getattr(self.transport, name)


class Pair:
    """Two transports of a kind, the first of which listens with two seats."""

    def __init__(self, make):
        self.left, self.right = Recorded(make()), Recorded(make())
        self.left_landing = self.left.register(2, LAYOUT, HOST_MEMORY)
        self.right_landing = self.right.register(3, LAYOUT, HOST_MEMORY)
        self.hellos = []
        self.next_seat = 0

    def accept(self, hello):
        if hello == b"go away":
            raise ProtocolError("we do not like you")
        self.hellos.append(hello)
        self.next_seat += 1
        return Admission(self.left_landing, self.next_seat - 1, b"welcome " + hello)

    async def connect(self, hello=b"anna", seat=2):
        """The right-hand endpoint and the left-hand one."""
        address = await self.left.listen(self.accept) if not self.hellos else self.address
        self.address = address
        ours = await self.right.connect(address, hello, self.right_landing, seat)
        (completion,) = await take(self.left, 1)
        assert completion.kind is CompletionKind.CONNECTED
        return ours, completion.endpoint


@pytest.fixture(params=TRANSPORTS)
def make(request):
    return TRANSPORTS[request.param]


@pytest.fixture
async def pair(make):
    pair = Pair(make)
    yield pair
    await pair.right.close()
    await pair.left.close()
    await pair.left.close()  # idempotent


async def take(recorded, count):
    await until(lambda: len(recorded.delivered) >= count)
    assert len(recorded.delivered) == count
    taken, recorded.delivered = recorded.delivered, []
    return taken


async def test_hello_and_welcome_reach_the_other_side(pair):
    ours, theirs = await pair.connect(b"anna")
    assert (theirs.peer, ours.peer) == (b"anna", b"welcome anna")
    assert (ours.seat, theirs.seat) == (2, 0)


async def test_a_refusal_carries_its_reason(pair):
    address = await pair.left.listen(pair.accept)
    with pytest.raises(TransportError, match="we do not like you"):
        await pair.right.connect(address, b"go away", pair.right_landing, 0)


async def test_nobody_there_is_an_error_that_names_the_address(pair):
    names = {InprocTransport: "inproc://nobody", ShmTransport: "shm://nobody"}
    name = names.get(type(pair.left.transport), "tcp://127.0.0.1:1")
    with pytest.raises(TransportError, match=name):
        await pair.right.connect(name, b"anna", pair.right_landing, 0)


async def test_bytes_are_there_when_their_immediate_is(pair):
    ours, theirs = await pair.connect()
    for round_number in range(50):
        content = bytes([round_number]) * (5 * LAYOUT.row_bytes)
        header = bytes([100 + round_number]) * (HEADER_BYTES + round_number)
        LAYOUT.split_rows(ours.out_rows.host())[1][: len(content)] = content
        ours.out_headers[1][: len(header)] = header
        ours.post(1, round_number, num_rows=5, note_bytes=round_number)
        (completion,) = await take(pair.left, 1)
        assert completion == (theirs, CompletionKind.IMMEDIATE, round_number, "")
        assert seat_slots(pair.left_landing, 0)[1][: len(content)] == content
        assert pair.left_landing.headers[0][1][: len(header)] == header
        assert pair.left_landing.rows.host()[LAYOUT.slot_bytes :][: len(content)] == content


async def test_both_directions_and_every_32_bit_immediate(pair):
    ours, theirs = await pair.connect()
    for immediate in (0, 1, 2**31, 2**32 - 1):
        ours.post(0, immediate)
        theirs.out_rows.host()[0:4] = b"back"
        theirs.post(0, immediate, num_rows=1)
        assert [c.immediate for c in await take(pair.left, 1)] == [immediate]
        assert [c.immediate for c in await take(pair.right, 1)] == [immediate]
        assert seat_rows(pair.right_landing, 2)[0:4] == b"back"


async def test_immediates_arrive_in_order_and_none_is_lost(pair):
    ours, _ = await pair.connect()
    for immediate in range(3000):
        ours.post(0, immediate)
        if immediate % 500 == 0:
            await asyncio.sleep(0)
    assert [c.immediate for c in await take(pair.left, 3000)] == list(range(3000))


async def test_what_was_posted_before_a_close_arrives_before_it(pair):
    ours, theirs = await pair.connect()
    ours.post(0, 7)
    ours.close()
    ours.close()  # idempotent
    completions = await take(pair.left, 2)
    assert [c.kind for c in completions] == [CompletionKind.IMMEDIATE, CompletionKind.CLOSED]
    assert completions[1].reason
    with pytest.raises(TransportError):
        ours.post(0, 8)
    with pytest.raises(TransportError):
        theirs.post(0, 8)


async def test_what_comes_before_there_is_a_handler_is_kept_for_it(make):
    early, right = make(), make()
    landing = early.register(1, LAYOUT, HOST_MEMORY)
    address = await early.listen(lambda hello: Admission(landing, 0, b""))
    ours = await right.connect(address, b"anna", right.register(1, LAYOUT, HOST_MEMORY), 0)
    ours.post(0, 1)
    await asyncio.sleep(0.05)
    completions = await take(Recorded(early), 2)
    assert [c.kind for c in completions] == [CompletionKind.CONNECTED, CompletionKind.IMMEDIATE]
    await right.close()
    await early.close()


async def test_a_post_from_another_thread_arrives_on_the_loop(pair):
    ours, _ = await pair.connect()
    threads = []
    pair.left.transport.deliver(lambda *completion: threads.append(threading.current_thread()))

    def post():
        for immediate in range(100):
            ours.post(0, immediate)

    await asyncio.to_thread(post)
    await until(lambda: len(threads) == 100)
    assert set(threads) == {threading.current_thread()}


async def test_closing_while_another_thread_posts_is_an_error_there_and_nothing_else(pair):
    ours, _ = await pair.connect()

    is_closing = threading.Event()

    def post():
        while not is_closing.is_set():
            ours.post(0, 1)
            time.sleep(0)
        while True:
            ours.post(0, 2)

    posting = asyncio.create_task(asyncio.to_thread(post))
    await asyncio.sleep(0.01)
    is_closing.set()
    ours.close()
    with pytest.raises(TransportError, match="closed"):
        await asyncio.wait_for(posting, 5)


async def test_a_revoked_seat_reads_zero_and_what_its_peer_writes_is_not_seen(pair):
    ours, _ = await pair.connect(b"anna", seat=0)
    ours.out_headers[0][0:4] = b"seen"
    ours.out_rows.host()[0:4] = b"seen"
    ours.post(0, 1, num_rows=1)
    await take(pair.left, 1)
    pair.left_landing.revoke(0)
    assert reads_zero(pair.left_landing, 0)
    ours.out_headers[0][0:4] = b"late"
    ours.out_rows.host()[0:4] = b"late"
    ours.post(0, 2, num_rows=1)
    await asyncio.sleep(0.05)
    assert reads_zero(pair.left_landing, 0)


def reads_zero(landing, seat):
    return not any(seat_rows(landing, seat)) and not any(map(any, landing.headers[seat]))


async def test_seats_are_apart(pair):
    first, _ = await pair.connect(b"anna", seat=0)
    second, _ = await pair.connect(b"bert", seat=1)
    for endpoint, letter in ((first, b"a"), (second, b"b")):
        for memory in (endpoint.out_rows.host(), *endpoint.out_headers):
            memory[:] = letter * len(memory)
        for lane in range(LAYOUT.num_lanes):
            endpoint.post(lane, lane, LAYOUT.slot_rows, NOTE_BYTES)
    await take(pair.left, 4)
    for seat, letter in enumerate((b"a", b"b")):
        for memory in (seat_rows(pair.left_landing, seat), *pair.left_landing.headers[seat]):
            assert bytes(memory) == letter * len(memory)


async def test_lanes_are_apart_and_rows_start_aligned(pair):
    ours, _ = await pair.connect(b"anna", seat=0)
    for lane, letter in enumerate((b"a", b"b")):
        LAYOUT.split_rows(ours.out_rows.host())[lane][:] = letter * LAYOUT.slot_bytes
        ours.out_headers[lane][:4] = letter * 4
    ours.post(1, 7, num_rows=LAYOUT.slot_rows)
    await take(pair.left, 1)
    ours.post(0, 8, num_rows=2)
    await take(pair.left, 1)
    first, second = seat_slots(pair.left_landing, 0)
    assert bytes(second) == b"b" * LAYOUT.slot_bytes
    assert bytes(first[: 2 * LAYOUT.row_bytes]) == b"a" * (2 * LAYOUT.row_bytes)
    assert [bytes(header[:4]) for header in pair.left_landing.headers[0]] == [b"aaaa", b"bbbb"]
    for memory in (pair.left_landing.rows.host(), ours.out_rows.host()):
        assert ctypes.addressof(ctypes.c_char.from_buffer(memory)) % ROW_ALIGNMENT == 0


@pytest.mark.parametrize(("kind", "endpoint"), [(Near, "ShmEndpoint"), (Far, "TcpEndpoint")])
async def test_auto_takes_shared_memory_within_a_host_and_tcp_across(kind, endpoint):
    pair = Pair(kind)
    ours, theirs = await pair.connect()
    assert (type(ours).__name__, type(theirs).__name__) == (endpoint, endpoint)
    await pair.right.close()
    await pair.left.close()


async def test_auto_says_what_a_peer_on_another_host_lacks():
    transport = Near()
    with pytest.raises(TransportError, match="is on another host and offers no TCP address"):
        await transport.connect("shm://name@elsewhere", b"anna", transport.register(1, LAYOUT, HOST_MEMORY), 0)
    await transport.close()


async def test_shm_cuts_off_whoever_does_not_speak_the_handshake():
    transport = ShmTransport()
    try:
        landing = transport.register(1, LAYOUT, HOST_MEMORY)
        address = await transport.listen(lambda hello: Admission(landing, 0, b""))
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
            stranger.setblocking(False)
            stranger.connect("\0" + address.removeprefix("shm://"))
            stranger.send(os.urandom(100))
            loop = asyncio.get_running_loop()
            reply = await asyncio.wait_for(loop.sock_recv(stranger, 4096), 5)
        assert reply[:1] == b"\x00"
        assert b"descriptors" in reply
    finally:
        await transport.close()


async def test_shm_refuses_memory_that_could_shrink_under_it():
    transport = ShmTransport()
    try:
        landing = transport.register(1, LAYOUT, HOST_MEMORY)
        address = await transport.listen(lambda hello: Admission(landing, 0, b""))
        fd = os.memfd_create("unsealed")
        os.ftruncate(fd, 1 << 20)
        doorbell = os.eventfd(0)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
            stranger.setblocking(False)
            stranger.connect("\0" + address.removeprefix("shm://"))
            socket.send_fds(stranger, [LAYOUT.encode() + b"hello"], [fd, doorbell])
            reply = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(stranger, 4096), 5)
        os.close(fd)
        os.close(doorbell)
        assert b"sealed" in reply
    finally:
        await transport.close()


async def test_shm_leaves_no_descriptor_behind():
    before = set(os.listdir("/proc/self/fd"))
    for _ in range(3):
        pair = Pair(ShmTransport)
        await pair.connect()
        await pair.right.close()
        await pair.left.close()
        del pair
    assert len(set(os.listdir("/proc/self/fd")) - before) == 0


def test_the_simulated_transport_delivers_in_order_after_its_latency():
    async def scenario():
        loop = asyncio.get_running_loop()
        network = SimulatedNetwork(lambda num_rows: 0.001 * (1 + num_rows))
        left, right = SimulatedTransport(network, "left"), SimulatedTransport(network, "right")
        came = []
        left.deliver(lambda endpoint, kind, immediate, reason: came.append((kind, immediate, loop.time())))
        landing = left.register(1, LAYOUT, HOST_MEMORY)
        address = await left.listen(lambda hello: Admission(landing, 0, b"welcome"))
        ours = await right.connect(address, b"anna", right.register(1, LAYOUT, HOST_MEMORY), 0)
        ours.out_rows.host()[0:3] = b"abc"
        ours.post(0, 1, num_rows=3)
        ours.post(0, 2)
        await asyncio.sleep(1)
        assert [(kind, immediate) for kind, immediate, _ in came] == [
            (CompletionKind.CONNECTED, 0), (CompletionKind.IMMEDIATE, 1), (CompletionKind.IMMEDIATE, 2),
        ]  # fmt: skip
        assert [time_s for _, _, time_s in came] == pytest.approx([0, 0.004, 0.004])
        assert seat_rows(landing, 0)[0:3] == b"abc"
        await right.close()
        await left.close()

    with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        runner.run(scenario())
