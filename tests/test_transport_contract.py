"""One contract for every transport: the same rules, whatever moves the bytes; and what a broken one is told."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import threading

import pytest

from msi.device.ready import Ready
from msi.errors import TransportError
from msi.net import shm
from msi.net.auto import AutoTransport
from msi.net.contract import RULES, ContractBroken, check_rule, check_transport
from msi.net.contract_pair import Pair, Subject
from msi.net.inproc import InprocTransport
from msi.net.landing import seat_rows
from msi.net.link_proof import CHALLENGE_BYTES, Proofs
from msi.net.rdma.transport import RdmaTransport
from msi.net.regions import HOST_MEMORY
from msi.net.shm import ShmTransport
from msi.net.slots import SlotLayout
from msi.net.tcp import TcpTransport
from msi.net.transport import Admission, CompletionKind
from msi.simulator.clock import VirtualClockLoop
from msi.simulator.transport import SimulatedNetwork, SimulatedTransport
from tests.loopback_verbs import LoopbackDriver
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


POLLER = Ready()
TAKER = threading.Thread(target=POLLER.get, name="poller", daemon=True)  # does nothing but take what comes
TAKER.start()


def polled_shm():
    return ShmTransport(poller=POLLER)


def polled_inproc():
    return InprocTransport(poller=POLLER)


def polled_rdma():
    return RdmaTransport(POLLED_CARDS, poller=POLLER)


POLLED_CARDS = LoopbackDriver()


class Fabric(Far):
    """On a host of its own, which has a card."""

    cards = LoopbackDriver()

    def __init__(self):
        super().__init__()
        self._rdma = RdmaTransport(self.cards)


NO_TCP = "tcp://127.0.0.1:1"
SUBJECTS = {
    "inproc": Subject(InprocTransport, "inproc://nobody"),
    "shm": Subject(ShmTransport, "shm://nobody"),
    "inproc, polled": Subject(polled_inproc, "inproc://nobody", taker=TAKER),
    "shm, polled": Subject(polled_shm, "shm://nobody", taker=TAKER),
    "rdma, polled": Subject(polled_rdma, "rdma://127.0.0.1:1", taker=TAKER),
    "tcp": Subject(TcpTransport, NO_TCP),
    "tls": Subject(lambda: TcpTransport(key=bytes(32), encrypt=True), NO_TCP),
    "near": Subject(Near, NO_TCP),
    "far": Subject(Far, NO_TCP),
    "fabric": Subject(Fabric, NO_TCP),
}

pytestmark = pytest.mark.skipif(shm.is_available() is not None, reason=str(shm.is_available()))


@pytest.mark.parametrize("subject", SUBJECTS.values(), ids=SUBJECTS)
@pytest.mark.parametrize("rule", RULES, ids=[rule.sentence for rule in RULES])
async def test_it_is_true_that(rule, subject):
    await check_rule(rule, subject)


# -- transports that keep all rules but one ---------------------------------------------------------------------------


class Breaking(InprocTransport):
    """In-process, but for what `post` makes of a post."""

    async def connect(self, *args, **options):
        endpoint = await super().connect(*args, **options)
        post = endpoint.post
        endpoint.post = lambda *args, **options: type(self).broken(post, *args, **options)
        return endpoint


class ForgetsRows(Breaking):
    def broken(post, lane, immediate, num_rows=0, note_bytes=0):
        post(lane, immediate, max(0, num_rows - 1), note_bytes)


class ForgetsNotes(Breaking):
    def broken(post, lane, immediate, num_rows=0, note_bytes=0):
        post(lane, immediate, num_rows, 0)


class Truncates(Breaking):
    def broken(post, lane, immediate, num_rows=0, note_bytes=0):
        post(lane, immediate & 0x7FFFFFFF, num_rows, note_bytes)


class MixesLanes(Breaking):
    def broken(post, lane, immediate, num_rows=0, note_bytes=0):
        post(0, immediate, num_rows, note_bytes)


class Doubles(Breaking):
    def broken(post, lane, immediate, num_rows=0, note_bytes=0):
        post(lane, immediate, num_rows, note_bytes)
        if immediate == 2999:
            post(lane, immediate, num_rows, note_bytes)


class Loses(Breaking):
    def broken(post, lane, immediate, num_rows=0, note_bytes=0):
        if immediate != 2998:
            post(lane, immediate, num_rows, note_bytes)


class SwallowsErrors(Breaking):
    def broken(post, *args, **options):
        with contextlib.suppress(TransportError):
            post(*args, **options)


class IsDeaf(InprocTransport):
    def deliver(self, handler, together=None):
        super().deliver(lambda *completion: completion[1] is CompletionKind.CONNECTED or handler(*completion), together)


BROKEN = {
    ForgetsRows: "header, note and rows are there when their immediate is: rows of post 1",
    ForgetsNotes: "header, note and rows are there when their immediate is: header and note of post 1",
    Truncates: "both directions carry every 32-bit immediate: what came to the left: expected [2147483648], found [0]",
    MixesLanes: "header, note and rows are there when their immediate is",
    Doubles: "immediates arrive in order and none is lost: completions: expected 3000, found 3001",
    Loses: "immediates arrive in order and none is lost: it did not happen within 0.2 s",
    SwallowsErrors: "what was posted before a close arrives before it: a post after the close raised nothing",
    IsDeaf: "a hello and its welcome reach the other side: it did not happen within 0.2 s",
}


@pytest.mark.parametrize(("kind", "said"), BROKEN.items(), ids=[kind.__name__ for kind in BROKEN])
async def test_a_transport_that_breaks_a_rule_is_told_which(kind, said):
    with pytest.raises(ContractBroken) as broken:
        await check_transport(kind, nobody="inproc://nobody", timeout_s=0.2)
    assert said in str(broken.value).replace("AssertionError: ", "")


async def test_whoever_brings_a_transport_of_their_own_needs_one_call():
    await check_transport(InprocTransport, nobody="inproc://nobody")


def test_the_contract_needs_no_test_framework_and_no_torch():
    code = "import sys, msi.net.contract; assert not {'pytest', 'torch', 'tests'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# -- what is special about one kind -----------------------------------------------------------------------------------


async def linked(make):
    """Two transports of a kind, and the endpoints of a connection between them."""
    pair = Pair(Subject(make, ""))
    ours, theirs = await pair.connect()
    return pair, ours, theirs


@pytest.mark.parametrize(("kind", "endpoint"), [(Near, "ShmEndpoint"), (Fabric, "RdmaEndpoint"), (Far, "TcpEndpoint")])
async def test_auto_takes_shared_memory_within_a_host_rdma_or_tcp_across(kind, endpoint):
    pair, ours, theirs = await linked(kind)
    assert (type(ours).__name__, type(theirs).__name__) == (endpoint, endpoint)
    await pair.right.transport.close()
    await pair.left.transport.close()


async def test_auto_takes_tcp_where_cards_do_not_reach_each_other_and_says_so_once(caplog):
    pair = Pair(Subject(Fabric, ""))
    caplog.set_level("INFO", "msi.net.auto")
    numbers = range(next(Fabric.cards.fabric.numbers), 1 << 24)
    Fabric.cards.fabric.is_silent = numbers
    try:
        address = await pair.address()
        for seat in (0, 1):
            pair._next_seat = 0
            ours = await pair.right.transport.connect(address, b"anna", pair.right.landing, seat)
            kinds = [one.kind for one in await pair.left.take(3)]
            assert type(ours).__name__ == "TcpEndpoint"
            assert kinds == [CompletionKind.CONNECTED, CompletionKind.CLOSED, CompletionKind.CONNECTED]
    finally:
        Fabric.cards.fabric.is_silent = set()
    (said,) = caplog.messages
    assert "is reached by TCP: it is on another host, and by RDMA the peer's card does not acknowledge" in said
    await pair.right.transport.close()
    await pair.left.transport.close()


async def test_a_seat_serves_a_peer_on_this_host_after_one_by_rdma():
    """The memory of the seat is another's then: what the card was told of it is over."""
    pair = Pair(Subject(Fabric, ""))
    by_rdma, _ = await pair.connect(b"anna", seat=0)
    pair.write(by_rdma, pair.left.layout, 0, b"far", b"far")
    by_rdma.post(0, 1, num_rows=1)
    await pair.left.immediates(1)
    pair.left.landing.revoke(0)
    by_rdma.close()
    await pair.left.take(1)
    pair._next_seat = 0
    pair.right.transport._identity = pair.left.transport._identity
    by_shm, _ = await pair.connect(b"bert", seat=1)
    pair.write(by_shm, pair.left.layout, 0, b"near", b"near")
    by_shm.post(0, 2, num_rows=1)
    await pair.left.immediates(1)
    assert type(by_shm).__name__ == "ShmEndpoint"
    assert pair.left.rows(0, 0, 4) == b"near"
    await pair.right.transport.close()
    await pair.left.transport.close()


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
        assert await answer(address, challenge=os.urandom(100)) == b"\x00a challenge of 100 bytes"
        assert b"descriptors" in await answer(address)
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
        reply = await answer(address, fds=[fd, doorbell])
        os.close(fd)
        os.close(doorbell)
        assert b"sealed" in reply
    finally:
        await transport.close()


async def answer(address, *, challenge=bytes(CHALLENGE_BYTES), fds=()):
    """To a hello with such descriptors, or to a challenge that is none."""
    proofs, loop = Proofs(None), asyncio.get_running_loop()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
        stranger.setblocking(False)
        stranger.connect("\0" + address.removeprefix("shm://"))
        stranger.send(challenge)
        reply = await asyncio.wait_for(loop.sock_recv(stranger, 4096), 5)
        if reply[:1] != shm.CHALLENGED:
            return reply
        said = proofs.hello(reply[1 : 1 + CHALLENGE_BYTES], b"hello", LAYOUT.encode())
        socket.send_fds(stranger, [LAYOUT.encode() + said], fds)
        return await asyncio.wait_for(loop.sock_recv(stranger, 4096), 5)


PEER = """
import asyncio, sys
from msi.net.auto import AutoTransport
from msi.net.regions import HOST_MEMORY
from msi.net.slots import SlotLayout

async def main():
    transport = AutoTransport("127.0.0.1")
    landing = transport.register(1, SlotLayout(2, 16, 128), HOST_MEMORY)
    endpoint = await transport.connect(sys.argv[1], b"anna", landing, 0)
    endpoint.post(0, 7)
    await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", [ShmTransport, TcpTransport])
async def test_what_a_killed_process_posted_arrives_and_then_its_end(kind):
    transport, came = kind(), []
    landing = transport.register(1, LAYOUT, HOST_MEMORY)
    transport.deliver(lambda endpoint, *what: came.append(what))
    address = await transport.listen(lambda hello: Admission(landing, 0, b""))
    with subprocess.Popen([sys.executable, "-c", PEER, address]) as peer:  # noqa: ASYNC220  # it is awaited below
        await until(lambda: len(came) == 2, 30)
        peer.kill()
        await until(lambda: len(came) == 3, 10)
        assert came[1:] == [
            (CompletionKind.IMMEDIATE, 7, ""),
            (CompletionKind.CLOSED, 0, "its process is gone or closed the connection"),
        ]
    await transport.close()


async def test_shm_leaves_no_descriptor_behind():
    before = set(os.listdir("/proc/self/fd"))
    for _ in range(3):
        pair, *endpoints = await linked(ShmTransport)
        await pair.right.transport.close()
        await pair.left.transport.close()
        del pair, endpoints
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
