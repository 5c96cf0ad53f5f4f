"""Verbs by pyverbs, rdma-core's own binding, as distributions package it.

Work requests and scatter entries are made once per lane; an entry's length is set for each post. Its older versions do
not tell a completion channel's descriptor, and do not free work requests: there is one more reason to make them once.
Of each completion it makes an object, with a call of the library for each of 13 fields; so it takes the first alone
(`msi.net.rdma.completion_queue`).
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
from collections.abc import Iterator, Sequence
from operator import attrgetter
from typing import Any

from msi.net.rdma.completion_queue import BindingQueue
from msi.net.rdma.find_pyverbs import import_pyverbs
from msi.net.rdma.verbs import (
    COMPLETIONS_PER_POLL,
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

import_pyverbs()  # which may be none of this environment's

from pyverbs.addr import GID, AHAttr, GlobalRoute  # noqa: E402
from pyverbs.cq import CQ, CompChannel  # noqa: E402
from pyverbs.device import Context, get_device_list  # noqa: E402
from pyverbs.mr import MR, DmaBufMR  # noqa: E402
from pyverbs.pd import PD  # noqa: E402
from pyverbs.pyverbs_error import PyverbsError  # noqa: E402
from pyverbs.qp import QP, QPAttr, QPCap, QPInitAttr  # noqa: E402
from pyverbs.srq import SRQ, SrqAttr, SrqInitAttr  # noqa: E402
from pyverbs.wr import SGE, RecvWR, SendWR  # noqa: E402

RELIABLE_CONNECTED = 2
WRITE, WRITE_IMMEDIATE = 0, 1  # opcodes
SIGNALED, INLINE = 2, 8
LOCAL_WRITE, REMOTE_WRITE = 1, 2
FIELDS = attrgetter("status", "opcode", "imm_data", "qp_num")  # of a completion
MIN_RNR_TIMER = 12  # 0.64 ms
EVENTS = "anon_inode:[infinibandevent]"


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    """What the library raises, as OSError."""
    try:
        yield
    except PyverbsError as error:
        code = getattr(error, "error_code", None)
        raise OSError(abs(code) if code else errno.EIO, str(error)) from error


class PyverbsDriver:
    """Implements `msi.net.rdma.verbs.Driver`."""

    name = "pyverbs"

    def devices(self) -> Sequence[str]:
        with _errors():
            return [device.name.decode() for device in get_device_list()]

    def open(self, device: str) -> Card:
        with _errors():
            return PyverbsCard(device)


class PyverbsCard(BindingQueue):
    """Implements `msi.net.rdma.verbs.Card`."""

    def __init__(self, device: str) -> None:
        super().__init__(self._poll, self._arm)
        self.name = device
        self._context = Context(name=device)
        self._domain = PD(self._context)
        self._channel: Any = None
        self._queue: Any = None
        self._receives: Any = None
        nothing = SGE(0, 0, 0)
        chain = [RecvWR(num_sge=1, sg=[nothing]) for _ in range(RECEIVES_PER_REFILL)]
        for one, following in itertools.pairwise(chain):
            one.next_wr = following
        self._refill = chain

    def port(self, number: int) -> Port:
        with _errors():
            port = self._context.query_port(number)
        return Port(int(port.state), int(port.link_layer), int(port.lid), int(port.active_mtu), int(port.gid_tbl_len))

    def gid(self, port: int, index: int) -> bytes:
        with _errors():
            return bytes.fromhex(self._context.query_gid(port, index).gid.replace(":", ""))

    def register(self, address: int, num_bytes: int, is_remote: bool) -> Registration:
        with _errors():
            return PyverbsRegistration(MR(self._domain, num_bytes, _access(is_remote), address=address), address)

    def register_exported(self, fd: int, offset: int, num_bytes: int, is_remote: bool) -> Registration:
        with _errors():
            return PyverbsRegistration(DmaBufMR(self._domain, num_bytes, _access(is_remote), fd, offset), offset)

    def start(self, num_receives: int, num_completions: int) -> None:
        with _errors():
            before = _event_fds()
            self._channel = CompChannel(self._context)
            self.follow(self._channel.fd if hasattr(self._channel, "fd") else (_event_fds() - before).pop())
            self._queue = CQ(self._context, num_completions, None, self._channel, 0)
            self._receives = SRQ(self._domain, SrqInitAttr(SrqAttr(max_wr=num_receives, max_sge=1)))
        for _ in range(num_receives // RECEIVES_PER_REFILL):
            self.refill()

    def queue_pair(self, port: int, num_sends: int, inline_bytes: int) -> QueuePair:
        limits = QPCap(max_send_wr=num_sends, max_recv_wr=0, max_send_sge=1, max_inline_data=inline_bytes)
        with _errors():
            queue_pair = QP(
                self._domain,
                QPInitAttr(
                    qp_type=RELIABLE_CONNECTED, scq=self._queue, rcq=self._queue, srq=self._receives, cap=limits,
                    sq_sig_all=0,
                ),
            )  # fmt: skip
            attributes = QPAttr(port_num=port)
            attributes.qp_access_flags = LOCAL_WRITE | REMOTE_WRITE
            queue_pair.to_init(attributes)
        return PyverbsQueuePair(queue_pair)

    def _poll(self) -> Sequence[Completion]:
        _, found = self._queue.poll(COMPLETIONS_PER_POLL)
        return list(map(FIELDS, found))

    def _arm(self) -> None:
        try:
            self._queue.req_notify()
        except PyverbsError as error:
            raise OSError(errno.EIO, str(error)) from error

    def refill(self) -> None:
        try:
            self._receives.post_recv(self._refill[0])
        except PyverbsError as error:
            raise OSError(errno.EIO, str(error)) from error

    def close(self) -> None:
        self.unfollow()
        with _errors():
            for one in (self._receives, self._queue, self._channel, self._domain, self._context):
                if one is not None:
                    one.close()


class PyverbsRegistration:
    """Implements `msi.net.rdma.verbs.Registration`."""

    def __init__(self, region: Any, address: int) -> None:
        self.address = address
        self.local_key: int = region.lkey
        self.remote_key: int = region.rkey
        self._region = region

    def close(self) -> None:
        with _errors():
            self._region.close()


class PyverbsQueuePair:
    """Implements `msi.net.rdma.verbs.QueuePair`."""

    def __init__(self, queue_pair: Any) -> None:
        self.number: int = queue_pair.qp_num
        self._queue_pair = queue_pair
        self._word = SendWR(opcode=WRITE_IMMEDIATE, num_sge=1, sg=[SGE(0, 0, 0)], send_flags=0)
        self._word.num_sge = 0

    def connect(self, remote: RemoteQueue, psn: int, path: Path) -> None:
        attributes = QPAttr(port_num=path.port)
        attributes.qp_access_flags = LOCAL_WRITE | REMOTE_WRITE
        attributes.path_mtu = path.mtu
        attributes.dest_qp_num, attributes.rq_psn, attributes.sq_psn = remote.number, remote.psn, psn
        attributes.max_dest_rd_atomic = attributes.max_rd_atomic = 1
        attributes.min_rnr_timer, attributes.rnr_retry = MIN_RNR_TIMER, path.rnr_retries
        attributes.timeout, attributes.retry_cnt = path.timeout, path.retries
        gid = remote.gid.hex(":", 2)
        route = GlobalRoute(
            dgid=GID(gid), sgid_index=path.gid_index, hop_limit=path.hop_limit, traffic_class=path.traffic_class
        )
        attributes.ah_attr = AHAttr(
            dlid=remote.lid, sl=path.service_level, port_num=path.port, is_global=1, gr=route
        )  # fmt: skip
        with _errors():
            self._queue_pair.to_rtr(attributes)
            self._queue_pair.to_rts(attributes)

    def word(self, immediate: int, is_signalled: bool) -> None:
        word = self._word
        word.imm_data = immediate
        word.send_flags = SIGNALED if is_signalled else 0
        try:
            self._queue_pair.post_send(word)
        except PyverbsError as error:
            raise OSError(errno.EIO, str(error)) from error

    def lane(self, header: Span, rows: Span, to_header: Span, to_rows: Span, row_bytes: int, max_rows: int) -> Lane:
        return PyverbsLane(self._queue_pair, header, rows, to_header, to_rows, row_bytes)

    def close(self) -> None:
        with _errors():
            self._queue_pair.close()


class PyverbsLane:
    """Implements `msi.net.rdma.verbs.Lane`."""

    def __init__(
        self, queue_pair: Any, header: Span, rows: Span, to_header: Span, to_rows: Span, row_bytes: int
    ) -> None:
        self._send = queue_pair.post_send
        self._row_bytes = row_bytes
        self._rows_entry = SGE(rows.address, 0, rows.key)
        self._rows = _request(WRITE, self._rows_entry, to_rows)
        self._rows.send_flags = 0
        self._header_entry = SGE(header.address, HEADER_BYTES, header.key)
        self._header = _request(WRITE_IMMEDIATE, self._header_entry, to_header)
        self._rows.next_wr = self._header

    def post(self, immediate: int, num_rows: int) -> None:
        self._post(immediate, num_rows, INLINE)

    def post_signalled(self, immediate: int, num_rows: int) -> None:
        self._post(immediate, num_rows, SIGNALED | INLINE)

    def _post(self, immediate: int, num_rows: int, flags: int) -> None:
        header = self._header
        header.imm_data = immediate
        header.send_flags = flags
        self._rows_entry.length = num_rows * self._row_bytes
        try:
            self._send(self._rows)
        except PyverbsError as error:
            raise OSError(errno.EIO, str(error)) from error

    def post_note(self, immediate: int, num_rows: int, header_bytes: int, is_signalled: bool) -> None:
        header = self._header
        header.imm_data = immediate
        header.send_flags = SIGNALED if is_signalled else 0
        self._header_entry.length = header_bytes
        self._rows_entry.length = num_rows * self._row_bytes
        try:
            self._send(self._rows if num_rows else header)
        except PyverbsError as error:
            raise OSError(errno.EIO, str(error)) from error
        finally:
            self._header_entry.length = HEADER_BYTES


def _request(opcode: int, entry: Any, to: Span) -> Any:
    """One whose entry is changed from outside: what it copies when it is made is left behind."""
    request = SendWR(opcode=opcode, num_sge=1, sg=[entry])
    request.sg_list = entry
    request.set_wr_rdma(to.key, to.address)
    return request


def _event_fds() -> set[int]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}") == EVENTS:
                found.add(int(name))
    return found


def _access(is_remote: bool) -> int:
    return LOCAL_WRITE | REMOTE_WRITE if is_remote else 0
