"""What two ends tell each other of their queue pairs, in front of hello and welcome.

It travels over the control connection, whose handshake proves both ends: keys and addresses are told to nobody else.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from msi.errors import ProtocolError
from msi.net.rdma.verbs import RemoteQueue, Span
from msi.net.slots import LAYOUT, SlotLayout

VERSION = 1
# version, MTU, LID, GID, then number and first sequence number of the sending and of the receiving queue pair,
# then address and key of the headers and of the rows of the seat; its layout follows
FORM = struct.Struct("<BBH16sIIIIQIQI")
MAX_SEAT_BYTES = 1 << 32  # we pin as much, to write from
NUM_BYTES = FORM.size + LAYOUT.size


class Introduction(NamedTuple):
    """Of one end of a connection.

    Attributes:
        sends: its queue pair that writes.
        receives: its queue pair that acknowledges.
        headers, rows: of the seat that is the peer's to write.
    """

    mtu: int
    sends: RemoteQueue
    receives: RemoteQueue
    headers: Span
    rows: Span
    layout: SlotLayout

    def encode(self) -> bytes:
        sends, receives = self.sends, self.receives
        return self.layout.encode() + FORM.pack(
            VERSION, self.mtu, sends.lid, sends.gid, sends.number, sends.psn, receives.number, receives.psn,
            *self.headers, *self.rows,
        )  # fmt: skip

    @staticmethod
    def decode(payload: bytes) -> tuple[Introduction, bytes]:
        """And what follows it. Raises ProtocolError."""
        if len(payload) < NUM_BYTES:
            raise ProtocolError(f"introduces its queue pairs in {len(payload)} bytes, not {NUM_BYTES}")
        layout = SlotLayout.decode(payload[: LAYOUT.size])
        version, mtu, lid, gid, sends, sends_psn, receives, receives_psn, at_headers, headers_key, at_rows, rows_key = (
            FORM.unpack(payload[LAYOUT.size : NUM_BYTES])
        )
        if version != VERSION:
            raise ProtocolError(f"speaks version {version} of RDMA introductions, we speak {VERSION}")
        if layout.rows_bytes > MAX_SEAT_BYTES:
            raise ProtocolError(
                f"offers a seat of {layout.rows_bytes} bytes; by RDMA at most {MAX_SEAT_BYTES} are taken"
            )
        if not 1 <= mtu <= 5:
            raise ProtocolError(f"has an MTU of {mtu}, which is none")
        found = Introduction(
            mtu,
            RemoteQueue(sends, sends_psn, gid, lid),
            RemoteQueue(receives, receives_psn, gid, lid),
            Span(at_headers, headers_key),
            Span(at_rows, rows_key),
            layout,
        )
        return found, payload[NUM_BYTES:]
