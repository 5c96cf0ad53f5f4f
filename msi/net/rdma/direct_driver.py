"""Verbs by libibverbs itself, through ctypes: no binding, and nothing made for a post or a completion but numbers.

A lane's requests and entries are structures that were chained once; a post writes a length and an immediate into them,
and calls the card's function. That holds the interpreter's lock: the call takes less than giving it away would.
Completions are those of `msi.net.rdma.completion_queue`.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable, Sequence
from ctypes import addressof, byref, c_int, c_uint32, c_uint64, c_void_p
from itertools import pairwise

from msi.net.rdma import abi
from msi.net.rdma.abi import Entry, QueuePairAttributes, ReceiveRequest, SendRequest
from msi.net.rdma.completion_queue import HOLDING, CompletionQueue, Events, at
from msi.net.rdma.verbs import (
    RECEIVES_PER_REFILL,
    Card,
    Completion,
    Lane,
    Path,
    Port,
    QueuePair,
    Registration,
    RemoteQueue,
    Span,
)
from msi.net.slots import HEADER_BYTES

RELIABLE_CONNECTED = 2
INIT, READY_TO_RECEIVE, READY_TO_SEND = 1, 2, 3
WRITE, WRITE_IMMEDIATE = 0, 1  # opcodes
SIGNALED, INLINE = 2, 8
LOCAL_WRITE, REMOTE_WRITE = 1, 2
MIN_RNR_TIMER = 12  # 0.64 ms


class DirectDriver:
    """Implements `msi.net.rdma.verbs.Driver`. Raises ImportError: there is no libibverbs."""

    name = "direct"

    def __init__(self) -> None:
        self._library = abi.Library()

    def devices(self) -> Sequence[str]:
        with _Devices(self._library) as devices:
            return list(devices)

    def open(self, device: str) -> Card:
        with _Devices(self._library) as devices:
            return DirectCard(self._library, device, self._library.open_device(devices[device]))


class _Devices:
    """Their addresses by name, while the library's list of them is kept."""

    def __init__(self, library: abi.Library) -> None:
        self._library = library

    def __enter__(self) -> dict[str, int]:
        count = c_int()
        self._list = self._library.device_list(byref(count))
        addresses = (c_uint64 * count.value).from_address(self._list)
        return {self._library.device_name(address).decode(): address for address in addresses}

    def __exit__(self, *exc_info: object) -> None:
        self._library.free_device_list(self._list)


class DirectCard:
    """Implements `msi.net.rdma.verbs.Card`, with what it has of its queue from `start` on."""

    poll: Callable[[], Sequence[Completion]]
    look: Callable[[], Sequence[Completion]]
    arm: Callable[[], None]
    take_event: Callable[[], bool]

    def __init__(self, library: abi.Library, name: str, context: int) -> None:
        self.name = name
        self.fd = -1
        self._library = library
        self._context = context
        self._domain: int = library.alloc_pd(context)
        self._channel = self._queue = self._receives = 0
        self._events: Events | None = None
        chain = (ReceiveRequest * RECEIVES_PER_REFILL)()
        for one, following in pairwise(chain):
            one.next = addressof(following)
        self._refill, self._bad = byref(chain), byref(c_void_p())

    def port(self, number: int) -> Port:
        port = abi.PortAttributes()
        self._library.query_port(self._context, number, byref(port))
        return Port(port.state, port.link_layer, port.lid, port.active_mtu, port.num_gids)

    def gid(self, port: int, index: int) -> bytes:
        gid = ctypes.create_string_buffer(16)
        self._library.query_gid(self._context, port, index, gid)
        return gid.raw

    def register(self, address: int, num_bytes: int, is_remote: bool) -> Registration:
        region = self._library.reg_mr(self._domain, address, num_bytes, _access(is_remote))
        return DirectRegistration(self._library, region, address)

    def register_exported(self, fd: int, offset: int, num_bytes: int, is_remote: bool) -> Registration:
        region = self._library.reg_dmabuf_mr(self._domain, offset, num_bytes, offset, fd, _access(is_remote))
        return DirectRegistration(self._library, region, offset)

    def start(self, num_receives: int, num_completions: int) -> None:
        library, context = self._library, self._context
        self._channel = library.create_channel(context)
        self.fd = abi.Channel.from_address(self._channel).fd
        os.set_blocking(self.fd, False)
        self._queue = library.create_cq(context, num_completions, 0, self._channel, 0)
        limits = abi.SharedInit(max_requests=num_receives, max_entries=1)
        self._receives = library.create_srq(self._domain, byref(limits))
        queue = CompletionQueue(self._queue)
        self.poll, self.look, self.arm = queue.poll, queue.look, queue.arm
        self._events = Events(library, self.fd)
        self.take_event = self._events.take
        self._to = at(self._receives)
        self._post = HOLDING(abi.table_function(context, abi.POST_TO_SHARED))
        for _ in range(num_receives // RECEIVES_PER_REFILL):
            self.refill()

    def queue_pair(self, port: int, num_sends: int, inline_bytes: int) -> QueuePair:
        limits = abi.QueuePairLimits(max_sends=num_sends, max_send_entries=1, max_inline=inline_bytes)
        wanted = abi.QueuePairInit(
            send_queue=self._queue, receive_queue=self._queue, shared=self._receives, limits=limits,
            kind=RELIABLE_CONNECTED,
        )  # fmt: skip
        made = self._library.create_qp(self._domain, byref(wanted))
        queue_pair = DirectQueuePair(self._library, made, HOLDING(abi.table_function(self._context, abi.POST)))
        try:
            queue_pair.start(port)
        except BaseException:
            queue_pair.close()
            raise
        return queue_pair

    def refill(self) -> None:
        if code := self._post(self._to, self._refill, self._bad):
            raise _failed(code)

    def close(self) -> None:
        if self._events is not None:
            self._events.acknowledge()
        library, self.fd = self._library, -1
        for destroy, address in (
            (library.destroy_srq, self._receives), (library.destroy_cq, self._queue),
            (library.destroy_channel, self._channel), (library.dealloc_pd, self._domain),
            (library.close_device, self._context),
        ):  # fmt: skip
            if address:
                destroy(address)


class DirectRegistration:
    """Implements `msi.net.rdma.verbs.Registration`."""

    def __init__(self, library: abi.Library, region: int, address: int) -> None:
        self.address = address
        self.local_key = c_uint32.from_address(region + abi.MR_LOCAL_KEY).value
        self.remote_key = c_uint32.from_address(region + abi.MR_REMOTE_KEY).value
        self._library = library
        self._region = region

    def close(self) -> None:
        region, self._region = self._region, 0
        if region:
            self._library.dereg_mr(region)


class DirectQueuePair:
    """Implements `msi.net.rdma.verbs.QueuePair`."""

    def __init__(self, library: abi.Library, address: int, post: Callable[..., int]) -> None:
        self.number = c_uint32.from_address(address + abi.QP_NUMBER).value
        self._library = library
        self._address = address
        self._post, self._at, self._bad = post, at(address), byref(c_void_p())
        self._word = SendRequest(opcode=WRITE_IMMEDIATE)
        self._word_at = byref(self._word)
        self._lanes: list[DirectLane] = []

    def start(self, port: int) -> None:
        wanted = QueuePairAttributes(state=INIT, port=port, access=LOCAL_WRITE | REMOTE_WRITE)
        self._change(wanted, abi.STATE | abi.PKEY_INDEX | abi.PORT | abi.ACCESS)

    def connect(self, remote: RemoteQueue, psn: int, path: Path) -> None:
        address = abi.Address(
            lid=remote.lid, service_level=path.service_level, port=path.port, is_global=1, gid_index=path.gid_index,
            hop_limit=path.hop_limit, traffic_class=path.traffic_class,
        )  # fmt: skip
        ctypes.memmove(byref(address), remote.gid, len(remote.gid))
        wanted = QueuePairAttributes(
            state=READY_TO_RECEIVE, address=address, mtu=path.mtu, to_number=remote.number, receive_psn=remote.psn,
            max_served_reads=1, min_rnr_timer=MIN_RNR_TIMER,
        )  # fmt: skip
        self._change(wanted, abi.OF_RECEIVING)
        wanted = QueuePairAttributes(
            state=READY_TO_SEND, send_psn=psn, timeout=path.timeout, retries=path.retries,
            rnr_retries=path.rnr_retries, max_reads=1,
        )  # fmt: skip
        self._change(wanted, abi.OF_SENDING)

    def _change(self, wanted: QueuePairAttributes, mask: int) -> None:
        self._library.modify_qp(self._address, byref(wanted), mask)

    def word(self, immediate: int, is_signalled: bool) -> None:
        self._word.immediate = immediate
        self._word.flags = SIGNALED if is_signalled else 0
        if code := self._post(self._at, self._word_at, self._bad):
            raise _failed(code)

    def lane(self, header: Span, rows: Span, to_header: Span, to_rows: Span, row_bytes: int, max_rows: int) -> Lane:
        self._lanes.append(DirectLane(self._post, self._at, header, rows, to_header, to_rows, row_bytes))
        return self._lanes[-1]

    def close(self) -> None:
        address, self._address = self._address, 0
        if address:
            self._post = _closed
            for lane in self._lanes:
                lane.close()
            self._library.destroy_qp(address)


class DirectLane:
    """Implements `msi.net.rdma.verbs.Lane`. Two chains of rows and header: the second asks for a completion."""

    __slots__ = ("_bad", "_first", "_keep", "_length", "_note", "_note_entry", "_post", "_queue", "_row_bytes",
                 "_signalled", "_words")  # fmt: skip

    def __init__(
        self, post: Callable[..., int], queue: object, header: Span, rows: Span, to_header: Span, to_rows: Span,
        row_bytes: int,
    ) -> None:  # fmt: skip
        self._post, self._queue, self._bad = post, queue, byref(c_void_p())
        self._row_bytes = row_bytes
        length = Entry(address=rows.address, key=rows.key)
        entry = Entry(address=header.address, key=header.key, length=HEADER_BYTES)
        self._note_entry = Entry(address=header.address, key=header.key)
        self._length = memoryview(length).cast("B").cast("I")  # [2] is the entry's length

        def chain(last_entry: Entry, flags: int) -> tuple[memoryview, object, SendRequest, SendRequest]:
            """The last request's words, of which [9] is its immediate; the first one's address; both."""
            last = _request(WRITE_IMMEDIATE, last_entry, to_header, flags)
            first = _request(WRITE, length, to_rows, 0)
            first.next = addressof(last)
            return memoryview(last).cast("B").cast("I"), byref(first), first, last

        self._words, self._first, *keep = chain(entry, INLINE)
        self._signalled = chain(entry, INLINE | SIGNALED)
        self._note = chain(self._note_entry, 0)
        self._keep = (entry, *keep)

    def post(self, immediate: int, num_rows: int) -> None:
        self._length[2] = num_rows * self._row_bytes
        self._words[9] = immediate
        if code := self._post(self._queue, self._first, self._bad):
            raise _failed(code)

    def post_signalled(self, immediate: int, num_rows: int) -> None:
        words, first, _, _ = self._signalled
        self._length[2] = num_rows * self._row_bytes
        words[9] = immediate
        if code := self._post(self._queue, first, self._bad):
            raise _failed(code)

    def post_note(self, immediate: int, num_rows: int, header_bytes: int, is_signalled: bool) -> None:
        _, first, _, last = self._note
        self._length[2] = num_rows * self._row_bytes
        self._note_entry.length = header_bytes
        last.immediate = immediate
        last.flags = SIGNALED if is_signalled else 0
        if code := self._post(self._queue, first if num_rows else byref(last), self._bad):
            raise _failed(code)

    def close(self) -> None:
        self._post = _closed


def _request(opcode: int, entry: Entry, to: Span, flags: int) -> SendRequest:
    """Whoever uses it keeps the entry."""
    return SendRequest(
        entries=addressof(entry), num_entries=1, opcode=opcode, flags=flags, to_address=to.address, to_key=to.key
    )


def _closed(*arguments: object) -> int:
    return errno.EINVAL


def _failed(code: int) -> OSError:
    return OSError(code, os.strerror(code))


def _access(is_remote: bool) -> int:
    return LOCAL_WRITE | REMOTE_WRITE if is_remote else 0
