"""What runs in the virtual machine of `tools/rdma_vm.py`, on its two cards: `rdma_guest.py CHECK...`.

Knows no torch and no test framework, which take minutes there. Each check prints a line with what it took; one that
fails ends the program.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import functools
import itertools
import json
import os
import socket
import subprocess
import sys
import threading
import time
import zlib

from msi.device.ready import Ready
from msi.errors import TransportError
from msi.net.contract import RULES, check_rule
from msi.net.contract_pair import Subject
from msi.net.rdma.drivers import load_driver
from msi.net.rdma.options import RdmaOptions
from msi.net.rdma.transport import RdmaTransport
from msi.net.regions import HOST_MEMORY
from msi.net.slots import HEADER_BYTES, SlotLayout
from msi.net.transport import Admission, CompletionKind
from tests import rdma_least, rdma_roles
from tests.rdma_forks import Forked

CARDS = ("rxe0", "rxe1")
LAYOUT = SlotLayout(num_lanes=2, slot_rows=16, row_bytes=512)
WAIT_S = 60.0


@functools.cache
def poller():
    """Of this process, and the thread that does nothing but take what comes."""
    ready = Ready()
    taker = threading.Thread(target=ready.get, daemon=True)
    taker.start()
    return ready, taker


def transport(driver, card, **options):
    """`driver` may end in "-polled": immediates are taken by a thread as computes."""
    driver, _, is_polled = driver.partition("-")
    options = RdmaOptions(rdma_device=CARDS[card], **options)
    return RdmaTransport(load_driver(driver), options, poller=poller()[0] if is_polled else None)


# -- the contract, between the two cards ------------------------------------------------------------------------------


def contract(driver):
    cards = itertools.cycle((0, 1))
    taker = poller()[1] if driver.endswith("polled") else None
    subject = Subject(lambda: transport(driver, next(cards)), "rdma://127.0.0.1:1", timeout_s=WAIT_S, taker=taker)
    for rule in RULES:
        began = time.monotonic()
        asyncio.run(check_rule(rule, subject))
        print(f"  {time.monotonic() - began:.1f} s: {rule.sentence}", flush=True)


# -- two processes ----------------------------------------------------------------------------------------------------


class Echo:
    """Sends back what lands, once its checksum is right. Prints its address, and runs until its input ends."""

    def __init__(self, driver):
        self.transport = transport(driver, 1)
        self.landing = self.transport.register(1, LAYOUT, HOST_MEMORY)
        self.transport.deliver(self.completed)

    def completed(self, endpoint, kind, immediate, reason):
        if kind is not CompletionKind.IMMEDIATE:
            return
        lane, num_rows = immediate & 1, immediate >> 1 & 31
        num_bytes = num_rows * LAYOUT.row_bytes
        start = lane * LAYOUT.slot_bytes
        rows = self.landing.rows.host()[start : start + num_bytes]
        header = self.landing.headers[0][lane]
        assert not num_rows or bytes(header[:4]) == zlib.crc32(rows).to_bytes(4), f"checksum of {immediate}"
        endpoint.out_headers[lane][:HEADER_BYTES] = header[:HEADER_BYTES]
        endpoint.out_rows.host()[start : start + num_bytes] = rows
        endpoint.post(lane, immediate, num_rows)


class Mirror(Echo):
    """Sends words back, and as many rows, without a look at them."""

    def __init__(self, driver):
        super().__init__(driver)
        self.transport.deliver(self.completed, self.landed)

    def landed(self, landed):
        for endpoint, word, _ in landed:
            endpoint.post(0, word, word >> 1)


async def serve(kind, driver):
    echo = kind(driver)
    print(await echo.transport.listen(lambda hello: Admission(echo.landing, 0, b"")), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await echo.transport.close()


def server(serving, *drivers):
    """A process, and the line that it says first."""
    process = Forked(lambda: asyncio.run(serving(*drivers)), has_pipes=True)
    return process, process.stdout.readline().strip()


class Client:
    """Connected to an echo."""

    def __init__(self, driver, **options):
        self.transport = transport(driver, 0, **options)
        self.landing = self.transport.register(1, LAYOUT, HOST_MEMORY)
        self.completions = asyncio.Queue()
        self.loop = asyncio.get_running_loop()
        self.transport.deliver(
            lambda *completion: self.loop.call_soon_threadsafe(self.completions.put_nowait, completion[1:])
        )

    async def connect(self, address):
        self.endpoint = await self.transport.connect(address, b"hello", self.landing, 0, timeout_s=WAIT_S)

    def post(self, lane, number, num_rows):
        start, num_bytes = lane * LAYOUT.slot_bytes, num_rows * LAYOUT.row_bytes
        rows = number.to_bytes(4, "little") * (num_bytes // 4)
        self.endpoint.out_rows.host()[start : start + num_bytes] = rows
        self.endpoint.out_headers[lane][:4] = zlib.crc32(rows).to_bytes(4)
        immediate = number << 6 | num_rows << 1 | lane
        self.endpoint.post(lane, immediate, num_rows)
        return immediate, rows

    async def exchange(self, count):
        """Both lanes are away at a time; sizes from one row to all."""
        for number in range(0, count, 2):
            sent = [self.post(lane, number + lane, 1 + number * 7 % 16) for lane in (0, 1)]
            for lane in (0, 1):
                kind, immediate, reason = await asyncio.wait_for(self.completions.get(), WAIT_S)
                if kind is CompletionKind.CLOSED:
                    raise TransportError("the echo", reason)
                assert (kind, immediate) == (CompletionKind.IMMEDIATE, sent[lane][0]), (kind, immediate, reason)
                start = lane * LAYOUT.slot_bytes
                assert self.landing.rows.host()[start : start + len(sent[lane][1])] == sent[lane][1], number


def with_echo(scenario, kind=Echo):
    def check(ours, theirs):
        process, address = server(serve, kind, theirs)

        async def run():
            client = Client(ours)
            try:
                await client.connect(address)
                await scenario(client, process)
            finally:
                await client.transport.close()

        try:
            asyncio.run(run())
        finally:
            process.end(WAIT_S)

    return check


@with_echo
async def exchanges(client, process):
    await client.exchange(2000)


@with_echo
async def briefly(client, process):
    await client.exchange(400)


@with_echo
async def killed(client, process):
    """While it writes: its death is known within a second, and all that came before is whole."""
    await client.exchange(4)
    writing = asyncio.create_task(client.exchange(1 << 20))
    await asyncio.sleep(0.3)
    assert not writing.done(), writing
    process.kill()
    began = time.monotonic()
    try:
        await writing
    except TransportError as error:
        assert time.monotonic() - began < 1, "its death was known late"
        print(f"  closed: {error.reason}")
    else:
        raise AssertionError("nobody said that it was killed")


@with_echo
async def silent(client, process):
    """A host that answers no more is lost when it does not acknowledge."""
    await client.exchange(4)
    with losing("100%"):
        client.post(0, 9, 1)
        began = time.monotonic()
        kind, _, reason = await asyncio.wait_for(client.completions.get(), WAIT_S)
        assert kind is CompletionKind.CLOSED, kind
        print(f"  closed after {time.monotonic() - began:.2f} s: {reason}")


@with_echo
async def lossy(client, process):
    with losing("5%"):
        await client.exchange(200)


@contextlib.contextmanager
def losing(share):
    """So many of the packets that the first card sends. Control connections go another way."""
    discipline = ["dev", "rdma0", "root", "netem", "loss", share]
    subprocess.run(["tc", "qdisc", "add", *discipline], check=True)
    try:
        yield
    finally:
        subprocess.run(["tc", "qdisc", "del", *discipline], check=True)


def with_mirror(scenario):
    return with_echo(scenario, Mirror)


@with_mirror
async def latency(client, process):
    """One way, half of there and back: says something only beside other figures of the same run."""
    for num_rows, what in ((0, "a word"), (1, "a row of 512 bytes and its header")):
        times = [0.0]
        done = asyncio.get_running_loop().create_future()

        def answered(landed, times=times, done=done, num_rows=num_rows):
            times[-1] = time.perf_counter() - times[-1]
            if len(times) == 600:
                client.loop.call_soon_threadsafe(done.set_result, None)
                return
            times.append(time.perf_counter())
            landed[0][0].post(0, num_rows << 1, num_rows)

        client.transport.deliver(lambda *completion: None, answered)
        client.post(0, 0, num_rows)
        await asyncio.wait_for(done, WAIT_S)
        halves = sorted(one / 2 * 1e6 for one in times[100:])
        print(f"  {what}: median {halves[250]:.0f} us, p99 {halves[495]:.0f} us")


async def serve_roles(*drivers):
    await rdma_roles.serve([transport(driver, 1) for driver in drivers])


def roles(ours, *theirs):
    """Attention by one driver, an expert node by each of the others."""
    process, line = server(serve_roles, *theirs)

    async def run():
        attention = transport(ours, 0)
        try:
            return await rdma_roles.attend(attention, line.split())
        finally:
            await attention.close()

    try:
        tokens = asyncio.run(run())
    finally:
        process.end(WAIT_S)
    assert tokens == rdma_roles.expected(), tokens
    print(f"  {sum(len(one) - 1 for lane in tokens for one in lane)} tokens are equal, such as {tokens[0][0]}")


def perftest():
    """The same by ib_send_lat, which sleeps for completions, too."""
    common = ["-e", "-s", "64", "-n", "1000", "-F", "-x", "1"]
    with subprocess.Popen(["ib_send_lat", "-d", "rxe1", *common], stdout=subprocess.DEVNULL):
        time.sleep(2)
        done = subprocess.run(["ib_send_lat", "-d", "rxe0", *common, "10.77.0.2"], stdout=subprocess.PIPE, check=True)
    print("  " + done.stdout.decode().strip().splitlines()[-2])


def resources():
    """What the kernel keeps for both cards, by kind: queue pairs, registrations, queues, domains."""
    done = subprocess.run(["rdma", "-j", "resource", "show"], stdout=subprocess.PIPE, check=True)
    kinds = ("qp", "mr", "cq", "srq", "pd", "ctx")
    return {card["ifname"]: [card.get(kind, 0) for kind in kinds] for card in json.loads(done.stdout)}


def leftovers(ours, theirs):
    """Neither a peer that was killed nor we leave anything behind: no descriptor, nothing that the kernel keeps."""

    def once():
        killed(ours, theirs)
        return resources(), descriptors()

    kept = resources()
    _, opened = once()  # what a process needs once is there from now on
    assert (left := once()) == (kept, opened), (left, kept, opened)
    print(f"  as before: {kept} and {len(opened)} descriptors")


def descriptors():
    """What each of ours leads to, without the number that is another's each time, as of a pipe."""
    leads = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # that of the list itself, closed by now
            leads.append(os.readlink(f"/proc/self/fd/{name}").partition(":[")[0])
    return sorted(leads)


def keys(ours, theirs):
    """A key that is wrong, and one that was right until the seat was revoked: the card says no."""

    async def run(is_revoked):
        left, right = transport(theirs, 1), transport(ours, 0)
        closed = asyncio.get_running_loop().create_future()
        try:
            seats, ours_seats = (one.register(1, LAYOUT, HOST_MEMORY) for one in (left, right))
            right.deliver(lambda endpoint, kind, word, reason: closed.set_result(reason))
            address = await left.listen(lambda hello: Admission(seats, 0, b""))
            endpoint = await right.connect(address, b"", ours_seats, 0, timeout_s=WAIT_S)
            if is_revoked:
                seats.revoke(0)
            else:
                (header, rows) = seats._registered[0].remote()
                endpoint.aim(header._replace(key=header.key ^ 0x5A), rows._replace(key=rows.key ^ 0x5A))
            endpoint.out_rows.host()[:4] = b"late"
            endpoint.post(0, 1, num_rows=1)
            with contextlib.suppress(TransportError):  # it may be closed already
                for word in range(16):  # of which one asks for a completion
                    endpoint.post(0, word)
            reason = await asyncio.wait_for(closed, WAIT_S)
            assert "refuses our key" in reason, reason
            assert not any(seats.rows.host()[:512]), "it landed"
        finally:
            await right.close()
            await left.close()

    asyncio.run(run(False))
    asyncio.run(run(True))


# -- what is on the wire ----------------------------------------------------------------------------------------------

ROCE_PORT = 4791
WRITES, ACKNOWLEDGEMENT = range(6, 12), 17  # opcodes of reliable connections
FIRST, WITH_WORD = (6, 10, 11), (9, 11)  # of writes: that say where to, and that carry an immediate


def num_carried(packet):
    """Bytes of memory that a write's packet carries: without headers, checksum and padding."""
    opcode, num_padding = packet[42], packet[43] >> 4 & 3
    headers = 8 + 12 + 16 * (opcode in FIRST) + 4 * (opcode in WITH_WORD) + 4
    return int.from_bytes(packet[38:40]) - headers - num_padding


def wire(ours, theirs):
    """What the dialling end writes, what the accepting end writes, and acknowledgements: three traffic classes. Of
    memory travel the rows and their headers, and not a byte more.
    """
    carried = collections.Counter()
    options = {"rdma_dispatch_class": 0x68, "rdma_combine_class": 0x70, "rdma_ack_class": 0xB8}
    seen = collections.Counter()
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)) as sniffer:
        sniffer.bind(("rdma0", 0))
        asyncio.run(converse(ours, theirs, options))
        sniffer.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                packet = sniffer.recv(65535)
                if packet[12:14] == b"\x08\x00" and int.from_bytes(packet[36:38]) == ROCE_PORT:
                    sender, opcode = packet[29], packet[42]
                    what = "writes" if opcode in WRITES else "acknowledges" if opcode == ACKNOWLEDGEMENT else opcode
                    carried[sender] += num_carried(packet) if opcode in WRITES else 0
                    seen[f"10.77.0.{sender} {what}", packet[15]] += 1
    print(f"  {dict(seen)}")
    assert set(seen) == {
        ("10.77.0.1 writes", 0x68), ("10.77.0.2 acknowledges", 0xB8),
        ("10.77.0.2 writes", 0x70), ("10.77.0.1 acknowledges", 0xB8),
    }  # fmt: skip
    num_bytes = sum(ROWS) * LAYOUT.row_bytes + len(ROWS) * HEADER_BYTES
    print(f"  of memory {dict(carried)} bytes; rows and headers are {num_bytes}")
    assert carried == {1: num_bytes, 2: num_bytes}, carried


ROWS = (1, 2, 3, 7, 8, 9, 13, 16, 16, 1)  # of ten posts: within a packet, just one, and several


async def converse(ours, theirs, options):
    """Ten posts each way. What comes before them, the knock, carries nothing."""
    right, left = transport(ours, 0, **options), transport(theirs, 1, **options)
    landings = [one.register(1, LAYOUT, HOST_MEMORY) for one in (right, left)]
    accepted, landed = asyncio.get_running_loop().create_future(), asyncio.Event()
    left.deliver(lambda endpoint, kind, word, reason: accepted.done() or accepted.set_result(endpoint))
    right.deliver(lambda endpoint, kind, word, reason: word != 10 or landed.set())
    address = await left.listen(lambda hello: Admission(landings[1], 0, b""))
    dialled = await right.connect(address, b"", landings[0], 0, timeout_s=WAIT_S)
    for endpoint in (dialled, await accepted):
        for word, num_rows in enumerate(ROWS, start=1):
            endpoint.post(0, word, num_rows)
    await asyncio.wait_for(landed.wait(), WAIT_S)
    await asyncio.gather(right.close(), left.close())


CHECKS = {
    "contract": contract, "exchanges": exchanges, "briefly": briefly, "killed": killed, "silent": silent,
    "lossy": lossy, "keys": keys, "latency": latency, "least": rdma_least.least, "perftest": perftest, "roles": roles,
    "wire": wire, "leftovers": leftovers,
}  # fmt: skip


def main():
    for word in sys.argv[1:]:
        name, *drivers = word.split(":")
        for driver in drivers:
            load_driver(driver.partition("-")[0])  # here, and so once
        began = time.monotonic()
        if status := Forked(lambda name=name, drivers=drivers: CHECKS[name](*drivers)).wait():
            sys.exit(status)
        print(f"{word} {time.monotonic() - began:.1f} s", flush=True)


if __name__ == "__main__":
    main()
