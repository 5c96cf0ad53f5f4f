"""Verbs by the `ibverbs` wheel, which loads libibverbs at run time.

Work requests are made once per lane. The length of its rows is a scatter list from a table, filled as row counts occur:
entries cannot be changed, and making one for each post would cost as much as all else. Of completions it makes an
object each; so it takes the first alone (`msi.net.rdma.completion_queue`). It takes immediates for numbers in network
order, and turns them around.
"""

from __future__ import annotations

from collections.abc import Sequence
from socket import htonl
from typing import Any

import ibverbs

from msi.net.rdma.completion_queue import BindingQueue
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

WRITE, WRITE_IMMEDIATE = 0, 1  # opcodes
SIGNALED, INLINE = 2, 8
LOCAL_WRITE, REMOTE_WRITE = 1, 2


class IbverbsDriver:
    """Implements `msi.net.rdma.verbs.Driver`."""

    name = "ibverbs"

    def devices(self) -> Sequence[str]:
        return [device.name for device in ibverbs.get_device_list()]

    def open(self, device: str) -> Card:
        return IbverbsCard(next(one for one in ibverbs.get_device_list() if one.name == device))


class IbverbsCard(BindingQueue):
    """Implements `msi.net.rdma.verbs.Card`."""

    def __init__(self, device: Any) -> None:
        super().__init__(self._poll, self._arm)
        self.name: str = device.name
        self._context = device.open()
        self._domain = self._context.alloc_pd()
        self._channel: Any = None
        self._queue: Any = None
        self._receives: Any = None
        self._refill = [ibverbs.RecvWR(wr_id=0, sg_list=[])] * RECEIVES_PER_REFILL

    def port(self, number: int) -> Port:
        port = self._context.query_port(number)
        return Port(int(port.state), int(port.link_layer), int(port.lid), int(port.active_mtu), int(port.gid_tbl_len))

    def gid(self, port: int, index: int) -> bytes:
        return bytes(self._context.query_gid(port, index).raw)

    def register(self, address: int, num_bytes: int, is_remote: bool) -> Registration:
        return IbverbsRegistration(self._domain.reg_mr(address, num_bytes, _access(is_remote)), address)

    def register_exported(self, fd: int, offset: int, num_bytes: int, is_remote: bool) -> Registration:
        region = self._domain.reg_dmabuf_mr(offset, num_bytes, offset, fd, _access(is_remote))
        return IbverbsRegistration(region, offset)

    def start(self, num_receives: int, num_completions: int) -> None:
        self._channel = self._context.create_comp_channel()
        self.follow(self._channel.fd)
        self._queue = self._context.create_cq(num_completions, self._channel)
        self._receives = self._domain.create_srq(max_wr=num_receives)
        for _ in range(num_receives // RECEIVES_PER_REFILL):
            self.refill()

    def queue_pair(self, port: int, num_sends: int, inline_bytes: int) -> QueuePair:
        limits = ibverbs.QPInitAttr(
            send_cq=self._queue, recv_cq=self._queue, max_send_wr=num_sends, max_inline_data=inline_bytes,
            srq=self._receives,
        )  # fmt: skip
        queue_pair = self._domain.create_qp(limits)
        queue_pair.to_init(port, LOCAL_WRITE | REMOTE_WRITE)
        return IbverbsQueuePair(queue_pair)

    def _poll(self) -> Sequence[Completion]:
        return [
            (one.status, one.opcode, htonl(one.imm_data), one.qp_num) for one in self._queue.poll(COMPLETIONS_PER_POLL)
        ]

    def _arm(self) -> None:
        self._queue.req_notify()

    def refill(self) -> None:
        self._receives.post_recv(self._refill)

    def close(self) -> None:
        self.unfollow()
        for one in (self._receives, self._queue, self._channel, self._domain, self._context):
            if one is not None:
                one.close()


class IbverbsRegistration:
    """Implements `msi.net.rdma.verbs.Registration`."""

    def __init__(self, region: Any, address: int) -> None:
        self.address = address
        self.local_key: int = region.lkey
        self.remote_key: int = region.rkey
        self._region = region

    def close(self) -> None:
        self._region.close()


class IbverbsQueuePair:
    """Implements `msi.net.rdma.verbs.QueuePair`."""

    def __init__(self, queue_pair: Any) -> None:
        self.number: int = queue_pair.qp_num
        self._queue_pair = queue_pair
        self._word = ibverbs.SendWR(wr_id=0, sg_list=[], opcode=WRITE_IMMEDIATE)

    def connect(self, remote: RemoteQueue, psn: int, path: Path) -> None:
        told = ibverbs.QPInfo(remote.number, remote.psn, remote.lid, remote.gid, path.port, path.mtu)
        self._queue_pair.to_rtr(
            told, sgid_index=path.gid_index, mtu=path.mtu, hop_limit=path.hop_limit, sl=path.service_level,
            traffic_class=path.traffic_class,
        )  # fmt: skip
        self._queue_pair.to_rts(psn, timeout=path.timeout, retry_cnt=path.retries, rnr_retry=path.rnr_retries)

    def word(self, immediate: int, is_signalled: bool) -> None:
        word = self._word
        word.imm_data = htonl(immediate)
        word.send_flags = SIGNALED if is_signalled else 0
        self._queue_pair.post_send(word)

    def lane(self, header: Span, rows: Span, to_header: Span, to_rows: Span, row_bytes: int, max_rows: int) -> Lane:
        return IbverbsLane(self._queue_pair, header, rows, to_header, to_rows, row_bytes, max_rows)

    def close(self) -> None:
        self._queue_pair.close()


class IbverbsLane:
    """Implements `msi.net.rdma.verbs.Lane`."""

    def __init__(
        self, queue_pair: Any, header: Span, rows: Span, to_header: Span, to_rows: Span, row_bytes: int, max_rows: int
    ) -> None:
        self._send = queue_pair.post_send
        self._from_header, self._from_rows, self._row_bytes = header, rows, row_bytes
        self._lengths: list[list[Any] | None] = [None] * (max_rows + 1)
        self._rows = ibverbs.SendWR(opcode=WRITE, remote_addr=to_rows.address, rkey=to_rows.key)
        self._header, self._signalled = (
            ibverbs.SendWR(
                sg_list=[ibverbs.SGE(header.address, HEADER_BYTES, lkey=header.key)], opcode=WRITE_IMMEDIATE,
                send_flags=flags, remote_addr=to_header.address, rkey=to_header.key,
            )
            for flags in (INLINE, INLINE | SIGNALED)
        )  # fmt: skip
        self._note = ibverbs.SendWR(opcode=WRITE_IMMEDIATE, remote_addr=to_header.address, rkey=to_header.key)
        self._both, self._both_signalled = [self._rows, self._header], [self._rows, self._signalled]

    def post(self, immediate: int, num_rows: int) -> None:
        self._rows.sg_list = self._lengths[num_rows] or self._make_length(num_rows)
        self._header.imm_data = htonl(immediate)
        self._send(self._both)

    def post_signalled(self, immediate: int, num_rows: int) -> None:
        self._rows.sg_list = self._lengths[num_rows] or self._make_length(num_rows)
        self._signalled.imm_data = htonl(immediate)
        self._send(self._both_signalled)

    def post_note(self, immediate: int, num_rows: int, header_bytes: int, is_signalled: bool) -> None:
        note = self._note
        note.sg_list = [ibverbs.SGE(self._from_header.address, header_bytes, lkey=self._from_header.key)]
        note.imm_data = htonl(immediate)
        note.send_flags = SIGNALED if is_signalled else 0
        if num_rows:
            self._rows.sg_list = self._lengths[num_rows] or self._make_length(num_rows)
            self._send([self._rows, note])
        else:
            self._send(note)

    def _make_length(self, num_rows: int) -> list[Any]:
        rows = self._from_rows
        length = [ibverbs.SGE(rows.address, num_rows * self._row_bytes, lkey=rows.key)]
        self._lengths[num_rows] = length
        return length


def _access(is_remote: bool) -> int:
    return LOCAL_WRITE | REMOTE_WRITE if is_remote else 0
