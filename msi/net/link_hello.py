"""What two nodes tell each other when they connect a link, and what makes one refuse the other."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from msi.errors import ProtocolError
from msi.net.codec import Codec
from msi.net.slots import SlotLayout
from msi.net.transport import MAX_HELLO_BYTES

PROTOCOL_VERSION = 2


@dataclass(frozen=True, slots=True)
class LinkHello:
    """A node that dispatches introduces itself to a node that combines."""

    protocol_version: int
    instance: str  # the public name of its token
    worker_id: str
    incarnation: int
    node: int
    rank: int  # within its tensor-parallel node
    size: int
    placement_version: int
    num_lanes: int
    slot_rows: int
    row_bytes: int  # of what it will dispatch
    answer_row_bytes: int  # of what it wants back
    next_seqs: tuple[int, ...]  # per lane, the first sequence number that it will send

    @property
    def dispatch_layout(self) -> SlotLayout:
        return SlotLayout(self.num_lanes, self.slot_rows, self.row_bytes)

    @property
    def combine_layout(self) -> SlotLayout:
        return SlotLayout(self.num_lanes, self.slot_rows, self.answer_row_bytes)


@dataclass(frozen=True, slots=True)
class LinkWelcome:
    """The node that combines has given the other one a seat."""

    worker_id: str
    incarnation: int
    seat: int


LINK_CODEC = Codec((LinkHello, LinkWelcome), max_bytes=MAX_HELLO_BYTES)


def decode_hello(payload: bytes, ours: LinkHello, placement_versions: Collection[int] = ()) -> LinkHello:
    """Checks a hello against what we expect: `ours`, with the peer's names and numbers left open.

    Args:
        placement_versions: that are as good as ours.

    Raises:
        ProtocolError: says what differs, with both values.
    """
    hello = LINK_CODEC.decode(payload)
    if not isinstance(hello, LinkHello):
        raise ProtocolError(f"expected LinkHello, got {type(hello).__name__}")
    must_match = (
        "protocol_version", "placement_version", "num_lanes", "slot_rows", "row_bytes", "answer_row_bytes",
    )  # fmt: skip
    if (hello.rank, hello.size) != (0, 1):
        raise ProtocolError(
            f"{hello.worker_id[:64]} is rank {hello.rank} of {hello.size} of its node; only nodes of one rank are built"
        )
    if hello.instance != ours.instance:
        raise ProtocolError(f"{hello.worker_id[:64]} belongs to another instance")
    for name in must_match:
        if name == "placement_version" and hello.placement_version in placement_versions:
            continue
        if getattr(hello, name) != getattr(ours, name):
            raise ProtocolError(
                f"{hello.worker_id[:64]} has {name} {getattr(hello, name)}, ours is {getattr(ours, name)}"
            )
    if len(hello.next_seqs) != hello.num_lanes or not all(0 <= seq < 1 << 62 for seq in hello.next_seqs):
        raise ProtocolError(f"next_seqs {hello.next_seqs[:8]} do not fit {hello.num_lanes} lanes")
    return hello


def decode_welcome(payload: bytes) -> LinkWelcome:
    """Raises ProtocolError."""
    welcome = LINK_CODEC.decode(payload)
    if not isinstance(welcome, LinkWelcome):
        raise ProtocolError(f"expected LinkWelcome, got {type(welcome).__name__}")
    return welcome
