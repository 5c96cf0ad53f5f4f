"""RDMA over cards of this process: the contract of all transports, and what cards and networks do to a connection."""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import sys
import threading
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from msi.device.fake.device import FakeDevice
from msi.device.fake.world import FakeWorld
from msi.device.ready import Ready
from msi.errors import ConfigError, ProtocolError, TransportError
from msi.net.contract import RULES, check_rule
from msi.net.contract_pair import Pair, Subject
from msi.net.rdma import abi, drivers
from msi.net.rdma.endpoint import NUM_SENDS, SIGNAL_EVERY
from msi.net.rdma.fabric import gid_kinds, open_place
from msi.net.rdma.introduction import Introduction
from msi.net.rdma.landing import address_of
from msi.net.rdma.options import RdmaOptions
from msi.net.rdma.patience import Patience
from msi.net.rdma.reader import Reader
from msi.net.rdma.transport import RECEIVES_PER_SEAT, RdmaTransport
from msi.net.rdma.verbs import Port, RemoteQueue, Span
from msi.net.regions import HOST_MEMORY
from msi.net.slots import HEADER_BYTES, SlotLayout
from msi.net.transport import Admission, CompletionKind
from tests import rdma_roles
from tests.everyday import mostly_slow
from tests.loopback_verbs import Fabric, LoopbackCard, LoopbackDriver
from tests.test_fake_transport import DeviceRows

FABRIC = Fabric()
LAYOUT = SlotLayout(2, 16, 128)
NOBODY = "rdma://127.0.0.1:1"
BY_SENTENCE = {rule.sentence: rule for rule in RULES}


def make():
    return RdmaTransport(LoopbackDriver(FABRIC))


@pytest.mark.parametrize("rule", RULES, ids=[rule.sentence for rule in RULES])
async def test_it_is_true_that(rule):
    await check_rule(rule, Subject(make, NOBODY))


class Joined:
    """A contract's pair, connected, over one driver whose cards can be seen."""

    def __init__(self, options=None, keys=(None, None), memory=None, poller=None, kind=RdmaTransport):
        self.driver = LoopbackDriver(FABRIC)
        self.keys = list(keys)
        subject = Subject(lambda: kind(self.driver, options, key=self.keys.pop(0), poller=poller), NOBODY)
        self.pair = Pair(subject if memory is None else subject._replace(memory=memory))

    async def __aenter__(self):
        self.ours, self.theirs = await self.pair.connect()
        self.left_card, self.right_card = self.driver.cards
        return self

    async def __aexit__(self, *exc_info):
        await self.close()

    async def close(self):
        await self.pair.right.transport.close()
        await self.pair.left.transport.close()


# -- what is on its way ----------------------------------------------------------------------------------------------


async def test_a_post_of_rows_is_two_writes_and_their_bytes_are_rows_and_header():
    async with Joined() as joined:
        writes, num_bytes = FABRIC.num_writes, FABRIC.num_bytes
        joined.ours.post(0, 1, num_rows=3)
        joined.ours.post(0, 2)
        await joined.pair.left.immediates(2)
        assert FABRIC.num_writes - writes == 3
        assert FABRIC.num_bytes - num_bytes == 3 * joined.pair.left.layout.row_bytes + HEADER_BYTES


async def test_only_some_posts_ask_for_a_completion_and_none_overtakes():
    async with Joined() as joined:
        for word in range(10 * NUM_SENDS):  # far more than a queue pair takes at a time
            joined.ours.post(0, word)
        assert await joined.pair.left.immediates(10 * NUM_SENDS) == list(range(10 * NUM_SENDS))
        assert joined.left_card.num_lost == joined.right_card.num_lost == 0
        assert joined.right_card.num_completed <= 10 * NUM_SENDS // SIGNAL_EVERY + 1


async def test_bytes_on_their_way_are_bounded():
    async with Joined(RdmaOptions(rdma_outstanding_bytes=4096)) as joined:
        row_bytes = joined.pair.left.layout.row_bytes
        with FABRIC.changed:  # nothing is carried meanwhile
            for number in range(10):
                joined.ours.post(number % 2, number, num_rows=16)
            waiting = sum(write.source[1] for write in joined.ours.sends.sends if isinstance(write.source, tuple))
            assert 4096 <= waiting < 4096 + 16 * row_bytes
        assert await joined.pair.left.immediates(10) == list(range(10))


async def test_more_immediates_than_receives_wait_for_a_receiver_that_is_busy():
    async with Joined() as joined:
        count = joined.left_card.num_receives + 100
        joined.pair.right.transport._loop.call_soon(lambda: None)
        for word in range(count):
            joined.ours.post(0, word)
        assert await joined.pair.left.immediates(count) == list(range(count))
        assert joined.left_card.num_lost == 0
        assert joined.left_card.num_receives > RECEIVES_PER_SEAT


@pytest.fixture
def poller():
    """Served by a thread that does nothing but take what comes."""
    ready = Ready()
    thread = threading.Thread(target=ready.get, daemon=True)
    thread.start()
    yield ready
    ready.put(None)
    thread.join(10)
    ready.close()


@pytest.mark.parametrize("is_polled", [False, True])
async def test_an_idle_transport_sleeps_on_its_descriptor(is_polled, poller):
    async with Joined(poller=poller if is_polled else None) as joined:
        joined.ours.post(0, 1)
        await joined.pair.left.immediates(1)
        await asyncio.sleep(0.02)
        polls = joined.left_card.num_polls, joined.right_card.num_polls
        await asyncio.sleep(0.05)
        assert (joined.left_card.num_polls, joined.right_card.num_polls) == polls


class LateCard:
    """Whose events come later than what causes them; it takes no notice of being armed while one is on its way."""

    fd = -1

    def __init__(self):
        self.completions, self.events, self.num_late, self.is_armed = [], 0, 0, False

    def complete(self):
        self.completions.append((0, 129, 5, 17))
        self.num_late += self.is_armed
        self.is_armed = False

    def poll(self):
        found, self.completions = self.completions, []
        return found

    def take_event(self):
        was_there = self.events > 0
        self.events -= was_there
        return was_there

    def arm(self):
        self.is_armed = not self.events and not self.num_late


async def test_an_event_that_comes_late_is_taken_and_the_queue_is_armed_again():
    card, took = LateCard(), []
    poller = SimpleNamespace(add=lambda take, fd: None)
    reader = Reader(card, took.extend, pytest.fail, poll_s=0.0, poller=poller)
    reader.start()
    reader.take()
    assert card.is_armed
    for count in (1, 2, 3):
        card.complete()
        reader.take()
        assert len(took) == count
        reader.take()  # before it would sleep
        assert not card.is_armed
        card.events, card.num_late = card.num_late, 0  # which wakes it
        reader.take()
        assert card.is_armed


class Sometimes:
    """A queue that has something at every `nth` look, and a clock that moves a millisecond with each."""

    def __init__(self, nth):
        self.nth, self.looks = nth, 0

    def clock(self):
        return self.looks / 1000

    def poll(self):
        self.looks += 1
        return [] if self.looks % self.nth else ["completion"]


class Free:
    """Cores, of which one is free or not."""

    def __init__(self, *answers):
        self.answers = list(answers)

    def one_is_free(self):
        return self.answers.pop(0) if self.answers else True

    def close(self):
        pass


def test_looking_is_rewarded_or_done_less_and_less():
    soon, late = Sometimes(3), Sometimes(10**9)
    patience = Patience(0.01, cores=Free(), clock=soon.clock)
    assert [patience.look(soon.poll) for _ in range(4)] == [["completion"]] * 4
    patience = Patience(0.0095, cores=Free(), clock=late.clock)
    looks = []
    for _ in range(16):
        before = late.looks
        assert not patience.look(late.poll)
        looks.append(late.looks - before)
    assert [number for number, count in enumerate(looks) if count] == [0, 2, 6, 14]
    assert not Patience(0.0).look(late.poll)
    assert late.looks == sum(looks)


def test_an_empty_queue_is_not_looked_at_while_no_core_is_free():
    late, cores = Sometimes(10**9), Free(False)
    patience = Patience(1000.0, cores=cores, clock=late.clock)
    assert not patience.look(late.poll)
    assert late.looks == 0
    cores.answers = [True, True, True, False]  # somebody comes while it looks
    assert [patience.look(late.poll) for _ in range(2)] == [(), ()]
    assert late.looks == 3
    patience.close()


@pytest.mark.parametrize("sentence", mostly_slow(sorted(BY_SENTENCE, key=lambda one: "order" not in one)))
async def test_while_looking_it_is_true_that(sentence):
    await check_rule(
        BY_SENTENCE[sentence], Subject(lambda: RdmaTransport(LoopbackDriver(FABRIC), poll_s=0.001), NOBODY)
    )


class SlowLoop(RdmaTransport):
    """Whose event loop hears late of what the control connections bring."""

    def _controlled(self, *completion):
        self._loop.call_later(0.05, super()._controlled, *completion)


async def test_a_peer_that_is_faster_than_our_event_loop_is_heard_after_its_connection(poller):
    pair = Pair(Subject(lambda: SlowLoop(LoopbackDriver(FABRIC), poller=poller), NOBODY))
    ours = await pair.right.transport.connect(await pair.address(), b"anna", pair.right.landing, 2)
    for word in range(3):
        ours.post(0, word)
    connected, *immediates = await pair.left.take(4)
    assert connected.kind is CompletionKind.CONNECTED
    assert [one.immediate for one in immediates] == [0, 1, 2]
    await pair.right.transport.close()
    await pair.left.transport.close()


# -- who may write ---------------------------------------------------------------------------------------------------


async def test_a_wrong_key_is_refused_by_the_card_and_closes_the_connection():
    async with Joined() as joined:
        seat = Span(address_of(joined.pair.left.landing.headers[0][0]), 99), Span(1 << 20, 99)
        joined.ours.aim(*seat)
        joined.ours.post(0, 1, num_rows=1)
        (closed,) = await joined.pair.right.take(1)
        assert closed.kind is CompletionKind.CLOSED
        assert "refuses our key" in closed.reason
        assert joined.pair.left.is_zero(0)


async def test_who_was_revoked_is_told_that_its_key_is_refused():
    async with Joined() as joined:
        joined.pair.left.landing.revoke(0)
        joined.ours.post(0, 1)  # words need no key, and are dropped
        joined.ours.post(0, 2, num_rows=1)
        (closed,) = await joined.pair.right.take(1)
        assert "refuses our key" in closed.reason
        assert [one.kind for one in joined.pair.left.delivered if one.kind is CompletionKind.IMMEDIATE] == []


async def test_a_process_without_the_secret_is_refused():
    joined = Joined(keys=(b"a" * 32, b"b" * 32))
    with pytest.raises(TransportError, match="the secret differs"):
        await joined.pair.connect()
    await joined.close()


async def test_each_peer_has_keys_of_its_own_and_none_is_left_behind():
    registered = len(FABRIC.memory)
    async with Joined() as joined:
        first = {key for key, one in FABRIC.memory.items() if one.is_remote}
        again, _ = await joined.pair.connect(b"bert", seat=1)
        second = {key for key, one in FABRIC.memory.items() if one.is_remote} - first
        assert len(second) == 4  # headers and rows, of two seats
        again.close()
    assert len(FABRIC.memory) == registered
    assert not [one for one in FABRIC.queue_pairs.values() if one.card in joined.driver.cards]


# -- how it ends -----------------------------------------------------------------------------------------------------


async def test_a_card_that_falls_silent_is_told_apart_from_a_closed_connection():
    async with Joined() as joined:
        FABRIC.is_silent.add(joined.theirs.receives.number)
        joined.ours.post(0, 1, num_rows=1)
        for word in range(SIGNAL_EVERY):
            joined.ours.post(0, word)
        (closed,) = await joined.pair.right.take(1)
        assert "does not acknowledge" in closed.reason


async def test_who_cannot_be_reached_by_rdma_is_not_connected():
    joined = Joined()
    number = next(FABRIC.numbers)
    FABRIC.is_silent |= set(range(number, number + 10))
    with pytest.raises(TransportError, match="does not acknowledge"):
        await joined.pair.connect()
    FABRIC.is_silent.clear()
    await joined.close()


async def test_the_classes_of_dispatch_combine_and_acknowledgements_are_apart():
    options = RdmaOptions(rdma_dispatch_class=0x68, rdma_combine_class=0x70, rdma_ack_class=0xB8)
    async with Joined(options) as joined:
        ends = (joined.ours, joined.theirs)
        assert [end.sends.path.traffic_class for end in ends] == [0x68, 0x70]
        assert [end.receives.path.traffic_class for end in ends] == [0xB8, 0xB8]


@pytest.mark.parametrize("is_polled", [False, True])
async def test_a_card_that_fails_ends_all_that_goes_through_it(monkeypatch, is_polled, poller):
    async with Joined(poller=poller if is_polled else None) as joined:

        def fail():
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(joined.left_card, "poll", fail)
        joined.ours.post(0, 1)
        (closed,) = await joined.pair.left.take(1)
        assert closed.reason == "our RDMA device failed: Input/output error"


@pytest.mark.parametrize("is_polled", [False, True])
async def test_no_descriptor_is_left_behind(is_polled, poller):
    async with Joined(poller=poller):
        pass  # what the poller needs itself is there from now on
    before = set(os.listdir("/proc/self/fd"))
    async with Joined(poller=poller if is_polled else None):
        pass
    assert set(os.listdir("/proc/self/fd")) <= before


# -- a device's memory -----------------------------------------------------------------------------------------------


class ExportedRegion:
    """Memory that the host does not touch; a card gets it by its descriptor."""

    is_host = False

    def __init__(self, num_bytes, flush):
        self.num_bytes = num_bytes
        self.flush = flush
        self.fd = os.memfd_create("device", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, num_bytes)
        self.memory = mmap.mmap(self.fd, num_bytes)

    def host(self):
        raise ConfigError("a device's")

    def zero(self, start, num_bytes):
        self.memory[start : start + num_bytes] = bytes(num_bytes)

    def export(self):
        return os.dup(self.fd)


class ExportedRows:
    """Implements `msi.net.contract_pair.Memory`, and is its own allocator."""

    def __init__(self):
        self.allocator = self
        self.num_flushes = 0

    def flush(self):
        self.num_flushes += 1

    def region(self, num_bytes):
        return ExportedRegion(num_bytes, self.flush)

    def adopt(self, memory, num_parts=1):
        raise AssertionError("nothing of the host's")

    def write(self, region, at, content):
        region.memory[at : at + len(content)] = content

    def read(self, region, at, num_bytes):
        return region.memory[at : at + num_bytes]

    def address(self, region):
        return address_of(memoryview(region.memory))


@pytest.mark.parametrize(
    "sentence", mostly_slow(sorted(BY_SENTENCE, key=lambda one: "are there when their" not in one))
)
async def test_with_rows_in_exported_memory_it_is_true_that(sentence):
    await check_rule(BY_SENTENCE[sentence], Subject(make, NOBODY, ExportedRows()))


async def test_a_devices_memory_is_flushed_before_anybody_is_told_of_what_came():
    class Flushed(ExportedRows):
        def read(self, region, at, num_bytes):
            assert self.num_flushes, "it was read before"
            return super().read(region, at, num_bytes)

    rows = Flushed()
    (rule,) = (rule for rule in RULES if "are there when their immediate is" in rule.sentence)
    await check_rule(rule, Subject(make, NOBODY, rows))
    assert rows.num_flushes


@pytest.mark.parametrize("rule", RULES, ids=[rule.sentence for rule in RULES])
async def test_with_rows_in_the_memory_of_a_fake_device_it_is_true_that(rule):
    device = FakeDevice(FakeWorld(0))
    await check_rule(rule, Subject(make, NOBODY, DeviceRows(device), timeout_s=20))


@pytest.mark.parametrize("flushes", [True, False])
async def test_each_time_that_rows_came_a_fake_device_is_flushed_and_sees_nothing_otherwise(flushes, monkeypatch):
    device = FakeDevice(FakeWorld(0))
    monkeypatch.setattr(device, "flush", device.flush if flushes else lambda: None)
    async with Joined(memory=DeviceRows(device)) as joined:
        for word in (1, 2):
            before = device.num_flushes
            joined.pair.write(joined.ours, joined.pair.left.layout, 0, b"header", bytes([word]) * 128)
            joined.ours.post(0, word, num_rows=1)
            await joined.pair.left.immediates(1)
            assert joined.pair.left.rows(0, 0, 128) == bytes([word if flushes else 0]) * 128
            assert (device.num_flushes > before) == flushes


async def test_memory_that_cannot_be_exported_is_refused():
    class Kept(ExportedRows):
        def region(self, num_bytes):
            region = ExportedRegion(num_bytes, self.flush)
            region.export = lambda: (_ for _ in ()).throw(ConfigError("these bytes cannot leave their device"))
            return region

    transport = make()
    with pytest.raises(ConfigError, match="cannot leave their device"):
        transport.register(1, LAYOUT, Kept())
    await transport.close()


# -- links ----------------------------------------------------------------------------------------------------------


async def test_both_roles_of_a_model_without_torch_make_the_same_tokens(monkeypatch, capsys):
    """What the virtual machine runs over real verbs, in one process."""
    is_over = threading.Event()
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(read=is_over.wait))
    serving = asyncio.create_task(rdma_roles.serve([make(), make()]))
    attention, addresses = make(), []
    while not addresses:
        await asyncio.sleep(0.01)
        addresses = capsys.readouterr().out.split()
    assert await rdma_roles.attend(attention, addresses) == rdma_roles.expected()
    await attention.close()
    is_over.set()
    await serving


# -- finding libraries, devices and GIDs -----------------------------------------------------------------------------


def test_what_is_missing_is_said_in_one_sentence(monkeypatch):
    for name in ("ibverbs", "pyverbs", "msi.net.rdma.ibverbs_driver", "msi.net.rdma.pyverbs_driver"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(abi, "LIBRARY", "libnone.so.1")
    said = r"needs a verbs library; direct .*libnone.* or ibverbs .*pip install msi\[rdma\].* or pyverbs"
    with pytest.raises(ConfigError, match=said):
        drivers.load_driver("auto")


class Nothing(LoopbackDriver):
    def devices(self):
        return []


@pytest.mark.parametrize(
    ("driver", "options", "said"),
    [
        (Nothing(FABRIC), {}, "this machine has no RDMA device; load the card's driver"),
        (LoopbackDriver(FABRIC), {"rdma_device": "mlx5_9"}, "`rdma_device` 'mlx5_9' is not one; there are: loop0"),
        (LoopbackDriver(FABRIC), {"rdma_gid": "10.0.0.2"}, "port 1 of loop0 has no GID 10.0.0.2"),
        (LoopbackDriver(FABRIC), {"rdma_gid": "2"}, "`rdma_gid` 2 of loop0 is empty"),
    ],
)
def test_a_device_that_cannot_be_used_is_refused(driver, options, said):
    with pytest.raises(ConfigError, match=said):
        open_place(driver, RdmaOptions(**options))


def test_a_port_that_is_down_is_refused(monkeypatch):
    monkeypatch.setattr(LoopbackCard, "port", lambda self, number: Port(1, 2, 0, 3, 4))
    with pytest.raises(ConfigError, match="port 1 of loop0 is not active"):
        open_place(LoopbackDriver(FABRIC), RdmaOptions())


def test_the_gid_is_that_of_roce_v2_over_ipv4():
    place = open_place(LoopbackDriver(FABRIC), RdmaOptions())
    assert (place.gid_index, place.gid[-4:]) == (1, bytes([10, 0, 0, 1]))
    assert open_place(LoopbackDriver(FABRIC), RdmaOptions(rdma_gid="0")).gid_index == 0
    assert open_place(LoopbackDriver(FABRIC), RdmaOptions(rdma_gid="10.0.0.1")).gid_index == 1
    with pytest.raises(ConfigError, match="neither an index nor an address"):
        RdmaOptions(rdma_gid="abc")


def test_a_gid_of_roce_v1_is_passed_over(tmp_path, monkeypatch):
    types = tmp_path / "loop0" / "ports" / "1" / "gid_attrs" / "types"
    types.mkdir(parents=True)
    for index, kind in enumerate(("RoCE v2", "IB/RoCE v1", "RoCE v2")):
        (types / str(index)).write_text(kind + "\n")
    assert gid_kinds("loop0", 1, tmp_path)(1) == "IB/RoCE v1"
    monkeypatch.setattr("msi.net.rdma.fabric.SYSFS", tmp_path)
    assert open_place(LoopbackDriver(FABRIC), RdmaOptions()).gid_index == 0


def test_introductions_come_out_as_they_went_in():
    ours = Introduction(
        3, RemoteQueue(1, 2, b"g" * 16, 7), RemoteQueue(3, 4, b"g" * 16, 7), Span(1 << 40, 5), Span(6, 1 << 31), LAYOUT
    )
    assert Introduction.decode(ours.encode() + b"hello") == (ours, b"hello")


def test_a_seat_for_which_we_would_have_to_pin_too_much_is_refused():
    queue = RemoteQueue(1, 2, b"g" * 16, 7)
    ours = Introduction(3, queue, queue, Span(1, 2), Span(3, 4), SlotLayout(8, 1 << 16, 1 << 14))
    with pytest.raises(ProtocolError, match="by RDMA at most 4294967296 are taken"):
        Introduction.decode(ours.encode())


@given(st.binary(max_size=200))
def test_an_introduction_of_anything_is_refused_or_read(payload):
    with contextlib.suppress(ProtocolError):
        ours, rest = Introduction.decode(payload)
        assert ours.encode() + rest == payload


async def test_memory_that_the_card_does_not_take_closes_the_connection_and_is_told(monkeypatch, caplog):
    def refuse(card, address, num_bytes, is_remote):
        if is_remote and card is joined.driver.cards[0]:
            raise OSError(12, "Cannot allocate memory")
        return register(card, address, num_bytes, is_remote)

    register = LoopbackCard.register
    monkeypatch.setattr(LoopbackCard, "register", refuse)
    joined = Joined()
    with pytest.raises(TransportError, match="introduces its queue pairs in 0 bytes"):
        await joined.pair.connect()
    kinds = [one.kind for one in await joined.pair.left.take(2)]
    assert kinds == [CompletionKind.CONNECTED, CompletionKind.CLOSED]
    assert "ulimit -l unlimited" in caplog.text
    await joined.close()


async def test_nobody_is_admitted_before_there_is_memory():
    left, right = make(), make()
    address = await left.listen(lambda hello: Admission(left.register(1, LAYOUT, HOST_MEMORY), 0, b""))
    with pytest.raises(TransportError, match="there is no memory for peers"):
        await right.connect(address, b"", right.register(1, LAYOUT, HOST_MEMORY), 0)
    await right.close()
    await left.close()
