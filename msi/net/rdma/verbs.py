"""The seam between the transport and a verbs library: what a driver does, and nothing more.

    card = driver.open("mlx5_0")            device, protection domain; no queues yet
    card.start(num_receives, ...)           one completion queue with its channel, one shared receive queue
    queue_pair = card.queue_pair(...)       reliable connected
    lane = queue_pair.lane(...)             a lane's work requests, made once
    lane.post(immediate, num_rows)          rows, then the header with the immediate, in one post

Numbers are those of the verbs ABI, which all libraries share. Immediates are handed over as they were posted: they
travel in the order of headers, little-endian, which costs nobody a call where processors have that order. What a
library raises comes out as OSError, what cannot work as ConfigError.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

SUCCESS = 0  # of a completion's status
RECEIVED_IMMEDIATE = 129  # a completion's opcode
STATUS = {
    1: "a write is longer than the card takes", 4: "our memory is not registered", 5: "flushed",
    9: "the peer's card refuses the request", 10: "the peer's card refuses our key: its seat was revoked or given away",
    11: "the peer's card failed", 12: "the peer's card does not acknowledge", 13: "the peer has no receive left",
}  # fmt: skip
ETHERNET = 2  # a port's link layer
ACTIVE = (4, 5)  # a port's state
COMPLETIONS_PER_POLL = 64
RECEIVES_PER_REFILL = 16
EVENTS_PER_ACKNOWLEDGEMENT = 64


# status, opcode, immediate, number of the queue pair; with a status other than SUCCESS only status and number say
# something. No named tuple: making one costs as much as all else.
Completion = tuple[int, int, int, int]


class Port(NamedTuple):
    state: int
    link_layer: int
    lid: int
    mtu: int  # as verbs count them: 5 is 4096
    num_gids: int


class Span(NamedTuple):
    """Memory as a card knows it: where it begins, and a key for it."""

    address: int
    key: int


class RemoteQueue(NamedTuple):
    """A queue pair at a peer."""

    number: int
    psn: int
    gid: bytes
    lid: int


@dataclass(frozen=True, slots=True)
class Path:
    """How a queue pair reaches its peer; see `RdmaOptions`."""

    port: int
    gid_index: int
    mtu: int
    traffic_class: int
    service_level: int
    timeout: int
    retries: int
    rnr_retries: int
    hop_limit: int = 64


class Registration(Protocol):
    """Memory that a card may read, or peers may write; whoever owns the memory keeps it until `close`."""

    address: int  # of its first byte, for spans
    local_key: int
    remote_key: int

    def close(self) -> None:
        """From now on nobody reads or writes through its keys. Idempotent."""


class Lane(Protocol):
    """Posts of one lane to one peer. Raises OSError."""

    def post(self, immediate: int, num_rows: int) -> None:
        """Its first rows, then its header with the immediate. Nobody hears when that is through."""

    def post_signalled(self, immediate: int, num_rows: int) -> None:
        """The same, with a completion."""

    def post_note(self, immediate: int, num_rows: int, header_bytes: int, is_signalled: bool) -> None:
        """The same with a header that is followed by a note."""


class QueuePair(Protocol):
    number: int

    def connect(self, remote: RemoteQueue, psn: int, path: Path) -> None:
        """Sends begin with our `psn`. Raises OSError."""

    def word(self, immediate: int, is_signalled: bool) -> None:
        """The immediate alone. Raises OSError."""

    def lane(self, header: Span, rows: Span, to_header: Span, to_rows: Span, row_bytes: int, max_rows: int) -> Lane: ...

    def close(self) -> None:
        """What it has not sent is not sent, nor does anything arrive. Idempotent."""


class Card(Protocol):
    """An opened device. Close what was made of it first."""

    name: str

    @property
    def fd(self) -> int:
        """Readable when there are completions after `arm`; -1 before `start`."""

    def port(self, number: int) -> Port: ...

    def gid(self, port: int, index: int) -> bytes:
        """16 bytes. Raises OSError."""

    def register(self, address: int, num_bytes: int, is_remote: bool) -> Registration:
        """Host memory. `is_remote`: peers write it, else the card reads it. Raises OSError."""

    def register_exported(self, fd: int, offset: int, num_bytes: int, is_remote: bool) -> Registration:
        """A device's memory, by a descriptor that its owner exported (dma-buf). Raises OSError."""

    def start(self, num_receives: int, num_completions: int) -> None:
        """With all receives posted. Raises OSError."""

    def queue_pair(self, port: int, num_sends: int, inline_bytes: int) -> QueuePair:
        """Raises OSError."""

    def poll(self) -> Sequence[Completion]:  # looked up for every call: which one it is may change with an event
        """Up to COMPLETIONS_PER_POLL, in order; empty when there are none. Raises OSError."""

    def look(self) -> Sequence[Completion]:
        """The same for whoever does it again and again: others may have the interpreter's lock meanwhile."""

    def arm(self) -> None:
        """The next completion makes the descriptor readable."""

    def take_event(self) -> bool:
        """What made the descriptor readable is taken; False where nothing has, or not yet."""

    def refill(self) -> None:
        """Posts RECEIVES_PER_REFILL receives."""

    def close(self) -> None: ...


class Driver(Protocol):
    name: str

    def devices(self) -> Sequence[str]:
        """Their names; empty where the kernel has none."""

    def open(self, device: str) -> Card:
        """Raises OSError."""


def status_sentence(status: int) -> str:
    return STATUS.get(status, f"a work request failed with status {status}")
