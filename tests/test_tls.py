"""Encrypted rows: who holds another key, or none, gets nowhere, and nobody on the way can read or change them."""

from __future__ import annotations

import asyncio
import contextlib
import ssl

import pytest

from msi.errors import ConfigError, TransportError
from msi.net.certificate import make_certificate
from msi.net.landing import seat_rows
from msi.net.regions import HOST_MEMORY
from msi.net.secret import NO_SECRET, Secret, Trust
from msi.net.slots import SlotLayout
from msi.net.tcp import TcpTransport, split_address
from msi.net.tls import RECORD_BYTES, _records
from msi.net.transport import Admission, CompletionKind
from tests.waiting import until

LAYOUT = SlotLayout(2, 64, 1 << 16)  # of 8 MB
KEY, OTHER = bytes(32), b"\x01" * 32
MARK = b"a row that nobody else may read " * 64


class Listening:
    def __init__(self, **options):
        self.transport = TcpTransport(**options)
        self.landing = self.transport.register(1, LAYOUT, HOST_MEMORY)
        self.admitted, self.delivered = [], []
        self.transport.deliver(lambda endpoint, *what: self.delivered.append(what))

    def accept(self, hello):
        self.admitted.append(hello)
        return Admission(self.landing, 0, b"welcome")

    def of(self, kind):
        return [what for what in self.delivered if what[0] is kind]


@contextlib.asynccontextmanager
async def two(ours, theirs):
    """One that listens, its address, and one that dials."""
    one, other = Listening(**ours), TcpTransport(**theirs)
    try:
        yield one, await one.transport.listen(one.accept), other
    finally:
        await other.close()
        await one.transport.close()


async def dial(transport, address):
    return await transport.connect(address, b"anna", transport.register(1, LAYOUT, HOST_MEMORY), 0, timeout_s=5)


@contextlib.asynccontextmanager
async def on_the_way(address, change=lambda number, passing: passing):
    """A machine between both: its address, and what passed it towards the listener. It sees each piece once."""
    host, port = split_address(address)
    passed, tasks, writers = bytearray(), set(), []

    async def pump(reader, writer, change):
        with contextlib.suppress(OSError):
            while piece := await reader.read(1 << 20):
                writer.write(change(piece))
                await writer.drain()
            writer.close()

    def towards(piece):
        piece = change(len(passed), piece)
        passed.extend(piece)
        return piece

    async def relay(reader, writer):
        there_reader, there_writer = await asyncio.open_connection(host, port)
        writers.extend((writer, there_writer))
        for one in (pump(reader, there_writer, towards), pump(there_reader, writer, bytes)):
            tasks.add(asyncio.create_task(one))

    server = await asyncio.start_server(relay, "127.0.0.1", 0)
    try:
        yield f"tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}", passed
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for writer in writers:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


@pytest.mark.parametrize(
    ("theirs", "complaint"),
    [
        ({"key": OTHER, "encrypt": True}, "the secret differs"),
        ({"key": KEY}, "only one of both ends is told to encrypt rows"),
        ({"key": None}, "only one of both ends is told to encrypt rows"),
    ],
)
async def test_who_has_another_key_or_does_not_encrypt_gets_a_sentence_and_no_seat(theirs, complaint):
    async with two({"key": KEY, "encrypt": True}, theirs) as (one, address, other):
        with pytest.raises(TransportError, match=complaint):
            await dial(other, address)
        await until(lambda: one.transport.num_cut_off)
        assert not one.admitted
        assert not one.delivered


async def test_who_encrypts_says_nothing_to_one_that_does_not():
    async with two({"key": KEY}, {"key": KEY, "encrypt": True}) as (one, address, other):
        with pytest.raises(TransportError, match="only one of both ends is told to encrypt rows"):
            await dial(other, address)
        assert not one.admitted


@pytest.mark.parametrize("encrypt", [True, False])
async def test_what_passes_can_be_read_on_the_way_only_where_it_is_not_encrypted(encrypt):
    options = {"key": KEY, "encrypt": encrypt}
    async with two(options, options) as (one, address, other), on_the_way(address) as (relay, passed):
        endpoint = await dial(other, relay)
        endpoint.out_rows.host()[: len(MARK)] = MARK
        endpoint.post(0, 7, num_rows=1)
        await until(lambda: one.of(CompletionKind.IMMEDIATE))
        assert bytes(seat_rows(one.landing, 0)[: len(MARK)]) == MARK
        assert len(passed) > LAYOUT.row_bytes
        assert (MARK in passed, b"anna" in passed) == (not encrypt, not encrypt)


async def test_what_was_changed_on_the_way_is_never_delivered():
    options = {"key": KEY, "encrypt": True}

    def change(at, passing):
        end = at + len(passing)
        if at <= 50_000 < end:
            passing = bytearray(passing)
            passing[50_000 - at] ^= 1
        return bytes(passing)

    async with two(options, options) as (one, address, other), on_the_way(address, change) as (relay, _):
        endpoint = await dial(other, relay)
        endpoint.post(0, 7, num_rows=1)
        await until(lambda: one.of(CompletionKind.CLOSED))
        assert not one.of(CompletionKind.IMMEDIATE)


async def test_more_than_a_socket_takes_arrives_whole_and_in_order():
    options = {"key": KEY, "encrypt": True}
    async with two(options, options) as (one, address, other):
        endpoint = await dial(other, address)
        rows = endpoint.out_rows.host()
        rows[:] = (bytes(range(251)) * (len(rows) // 251 + 1))[: len(rows)]
        for number in range(6):
            endpoint.post(number % 2, number, LAYOUT.slot_rows, 3 * number)
            endpoint.post(0, 100 + number)
        await until(lambda: len(one.of(CompletionKind.IMMEDIATE)) == 12)
        order = [immediate for number in range(6) for immediate in (number, 100 + number)]
        assert [immediate for _, immediate, _ in one.of(CompletionKind.IMMEDIATE)] == order
        assert bytes(seat_rows(one.landing, 0)) == bytes(rows)


def test_records_are_the_same_bytes_and_full_but_for_the_last():
    for sizes in ((20,), (20, 128, 3), (20, 128, 100_000, 20), (RECORD_BYTES, 1), (20, RECORD_BYTES, 5 * RECORD_BYTES)):
        pieces = [memoryview(bytes([number]) * size) for number, size in enumerate(sizes)]
        records = [bytes(record) for record in _records(pieces)]
        assert b"".join(records) == b"".join(pieces)
        assert {len(record) for record in records[:-1]} <= {RECORD_BYTES}
        assert 0 < len(records[-1]) <= RECORD_BYTES


async def test_frames_that_come_with_the_greeting_are_not_forgotten():
    options = {"key": KEY, "encrypt": True}
    async with two(options, options) as (one, address, other):
        came = []
        other.deliver(lambda endpoint, kind, immediate, reason: came.append(immediate))
        one.transport.deliver(
            lambda endpoint, kind, *_: endpoint.post(0, 9) if kind is CompletionKind.CONNECTED else None
        )
        await dial(other, address)
        await until(lambda: came == [9])


def test_a_certificate_follows_from_its_key_alone_and_is_one():
    certificate, private = make_certificate(KEY)
    assert make_certificate(KEY) == (certificate, private)
    assert make_certificate(OTHER)[0] != certificate
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=certificate)
    (found,) = context.get_ca_certs() or [None]
    assert found is None or found["subject"] == ((("commonName", "msi"),),)


def test_rows_between_hosts_are_encrypted_by_a_secret_or_not_at_all():
    with pytest.raises(ConfigError, match="`encrypt_rows` needs a secret"):
        NO_SECRET.check_encrypting()
    Trust(Secret("a secret of this test")).check_encrypting()
    with pytest.raises(ConfigError, match="needs a key"):
        asyncio.run(_without_key())


async def _without_key():
    TcpTransport(encrypt=True)
