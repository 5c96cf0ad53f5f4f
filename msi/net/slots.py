"""Slots: where rows land, and the header and immediate that announce them.

A peer's landing memory is one region of `num_lanes` slots; a slot is a header and `slot_rows` rows. Rows and header
travel in one post; the 32-bit immediate that the receiver is woken with says what landed where:

    kind 2 | more 1 | lane 3 | attempt 2 | sequence number, low 12 bits | incarnation, low 12 bits

The header repeats these in full. What does not match is dropped and counted by the link, never used.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

HEADER_BYTES = 64
MAX_LANES = 8
SEQ_BITS = 12
SEQ_MASK = (1 << SEQ_BITS) - 1
INCARNATION_MASK = (1 << 12) - 1
MAGIC = b"MSI1"
# magic, kind, lane, attempt, more, incarnation, placement version, sequence number, rows, bytes per row, two times
HEADER = struct.Struct("<4sBBBBIIQIIQQ")


class Kind(IntEnum):
    """What an immediate announces."""

    DISPATCH = 0  # rows in the lane's slot, to be answered
    COMBINE = 1  # the answer, in the lane's slot
    EMPTY = 2  # no rows for you at this sequence number: no slot, no answer
    ERROR = 3  # no answer will come; the slot's rows hold the reason, UTF-8


class Immediate(NamedTuple):
    """The fields of a 32-bit immediate; `seq` and `incarnation` are low bits."""

    kind: int
    more: bool
    lane: int
    attempt: int
    seq: int
    incarnation: int


def pack_immediate(kind: int, more: bool, lane: int, attempt: int, seq: int, incarnation: int) -> int:
    return (
        kind << 30 | more << 29 | lane << 26 | attempt << 24 | (seq & SEQ_MASK) << 12 | (incarnation & INCARNATION_MASK)
    )


def unpack_immediate(immediate: int) -> Immediate:
    return Immediate(
        immediate >> 30,
        bool(immediate >> 29 & 1),
        immediate >> 26 & 7,
        immediate >> 24 & 3,
        immediate >> 12 & SEQ_MASK,
        immediate & INCARNATION_MASK,
    )


class Header(NamedTuple):
    """The first 64 bytes of a slot, as `HEADER` packs them.

    In an answer `service_ns` is the time from the landing of the rows to the post of their answer, and `compute_ns`
    what of it the device computed; else both are 0.
    """

    magic: bytes
    kind: int
    lane: int
    attempt: int
    more: int
    incarnation: int
    placement_version: int
    seq: int
    num_rows: int
    row_bytes: int
    service_ns: int
    compute_ns: int


@dataclass(frozen=True, slots=True)
class SlotLayout:
    """The slots of one peer: `num_lanes` of them behind one another, each a header and `slot_rows` rows."""

    num_lanes: int
    slot_rows: int
    row_bytes: int

    def __post_init__(self) -> None:
        assert 1 <= self.num_lanes <= MAX_LANES, self
        assert self.slot_rows >= 1, self
        assert self.row_bytes >= 1, self

    @property
    def slot_bytes(self) -> int:
        """Header and rows, rounded up so that every slot starts on a cache line."""
        return -(-(HEADER_BYTES + self.slot_rows * self.row_bytes) // 64) * 64

    @property
    def region_bytes(self) -> int:
        return self.num_lanes * self.slot_bytes

    def offset(self, lane: int) -> int:
        return lane * self.slot_bytes
