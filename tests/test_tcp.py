"""What only TCP can do to us: partial frames, full sockets, strangers, peers that stop reading or never speak."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import socket

import pytest
import uvloop

from msi.errors import ProtocolError, TransportError
from msi.net import tcp, tcp_endpoint
from msi.net.landing import seat_rows, seat_slots
from msi.net.link_proof import CHALLENGE_BYTES, PROOF_BYTES, PROVED_BYTES, Proofs
from msi.net.regions import HOST_MEMORY
from msi.net.slots import HEADER_BYTES, NOTE_BYTES, SlotLayout
from msi.net.tcp import GREETING, GREETING_MAGIC, HELLO, TcpTransport, split_address
from msi.net.tcp_endpoint import FRAME, FRAME_BYTES, FRAME_MAGIC
from msi.net.transport import Admission, CompletionKind
from tests.waiting import until

LAYOUT = SlotLayout(2, 64, 1 << 16)  # of 8 MB
SMALL = SlotLayout(1, 1, 128)
SLOT_BYTES = LAYOUT.slot_bytes


class Listening:
    """A transport that listens with one seat, and what it delivered."""

    async def start(self):
        self.transport = TcpTransport()
        self.landing = self.transport.register(1, LAYOUT, HOST_MEMORY)
        self.delivered = []
        self.transport.deliver(lambda endpoint, *what: self.delivered.append((endpoint, *what)))
        self.address = await self.transport.listen(self.accept)
        return self

    def accept(self, hello):
        if hello == b"go away":
            raise ProtocolError("we do not like you")
        return Admission(self.landing, 0, b"welcome")

    @property
    def immediates(self):
        return [immediate for _, kind, immediate, _ in self.delivered if kind is CompletionKind.IMMEDIATE]

    @property
    def closed(self):
        return [reason for _, kind, _, reason in self.delivered if kind is CompletionKind.CLOSED]

    @property
    def cut_off(self):
        return dict(self.transport.num_cut_off)


@pytest.fixture
async def listening():
    one = await Listening().start()
    yield one
    await one.transport.close()


@pytest.fixture
async def dialling():
    transport = TcpTransport()
    yield transport
    await transport.close()


async def stranger(listening):
    return await asyncio.open_connection(*split_address(listening.address))


async def raw_peer(listening):
    """A peer of bytes: through the handshake, whatever it writes now are frames."""
    reader, writer = await stranger(listening)
    challenge = (await reader.readexactly(GREETING.size + CHALLENGE_BYTES))[GREETING.size :]
    said = Proofs(None).hello(challenge, b"anna", LAYOUT.encode())
    writer.write(GREETING.pack(GREETING_MAGIC, tcp.VERSION, HELLO, len(said), LAYOUT.encode()) + said)
    await reader.readexactly(GREETING.size + PROOF_BYTES + len(b"welcome"))
    return reader, writer


async def hang_up(writer):
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


async def test_frames_in_pieces_of_every_size_land_whole(listening):
    _, writer = await raw_peer(listening)
    writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    stream = b""
    for number in range(40):
        rows = number * 7 % 4
        body = bytes([number]) * (HEADER_BYTES + number + rows * LAYOUT.row_bytes)
        stream += FRAME.pack(FRAME_MAGIC, number, number % 2, HEADER_BYTES + number, rows) + body
    at, size = 0, 1
    while at < len(stream):
        writer.write(stream[at : at + size])
        await writer.drain()
        if size < 300:
            await asyncio.sleep(0)
        at, size = at + size, size * 7 % 4099 + 1
    await until(lambda: len(listening.immediates) == 40)
    assert listening.immediates == list(range(40))
    for number in (38, 39):
        lane, rows = number % 2, number * 7 % 4
        assert bytes(listening.landing.headers[0][lane][: HEADER_BYTES + number]) == bytes([number]) * (128 + number)
        landed = seat_slots(listening.landing, 0)[lane][: rows * LAYOUT.row_bytes]
        assert bytes(landed) == bytes([number]) * len(landed)
    await hang_up(writer)
    await until(lambda: listening.closed)
    assert listening.closed == ["its process is gone or closed the connection"]


async def test_what_lies_at_several_connections_is_handed_over_in_one_call_and_before_an_end(dialling):
    transport, calls, peers = TcpTransport(), [], []
    landing = transport.register(5, SMALL, HOST_MEMORY)
    transport.deliver(
        lambda endpoint, kind, *_: calls.append([(endpoint.seat, kind)]),
        lambda landed: calls.append([(endpoint.seat, immediate) for endpoint, immediate, _ in landed]),
    )
    seats = iter(range(5))
    address = await transport.listen(lambda hello: Admission(landing, next(seats), b""))
    for seat in range(5):
        peers.append(await dialling.connect(address, b"anna", dialling.register(1, SMALL, HOST_MEMORY), 0))
        await until(lambda seat=seat: len(calls) == seat + 1)
    calls.clear()
    for number in range(2):  # the loop has no turn in between
        for peer in peers:
            peer.post(0, number, num_rows=1)
    peers[0].close()
    await until(lambda: calls and calls[-1] == [(0, CompletionKind.CLOSED)] and sum(map(len, calls)) == 11)
    assert len(calls) <= 3, "what lay there was told of one by one"
    landed = [one for call in calls[:-1] for one in call]
    assert sorted(landed) == [(seat, number) for seat in range(5) for number in range(2)]
    await transport.close()


async def test_an_end_in_mid_frame_is_said_and_its_immediate_never_delivered(listening):
    _, writer = await raw_peer(listening)
    writer.write(FRAME.pack(FRAME_MAGIC, 1, 0, 200, 1) + b"x" * (199 + LAYOUT.row_bytes))
    await hang_up(writer)
    await until(lambda: listening.closed)
    assert listening.closed == ["its process is gone or closed the connection, in mid-frame"]
    assert not listening.immediates


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        (b"x" * FRAME_BYTES, "not a frame"),
        (FRAME.pack(FRAME_MAGIC, 1, 2, HEADER_BYTES, 0), "out of bounds"),
        (FRAME.pack(FRAME_MAGIC, 1, 0, HEADER_BYTES - 1, 1), "out of bounds"),
        (FRAME.pack(FRAME_MAGIC, 1, 0, HEADER_BYTES + NOTE_BYTES + 1, 1), "out of bounds"),
        (FRAME.pack(FRAME_MAGIC, 1, 0, HEADER_BYTES, 65), "out of bounds"),
        (FRAME.pack(FRAME_MAGIC, 1, 2**32 - 1, 2**32 - 1, 2**32 - 1), "out of bounds"),
    ],
)
async def test_what_is_no_frame_cuts_its_sender_off_and_is_counted(listening, frame, reason):
    reader, writer = await raw_peer(listening)
    writer.write(FRAME.pack(FRAME_MAGIC, 7, 0, HEADER_BYTES, 0) + b"ok" * 64 + frame + b"y" * 100)
    with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
        await reader.readexactly(1)
    assert listening.immediates == [7]
    assert listening.closed == [f"it sent what is {reason}"]
    assert listening.cut_off == {reason: 1}
    assert bytes(listening.landing.headers[0][0]) == b"ok" * 64 + bytes(NOTE_BYTES)
    assert not any(seat_rows(listening.landing, 0)[:1000])
    await hang_up(writer)


async def test_several_megabytes_both_ways_at_once_through_full_sockets(listening, dialling):
    landing = dialling.register(1, LAYOUT, HOST_MEMORY)
    came = []
    dialling.deliver(lambda endpoint, kind, immediate, reason: came.append(immediate))
    ours = await dialling.connect(listening.address, b"anna", landing, 0)
    await until(lambda: listening.delivered)
    theirs = listening.delivered[0][0]
    there, back = os.urandom(SLOT_BYTES), os.urandom(SLOT_BYTES)
    ours.out_rows.host()[:SLOT_BYTES] = there
    theirs.out_rows.host()[:SLOT_BYTES] = back

    def post():
        for number in range(3):
            ours.post(0, number, LAYOUT.slot_rows)
            ours.post(0, 100 + number)  # kept in its place behind what the socket could not take

    posting = asyncio.create_task(asyncio.to_thread(post))
    for number in range(3):
        theirs.post(0, number, LAYOUT.slot_rows)
    await posting
    await until(lambda: len(listening.immediates) == 6 and len(came) == 3, 30)
    assert listening.immediates == [0, 100, 1, 101, 2, 102]
    assert came == [0, 1, 2]
    assert bytes(seat_slots(listening.landing, 0)[0]) == there
    assert bytes(seat_slots(landing, 0)[0]) == back


async def test_a_peer_that_stops_reading_never_blocks_a_post_and_is_given_up_at_a_limit(listening, monkeypatch):
    monkeypatch.setattr(tcp_endpoint, "MAX_BACKLOG", 100)
    _, writer = await raw_peer(listening)
    writer.transport.pause_reading()
    await until(lambda: listening.delivered)
    endpoint = listening.delivered[0][0]

    def post():
        for number in range(100):
            endpoint.post(0, number, LAYOUT.slot_rows)

    with pytest.raises(TransportError, match="writes behind"):
        post()
    endpoint.close()
    await hang_up(writer)


@pytest.mark.parametrize(
    ("greeting", "reason"),
    [
        (b"GET / HTTP/1.1\r\nHost: somebody\r\n\r\n", "refused"),
        (os.urandom(1000), "refused"),
        (GREETING.pack(GREETING_MAGIC, 99, HELLO, 0, SMALL.encode()), "refused"),
        (GREETING.pack(GREETING_MAGIC, tcp.VERSION, HELLO, 1 << 30, SMALL.encode()), "refused"),
        (GREETING.pack(GREETING_MAGIC, tcp.VERSION, HELLO, 0, bytes(12)), "refused"),
        (GREETING.pack(GREETING_MAGIC, tcp.VERSION, HELLO, 0, b"\x08\0\0\0" + b"\x80\xff\xff\xff" * 2), "refused"),
        (GREETING.pack(GREETING_MAGIC, tcp.VERSION, HELLO, 0, b"\x01\0\0\0" * 3), "refused"),
        (GREETING.pack(GREETING_MAGIC, tcp.VERSION, 77, 0, SMALL.encode()), "refused"),
        (GREETING.pack(GREETING_MAGIC, tcp.VERSION, HELLO, 7, SMALL.encode()) + b"go away", "refused"),
        (
            GREETING.pack(GREETING_MAGIC, tcp.VERSION, HELLO, PROVED_BYTES + 7, SMALL.encode())
            + bytes(PROVED_BYTES)
            + b"go away",
            "refused",
        ),
        (b"", "no hello"),
    ],
)
async def test_strangers_are_cut_off_counted_and_change_nothing(listening, dialling, greeting, reason, monkeypatch):
    monkeypatch.setattr(tcp, "CONNECT_TIMEOUT_S", 0.5)
    reader, writer = await stranger(listening)
    writer.write(greeting)
    with contextlib.suppress(ConnectionError):
        await asyncio.wait_for(reader.read(), 5)  # to its end
    await until(lambda: listening.cut_off)
    assert next(iter(listening.cut_off)).startswith(reason)
    await hang_up(writer)
    assert not listening.delivered
    ours = await dialling.connect(listening.address, b"anna", dialling.register(1, SMALL, HOST_MEMORY), 0)
    ours.out_rows.host()[:4] = b"fine"
    ours.post(0, 5, num_rows=1)
    await until(lambda: listening.immediates == [5])
    assert seat_rows(listening.landing, 0)[:4] == b"fine"


async def test_whoever_never_answers_is_named_within_the_time_limit(dialling):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"tcp://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(TransportError, match=rf"{address}: did not answer within 0\.2 s"):
            await dialling.connect(address, b"anna", dialling.register(1, SMALL, HOST_MEMORY), 0, timeout_s=0.2)


@pytest.mark.parametrize("address", ["shm://x", "tcp://", "tcp://host", "tcp://host:99999", "nonsense"])
async def test_what_is_no_address_is_said(dialling, address):
    with pytest.raises(TransportError, match="is not a TCP address"):
        await dialling.connect(address, b"anna", dialling.register(1, SMALL, HOST_MEMORY), 0)


async def test_a_reset_connection_is_closed_with_a_reason(listening):
    _, writer = await raw_peer(listening)
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    writer.transport.abort()
    await until(lambda: listening.closed)
    assert "Connection reset" in listening.closed[0]


async def test_a_revoked_peer_is_cut_off_with_its_next_frame(listening, dialling):
    ours = await dialling.connect(listening.address, b"anna", dialling.register(1, SMALL, HOST_MEMORY), 0)
    ours.out_rows.host()[:4] = b"seen"
    ours.post(0, 1, num_rows=1)
    await until(lambda: listening.immediates)
    listening.landing.revoke(0)
    ours.post(0, 2, num_rows=1)
    await until(lambda: listening.closed)
    assert listening.immediates == [1]
    assert listening.closed == ["its seat was revoked"]
    assert bytes(seat_rows(listening.landing, 0)[:4]) == bytes(4)


async def test_no_descriptor_is_left_behind():
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        one, other = await Listening().start(), TcpTransport()
        await other.connect(one.address, b"anna", other.register(1, SMALL, HOST_MEMORY), 0)
        await other.close()
        await one.transport.close()
        await one.transport.close()  # idempotent
    assert len(os.listdir("/proc/self/fd")) <= before


@pytest.mark.parametrize(
    "scenario",
    [
        test_frames_in_pieces_of_every_size_land_whole,
        test_an_end_in_mid_frame_is_said_and_its_immediate_never_delivered,
        test_several_megabytes_both_ways_at_once_through_full_sockets,
        test_a_reset_connection_is_closed_with_a_reason,
        test_whoever_never_answers_is_named_within_the_time_limit,
    ],
)
def test_the_same_on_uvloop(scenario):
    async def run():
        given = {"listening": await Listening().start(), "dialling": TcpTransport()}
        try:
            await scenario(**{name: given[name] for name in inspect.signature(scenario).parameters})
        finally:
            await given["dialling"].close()
            await given["listening"].transport.close()

    uvloop.run(run())
