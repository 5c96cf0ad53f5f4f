"""Rows in a GPU's own memory: the driver's calls and their order, over a driver that has no device."""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
from typing import ClassVar

import pytest
import torch

from msi.device.choice import rows_memory
from msi.device.cpu import CpuDevice
from msi.device.cuda_memory import CudaMemory
from msi.device.cuda_rows import CudaRows
from msi.device.fake.streams import FakeStreams
from msi.device.stream_device import StreamDevice
from msi.errors import ConfigError, TransportError
from msi.kernels.plain import PlainKernels
from msi.net import shm
from msi.net.contract import RULES, check_rule
from msi.net.contract_pair import LEFT, Subject
from msi.net.rdma.transport import RdmaTransport
from msi.net.regions import HOST_MEMORY, SharesMemory
from msi.net.shm import ShmTransport
from msi.net.transport import Admission, CompletionKind
from msi.settings import HostOptions
from tests.engine_in_tasks import engine_in_tasks
from tests.loopback_verbs import Fabric, LoopbackDriver
from tests.recorded_cuda import INVALID, NOT_SUPPORTED, OUT_OF_MEMORY, UNIT, RecordedCuda
from tests.reference import references, save_tiny
from tests.test_rdma import NOBODY
from tests.test_stream_device import StreamHost
from tests.test_tokens import NUM_TOKENS, check_equal
from tests.waiting import until

needs_shm = pytest.mark.skipif(shm.is_available() is not None, reason=str(shm.is_available()))
FRESH = ["cuMemCreate", "cuMemExportToShareableHandle", "cuMemUnmap", "cuMemMap", "cuMemSetAccess", "cuMemsetD8Async",
         "cuStreamSynchronize", "cuMemRelease"]  # fmt: skip


class Device:
    """Implements `msi.device.cuda_rows.Launching`."""

    def __init__(self):
        self.is_quiet = True
        self.lost = []

    def adopt(self, memory, num_parts=1):
        return HOST_MEMORY.adopt(memory, num_parts)

    def wait_quiet(self):
        return self.is_quiet

    def lose(self, reason):
        self.lost.append(reason)


def tensor_at(address, num_bytes, keep):
    array = (ctypes.c_uint8 * num_bytes).from_address(address)
    array.keep = keep
    return torch.frombuffer(array, dtype=torch.uint8)


def rows_over(cuda, device=None):
    return CudaRows(CudaMemory(cuda, 0, lambda: None), device or Device(), tensor_at)


class CudaContractRows:
    """Implements `msi.net.contract_pair.Memory`."""

    def __init__(self, cuda=None):
        self.allocator = rows_over(cuda or RecordedCuda())

    def write(self, region, at, content):
        region.tensor()[at : at + len(content)] = torch.tensor(list(content), dtype=torch.uint8)

    def read(self, region, at, num_bytes):
        return bytes(region.tensor()[at : at + num_bytes].tolist())

    def address(self, region):
        return region.tensor().data_ptr()


# -- seats for processes of one host --------------------------------------------------------------------------------


@needs_shm
@pytest.mark.parametrize("rule", RULES, ids=[rule.sentence for rule in RULES])
async def test_over_shared_memory_it_is_true_that(rule):
    await check_rule(rule, Subject(ShmTransport, "shm://nobody", CudaContractRows(), timeout_s=20))


def test_a_peer_gets_memory_of_its_life_and_the_seat_gets_other_memory_after_it():
    cuda = RecordedCuda()
    rows = rows_over(cuda)
    assert isinstance(rows, SharesMemory)
    seats = rows.seats(3, 4096)
    assert seats.rows.num_bytes == 3 * UNIT
    assert not seats.rows.tensor().any()
    cuda.calls.clear()
    fd = seats.open(1)
    assert cuda.calls == FRESH
    assert cuda.num_pending == 0
    peers = rows_over(RecordedCuda()).of_peer(fd, 4096, "peer")
    os.close(fd)
    peers.tensor()[:3] = 7
    assert seats.rows.tensor().nonzero().flatten().tolist() == [UNIT, UNIT + 1, UNIT + 2]
    cuda.calls.clear()
    seats.clear(1)
    assert cuda.calls == ["cuMemUnmap", "cuMemMap", "cuMemSetAccess"]
    peers.tensor()[3] = 7
    assert not seats.rows.tensor().any()
    fd = seats.open(1)  # for the next one
    os.close(fd)
    assert not seats.rows.tensor().any()
    assert peers.tensor()[3] == 7


def test_what_nobody_refers_to_goes_once_no_work_may_read_it():
    cuda, device = RecordedCuda(), Device()
    rows = rows_over(cuda, device)
    device.is_quiet = False
    region = rows.region(100)
    seats = rows.seats(2, 100)
    kept = region.tensor()[3:]
    del region, seats
    gc.collect()
    rows.region(100)
    assert len(cuda.mapped) == 4, "work may still read the seats"
    device.is_quiet = True
    gc.collect()
    with rows.seats(1, 100).rows.remapping(0):
        gc.collect()
    assert kept.tolist() == [0] * 97
    rows.close()
    assert len(cuda.mapped) == 1
    del kept
    gc.collect()
    assert (cuda.mapped, cuda.reserved, cuda.memory) == ({}, {}, {})


def test_what_a_driver_refuses_is_a_sentence_and_leaves_nothing():
    cuda = RecordedCuda()
    rows = rows_over(cuda)
    seats = rows.seats(2, 100)
    held = dict(cuda.mapped), dict(cuda.memory), dict(cuda.reserved)
    fds = len(os.listdir("/proc/self/fd"))
    for call, error, words in (
        ("cuMemCreate", OUT_OF_MEMORY, "cuda:0 refused cuMemCreate: out of memory, for .* use fewer or smaller slots"),
        ("cuMemExportToShareableHandle", NOT_SUPPORTED, "cuMemExportToShareableHandle: operation not supported"),
        ("cuMemUnmap", INVALID, "cuMemUnmap: invalid argument"),
    ):
        cuda.refuses = {call: error}
        with pytest.raises(ConfigError, match=words):
            seats.open(0)
    for call in ("cuMemCreate", "cuMemAddressReserve", "cuMemMap", "cuMemSetAccess"):
        cuda.refuses = {call: OUT_OF_MEMORY}
        with pytest.raises(ConfigError, match="use fewer or smaller slots, a smaller `gpu_memory_utilization`"):
            rows.region(100)
    cuda.refuses = {}
    with rows.seats(1, 1).rows.remapping(0):
        gc.collect()
    assert not seats.rows.tensor().any()
    rows.close()
    gc.collect()
    assert (cuda.mapped, cuda.memory, cuda.reserved) == held
    assert len(os.listdir("/proc/self/fd")) == fds


def test_what_a_peer_offers_is_checked_by_the_driver():
    rows = rows_over(RecordedCuda())
    fd = os.memfd_create("no GPU's")
    with pytest.raises(TransportError, match=r"offered 100 bytes that are no memory which cuda:0 reaches: .*invalid"):
        rows.of_peer(fd, 100, "peer")
    os.close(fd)
    fd = rows.seats(1, 100).open(0)
    with pytest.raises(TransportError, match="offered 2097153 bytes"):
        rows.of_peer(fd, UNIT + 1, "peer")
    os.close(fd)


WRITER = """
import asyncio, sys
from msi.net.contract_pair import RIGHT
from msi.net.shm import ShmTransport
from tests.test_cuda_rows import RecordedCuda, rows_over

async def main():
    rows, transport = rows_over(RecordedCuda()), ShmTransport()
    landing = transport.register(1, RIGHT, rows)
    answered = asyncio.Event()
    transport.deliver(lambda *completion: answered.set())
    endpoint = await transport.connect(sys.argv[1], b"writer", landing, 0)
    for word in (1, 2, 3):
        endpoint.out_rows.tensor()[:256] = word
        endpoint.post(0, word, num_rows=2)
        await asyncio.wait_for(answered.wait(), 20)
        answered.clear()

asyncio.run(main())
"""


@needs_shm
@pytest.mark.slow
async def test_another_process_writes_into_the_memory_until_that_is_taken_from_it():
    rows = rows_over(RecordedCuda())
    transport = ShmTransport()
    landing = transport.register(2, LEFT, rows)
    came = []
    transport.deliver(lambda *completion: came.append(completion))
    address = await transport.listen(lambda hello: Admission(landing, 1, b""))
    seat, before = landing.rows.tensor()[UNIT : UNIT + 257], landing.rows.tensor().data_ptr()
    with subprocess.Popen([sys.executable, "-c", WRITER, address]) as writer:  # noqa: ASYNC220  # to be awaited here
        await until(lambda: len(came) == 2, 60)
        assert seat.tolist() == [1] * 256 + [0]
        landing.revoke(1)
        for number in (3, 4):
            came[0][0].post(0, number)
            await until(lambda number=number: len(came) == number, 30)
            assert not landing.rows.tensor().any()
        assert landing.rows.tensor().data_ptr() == before
        came[0][0].post(0, 5)
        await until(lambda: came[-1][1] is CompletionKind.CLOSED, 30)
        assert writer.wait(20) == 0
    await transport.close()


class DeviceRowsHost(StreamHost):
    """A real worker's, with rows in what is a GPU's memory as far as anybody can tell."""

    fabric: ClassVar[Fabric | None] = None  # of cards, in place of shared memory

    def new_transport(self, assignment):
        return ShmTransport() if self.fabric is None else RdmaTransport(LoopbackDriver(self.fabric))

    opened: ClassVar[list[RecordedCuda]] = []

    def open_memory(self, device):
        self.opened.append(RecordedCuda())
        rows = rows_over(self.opened[-1], device)
        device.at_end(rows.close)
        return rows


@needs_shm
@pytest.mark.slow
async def test_tokens_are_transformers_with_rows_in_the_devices_memory(tmp_path):
    expected = references(save_tiny(tmp_path), [1, 17], NUM_TOKENS)
    async with engine_in_tasks(
        DeviceRowsHost, model=tmp_path, attention_workers=1, expert_workers=2, micro_batches=2, slot_rows=48
    ) as engine:
        await check_equal(engine, expected, 0)
    assert sum(cuda.calls.count("cuMemImportFromShareableHandle") for cuda in DeviceRowsHost.opened) == 4


@pytest.mark.slow
async def test_tokens_are_transformers_where_cards_write_the_devices_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(DeviceRowsHost, "fabric", Fabric())
    monkeypatch.setattr(DeviceRowsHost, "opened", [])
    expected = references(save_tiny(tmp_path), [1, 17], NUM_TOKENS)
    async with engine_in_tasks(
        DeviceRowsHost, model=tmp_path, attention_workers=1, expert_workers=2, micro_batches=2, slot_rows=48
    ) as engine:
        await check_equal(engine, expected, 0)
    assert not sum(cuda.calls.count("cuMemImportFromShareableHandle") for cuda in DeviceRowsHost.opened)


# -- cards ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES, ids=[rule.sentence for rule in RULES])
async def test_over_cards_it_is_true_that(rule):
    fabric, rows = Fabric(), CudaContractRows(RecordedCuda(GPU_DIRECT_RDMA_WRITES_ORDERING=0))
    await check_rule(rule, Subject(lambda: RdmaTransport(LoopbackDriver(fabric)), NOBODY, rows, timeout_s=20))


@pytest.mark.parametrize(
    ("ordering", "options", "flushes"),
    [(0, 1, True), (0, 3, True), (100, 1, False), (200, 0, False)],
)
def test_the_device_says_once_whether_what_cards_wrote_is_to_be_flushed(ordering, options, flushes):
    cuda = RecordedCuda(GPU_DIRECT_RDMA_WRITES_ORDERING=ordering, GPU_DIRECT_RDMA_FLUSH_WRITES_OPTIONS=options)
    rows = rows_over(cuda)
    cuda.cuDeviceGetAttribute = None  # it is not asked again
    flush = rows.region(100).flush
    assert (flush is not None) == flushes
    for count in range(1, 3 if flushes else 1):
        flush()
        assert (rows.memory.num_flushes, cuda.calls.count("cuFlushGPUDirectRDMAWrites")) == (count, count)


def test_a_device_whose_writes_have_no_order_and_cannot_be_flushed_is_refused():
    cuda = RecordedCuda(GPU_DIRECT_RDMA_WRITES_ORDERING=0, GPU_DIRECT_RDMA_FLUSH_WRITES_OPTIONS=2)
    with pytest.raises(ConfigError, match="comes in no order, and the host cannot flush it; use `cuda_rows=host`"):
        rows_over(cuda)


def test_a_flush_that_fails_fails_all_work():
    cuda, device = RecordedCuda(GPU_DIRECT_RDMA_WRITES_ORDERING=0), Device()
    region = rows_over(cuda, device).region(100)
    cuda.refuses = {"cuFlushGPUDirectRDMAWrites": NOT_SUPPORTED}
    region.flush()
    assert device.lost == ["cuda:0 refused cuFlushGPUDirectRDMAWrites: operation not supported"]


def test_what_cards_cannot_be_given_is_said():
    with pytest.raises(ConfigError, match="gives no dma-buf of its memory; with `cuda_rows=host` cards reach rows"):
        rows_over(RecordedCuda(DMA_BUF_SUPPORTED=0)).region(100).export()
    with pytest.raises(ConfigError, match="are for processes of this host"):
        rows_over(RecordedCuda()).seats(1, 100).rows.export()


# -- where rows land --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attribute", "words"),
    [
        ("VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED", "has no virtual memory of the driver's"),
        ("HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED", "gives no descriptors of its memory"),
    ],
)
def test_a_device_without_such_memory_is_refused(attribute, words):
    with pytest.raises(ConfigError, match=f"cuda:0 {words}; use `cuda_rows=host`"):
        rows_over(RecordedCuda(**{attribute: 0}))


def test_the_host_neither_reads_nor_writes_it():
    with pytest.raises(ConfigError, match="100 bytes are memory of cuda:0, which the host neither reads nor writes"):
        rows_over(RecordedCuda()).region(100).host()


async def test_rows_lie_in_the_hosts_memory_unless_it_is_said_otherwise():
    device = CpuDevice(num_threads=1)
    assert rows_memory(device, "host") is device
    with pytest.raises(ConfigError, match="`cuda_rows` device is for `device` cuda with `cuda_queues` streams"):
        rows_memory(device, "device")
    await device.close()
    streams = FakeStreams()
    gated = StreamDevice(streams, PlainKernels(streams.device), gates=True)
    with pytest.raises(ConfigError, match="`cuda_rows` device is for"):
        rows_memory(gated, "device")
    await gated.close()


@pytest.mark.parametrize("transport", ["auto", "tcp", "inproc"])
def test_transports_that_copy_rows_by_the_host_are_refused(transport):
    with pytest.raises(ConfigError, match=f"`cuda_rows` device needs `transport` shm or rdma, not {transport}"):
        HostOptions(device="cuda", cuda_rows="device", transport=transport)
